//! Which values of a quantised network are bytes in memory.

use super::fold::Folding;
use super::program::{Program, Step, View};
use crate::nn::{Quantisation, QuantisedConv};
use crate::ops::conv::int8::Affine;

/// The quantised convolutions of a program.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quantised<'a> {
    program: &'a Program,
    /// None where the device computes with floats.
    layers: Option<&'a Quantisation>,
}

impl<'a> Quantised<'a> {
    pub fn new(program: &'a Program, layers: Option<&'a Quantisation>) -> Self {
        Self { program, layers }
    }

    /// Returns the quantisation of a step, if it is a convolution that has one.
    pub fn step(&self, i: usize) -> Option<&'a QuantisedConv> {
        match &self.program.steps[i] {
            Step::Conv { path, .. } => self.layers?.get(path),
            _ => None,
        }
    }

    /// By value: its quantisation, if its buffer holds bytes. The value is then the result of a quantised convolution
    /// with all that follows it folded in, and only quantised convolutions read it, all in the same way.
    pub fn bytes(&self, folding: &Folding) -> Vec<Option<Affine>> {
        let Program { steps, views, outputs } = self.program;
        let uses = self.program.num_uses();
        let bytes = |value: usize| {
            self.step(value.checked_sub(1)?)?;
            let is_bare =
                |(id, View { norm, .. }): &(usize, &View)| uses[*id] == 0 || norm.is_none() || folding.norms[value];
            let mut shown = views.iter().enumerate().filter(|(_, view)| view.value == value);
            if !shown.all(|view| is_bare(&view)) || outputs.iter().any(|output| views[*output].value == value) {
                return None;
            }
            let is_read = |i: &usize| steps[*i].inputs().iter().any(|view| views[*view].value == value);
            let mut readers = (0..steps.len()).filter(is_read).map(|i| self.step(i).map(|layer| layer.input));
            let first = readers.next()??;
            readers.all(|other| other == Some(first)).then_some(first)
        };
        (0..=steps.len()).map(bytes).collect()
    }
}
