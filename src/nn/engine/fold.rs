//! Norms and sums that inference folds into convolutions.

use std::collections::{BTreeMap, HashSet};

use super::program::{Program, Step, ViewId};

/// What is folded into the convolutions of a program.
#[derive(Clone, Debug, Default)]
pub(super) struct Folding {
    /// By value: whether its norm is folded into the convolution that computes it, because nothing reads the value
    /// without its norm.
    pub norms: Vec<bool>,
    /// By the step of a sum: the step of a convolution that only this sum reads, which runs in its place, and the other
    /// side of the sum, which it adds.
    pub sums: BTreeMap<usize, (usize, ViewId)>,
}

impl Folding {
    /// Returns a folding of nothing.
    pub fn none(program: &Program) -> Self {
        Self { norms: vec![false; program.steps.len() + 1], sums: BTreeMap::new() }
    }

    /// Returns everything that can be folded.
    pub fn of(program: &Program) -> Self {
        let uses = program.num_uses();
        let is_folded = |value: usize| {
            let is_seen = program.raw_of(value).is_some_and(|view| uses[view] > 0);
            let is_conv = value > 0 && matches!(program.steps[value - 1], Step::Conv { .. });
            is_conv && !is_seen && program.norm_of(value).is_some()
        };
        let norms: Vec<bool> = (0..=program.steps.len()).map(is_folded).collect();
        let is_bare = |view: ViewId| program.views[view].norm.is_none() || norms[program.views[view].value];
        let sole_conv = |view: ViewId| {
            let step = program.views[view].value.checked_sub(1)?;
            let is_conv = matches!(program.steps[step], Step::Conv { .. });
            (is_conv && is_bare(view) && uses[view] == 1).then_some(step)
        };
        let (mut sums, mut moved) = (BTreeMap::new(), HashSet::new());
        for (i, step) in program.steps.iter().enumerate() {
            let Step::Add { a, b } = step else { continue };
            for (conv, other) in [(*a, *b), (*b, *a)] {
                let value = program.views[other].value;
                let found = sole_conv(conv).filter(|conv| *conv + 1 != value && !moved.contains(conv));
                if let Some(conv) = found.filter(|_| is_bare(other)) {
                    moved.insert(conv);
                    sums.insert(i, (conv, other));
                    break;
                }
            }
        }
        Self { norms, sums }
    }
}
