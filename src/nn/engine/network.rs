//! Runs the steps of a forward pass on a device.

use std::collections::BTreeMap;

use candle_core::{Result, bail};

use super::lowered::Lowered;
use super::program::{Program, Step, ViewId};
use super::tape::{Forward, Tape};
use crate::nn::device_params::DeviceParams;
use crate::ops::backend::{ConvShape, Kernels, Part, Scale, Source, Sums, Weight};

/// A program on a device. Parameters in its calls are those of the network that it was made for.
#[derive(Debug)]
pub(super) struct Network<B: Kernels> {
    pub backend: B,
    pub program: Program,
    pub tape: Tape,
    /// Shapes `(1, h, w, c)` of the values of one image.
    pub shapes: Vec<[usize; 4]>,
    /// Channels of the values without those that the device adds.
    pub channels: Vec<usize>,
    /// Sizes by the step; the number of images does not matter.
    pub convs: BTreeMap<usize, ConvShape>,
    pool: B::Pool,
}

/// Weights prepared for inference, by step.
#[derive(Debug)]
pub(super) struct PreparedWeights<B: Kernels> {
    pub filters: BTreeMap<usize, B::Filter>,
    /// Weight and bias of fully connected layers.
    pub full: BTreeMap<usize, (Whole<B>, Option<Whole<B>>)>,
}

/// An array and its length.
#[derive(Debug)]
pub(super) struct Whole<B: Kernels>(pub B::Array, pub usize);

impl<B: Kernels> Whole<B> {
    pub fn upload(backend: &B, values: Vec<f32>) -> Result<Self> {
        let len = values.len();
        Ok(Self(backend.upload(values)?, len))
    }

    pub fn part(&self) -> Part<'_, B> {
        Part { array: &self.0, range: 0..self.1 }
    }
}

/// Weights of a forward pass.
#[derive(Clone, Copy)]
pub(super) enum Weights<'a, B: Kernels> {
    Trained(&'a DeviceParams<B>),
    Prepared(&'a PreparedWeights<B>),
}

impl<'a, B: Kernels> Weights<'a, B> {
    fn filter(self, i: usize, path: &str) -> Result<Weight<'a, B>> {
        match self {
            Self::Trained(params) => params.weight(path).map(Weight::Trained),
            Self::Prepared(weights) => Ok(Weight::Prepared(&weights.filters[&i])),
        }
    }

    /// Weight and bias of a fully connected layer.
    fn full(self, i: usize, path: &str, has_bias: bool) -> Result<(Part<'a, B>, Option<Part<'a, B>>)> {
        match self {
            Self::Trained(params) => {
                Ok((params.weight(path)?, has_bias.then(|| params.part(path, "bias")).transpose()?))
            }
            Self::Prepared(weights) => {
                let (weight, bias) = &weights.full[&i];
                Ok((weight.part(), bias.as_ref().map(Whole::part)))
            }
        }
    }
}

impl<B: Kernels> Network<B> {
    pub fn new(lowered: Lowered, tape: Tape, backend: &B) -> Self {
        let Lowered { program, shapes, channels, convs } = lowered;
        Self { backend: backend.clone(), program, tape, shapes, channels, convs, pool: B::Pool::default() }
    }

    pub fn start(&self, images: &B::Images, n: usize) -> Result<B::Memory> {
        let mut memory = self.backend.memory(&self.tape.layout, &self.pool, n)?;
        self.backend.load(&mut memory, images, self.tape.images)?;
        Ok(memory)
    }

    /// Shape of the value of a view, for `n` images.
    pub fn shape(&self, view: ViewId, n: usize) -> [usize; 4] {
        let [_, h, w, c] = self.shapes[self.program.views[view].value];
        [n, h, w, c]
    }

    pub fn conv(&self, i: usize, n: usize) -> ConvShape {
        let conv = self.convs[&i];
        let [_, h, w, c] = conv.x;
        ConvShape { x: [n, h, w, c], ..conv }
    }

    /// Runs a step of a forward pass.
    pub fn step(
        &self,
        memory: &mut B::Memory,
        norms: &[Option<B::Norm>],
        weights: Weights<B>,
        Forward { i, inputs, residual, flat, y }: &Forward,
        (n, mask): (usize, Option<&B::Mask>),
    ) -> Result<()> {
        let backend = &self.backend;
        let source = |view: ViewId, input: usize| Source { buffer: inputs[input], norm: norms[view].as_ref() };
        match &self.program.steps[*i] {
            Step::Conv { x, path, .. } => {
                backend.conv(memory, &self.conv(*i, n), source(*x, 0), weights.filter(*i, path)?, *residual, *y)
            }
            Step::Add { a, b } => backend.sum(memory, source(*a, 0), source(*b, 1), self.shape(*a, n)[3], *y),
            Step::Write { x } => backend.apply(memory, source(*x, 0), self.shape(*x, n)[3], *y),
            Step::Mean { x } => {
                let shape = self.shape(*x, n);
                let of = Sums { x: source(*x, 0), with: None, factor: 1.0 / num_pixels(shape) };
                backend.sums(memory, of, shape, *y)
            }
            Step::Scale { x, plus, .. } => {
                let plus = plus.map(|plus| source(plus, 2));
                let of = Scale { x: Some(source(*x, 0)), by: inputs[1], factor: 1.0, plus };
                backend.scale(memory, of, self.shape(*x, n), *y)
            }
            Step::Activate { x, activation } => {
                backend.activate(memory, source(*x, 0), *activation, self.shape(*x, n)[3], *y)
            }
            Step::MaxPool { x, window } => backend.max_pool(memory, source(*x, 0), *window, self.shape(*x, n), *y),
            Step::Upsample { x, factor } => backend.upsample(memory, source(*x, 0), *factor, self.shape(*x, n), *y),
            Step::Concat { parts } => {
                let part =
                    |(i, view): (usize, &ViewId)| (source(*view, i), self.channels[self.program.views[*view].value]);
                backend.concat(memory, &parts.iter().enumerate().map(part).collect::<Vec<_>>(), *y)
            }
            Step::Linear { x, path, has_bias, .. } => {
                let Some(flat) = *flat else { bail!("linear: no buffer for the input of {path}") };
                let (shape, outputs) = (self.shape(*x, n), self.shapes[*i + 1][3]);
                backend.flatten(memory, source(*x, 0), shape, mask, flat)?;
                let (weight, bias) = weights.full(*i, path, *has_bias)?;
                backend.full(memory, flat, weight, bias, [n, shape[1..].iter().product(), outputs], *y)
            }
        }
    }

    /// Returns the outputs, f32, and ends the forward pass.
    pub fn outputs(&self, memory: &mut B::Memory, norms: &[Option<B::Norm>]) -> Result<Vec<B::Array>> {
        let mut arrays = Vec::new();
        for (view, buffer) in self.program.outputs.iter().zip(&self.tape.outputs) {
            let source = Source { buffer: *buffer, norm: norms[*view].as_ref() };
            arrays.push(self.backend.get(memory, source, self.shape(*view, 1)[3])?);
        }
        self.backend.release(memory, self.tape.forward.len() + 1);
        Ok(arrays)
    }
}

/// Number of pixels of an image of this shape.
pub(super) fn num_pixels([_, h, w, _]: [usize; 4]) -> f32 {
    (h * w) as f32
}
