//! A program with its sizes on a device.

use std::collections::BTreeMap;

use candle_core::{Result, bail};

use super::program::Program;
use crate::nn::graph::Graph;
use crate::nn::params::Params;
use crate::ops::backend::{ConvShape, Kernels};

/// A program with its sizes on a device.
#[derive(Debug)]
pub(crate) struct Lowered {
    pub(super) program: Program,
    /// Shapes of the values on the device.
    pub(super) shapes: Vec<[usize; 4]>,
    /// Channels of the values without those that the device adds.
    pub(super) channels: Vec<usize>,
    /// Sizes of the convolutions, by step.
    pub(super) convs: BTreeMap<usize, ConvShape>,
}

impl Lowered {
    /// Returns the program of a network for images `[n, h, w]`.
    ///
    /// # Errors
    /// When the engine or the device has no kernels for it: the first thing that it lacks.
    pub fn of(graph: &Graph, params: &Params, [n, h, w]: [usize; 3], backend: &impl Kernels) -> Result<Self> {
        if !params.is_single_on_cpu() {
            bail!("the engine computes in f32 from parameters on the CPU: ModuleT::forward_t runs other networks");
        }
        let (program, weights) = (Program::of(graph)?, params.shapes());
        let mut shapes = program.shapes(&weights, [n.max(1), h, w, 3])?;
        let channels: Vec<usize> = shapes.iter().map(|shape| shape[3]).collect();
        for (value, shape) in shapes.iter_mut().enumerate() {
            let [.., c] = shape;
            match program.is_wide(value) {
                true => backend.check_embedding_size(*c)?,
                false => *c = backend.channels(*c),
            }
        }
        let convs = program.convs(&weights, &shapes)?;
        program.check_padding(|value| channels[value] < shapes[value][3])?;
        convs.values().try_for_each(|conv| backend.check_conv(conv))?;
        Ok(Self { program, shapes, channels, convs })
    }
}
