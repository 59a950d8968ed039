//! What a device computes of a network: the steps of a forward and a backward pass on buffers in its memory.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::{Backend, BufferId, MemoryLayout, Order};
use crate::dist::Ranks;
use crate::ops::channels::Constants;
use crate::ops::conv::int8::{Affine, Int8Weight};
use crate::ops::conv::{ConvConfig, ConvolutionPass};
pub use crate::ops::pixels::Activation;
use crate::ops::pool::Window;

/// The kernels of a device. Activations are channels-last, `(n, h, w, c)`.
pub trait Kernels: Backend {
    /// Buffers of a pass.
    type Memory: Debug + Send;
    /// Memory that is kept from pass to pass.
    type Pool: Clone + Debug + Default + Send + Sync;
    /// Images as a network reads them.
    type Images;
    /// Batch norm with its statistics, and PReLU if there is one.
    type Norm: Clone + Debug + Send + Sync;
    /// A filter prepared for inference.
    type Filter: Debug + Send + Sync;
    /// Factors of dropout.
    type Mask: Debug + Send;

    /// Whether inference folds norms and sums into convolutions.
    const FOLDS: bool;
    /// Whether there are convolutions of 8-bit integers. Others compute with the numbers that the integers stand for.
    const QUANTISES: bool = false;

    /// Says why the device cannot train, if it cannot.
    ///
    /// # Errors
    /// The reason.
    fn check_training(&self) -> Result<()> {
        Ok(())
    }
    /// Checks that there are kernels for a convolution.
    ///
    /// # Errors
    /// What the device lacks.
    fn check_conv(&self, _conv: &ConvShape) -> Result<()> {
        Ok(())
    }
    /// Channels that activations of `c` channels have in memory; those from `c` on are zeros.
    fn channels(&self, c: usize) -> usize {
        c
    }
    /// Layout of a filter.
    fn filter_order(&self, conv: &ConvShape) -> Order;
    /// Layout of the weight of a fully connected layer whose input has `c` channels of `pixels`.
    fn linear_order(&self, c: usize, pixels: usize) -> Order;

    /// Returns preprocessed images `(N, 3, S, S)`, f32.
    fn images(&self, images: &Tensor) -> Result<Self::Images>;
    /// Returns RGB images `(N, side, side, 3)`, 8 bits, where the device preprocesses them itself.
    fn pixels(&self, rgb: &[u8], side: usize, scaling: Scaling) -> Result<Option<Self::Images>>;
    /// Returns dropout's factors for activations `[n, h, w, c]`, given channels first.
    fn mask(&self, factors: Vec<f32>, shape: [usize; 4]) -> Result<Self::Mask>;

    /// Returns the buffers for `n` images, of unspecified value.
    fn memory(&self, layout: &Arc<MemoryLayout>, pool: &Self::Pool, n: usize) -> Result<Self::Memory>;
    /// Ends the lifetime of the buffers that were used last at this moment.
    fn release(&self, memory: &mut Self::Memory, moment: usize);
    /// Writes images to their buffer.
    fn load(&self, memory: &mut Self::Memory, images: &Self::Images, to: BufferId) -> Result<()>;
    /// Writes an f32 array, such as the gradient of embeddings, to a buffer.
    fn set(&self, memory: &mut Self::Memory, to: BufferId, values: &Self::Array) -> Result<()>;
    /// Returns values of `c` channels, f32.
    fn get(&self, memory: &mut Self::Memory, x: Source<Self>, c: usize) -> Result<Self::Array>;

    /// Prepares the norm of a step's result `(.., c)` by the batch's statistics, which update the running ones, or by
    /// the running ones.
    fn norm(
        &self,
        memory: &Self::Memory,
        x: BufferId,
        c: usize,
        params: NormParams<Self>,
        statistics: Statistics,
    ) -> Result<Self::Norm>;
    /// Returns a norm of activations with `c` channels in memory whose statistics never change.
    fn constant_norm(&self, constants: &Constants, c: usize) -> Result<Self::Norm>;
    /// Prepares a filter, in the checkpoint's layout, for inference; folds `norm`, the norm that follows, into it.
    fn filter(&self, conv: &ConvShape, weight: &[f32], norm: Option<&Constants>) -> Result<Self::Filter>;
    /// Like [`Self::filter`], of a convolution of 8-bit integers; only where [`Self::QUANTISES`].
    fn int8_filter(&self, _conv: &ConvShape, _filter: Int8Filter, _norm: Option<&Constants>) -> Result<Self::Filter> {
        bail!("the device has no convolutions of 8-bit integers")
    }

    /// Writes a convolution's result to `y`, plus `residual`.
    fn conv(
        &self,
        memory: &mut Self::Memory,
        conv: &ConvShape,
        x: Source<Self>,
        weight: Weight<Self>,
        residual: Option<BufferId>,
        y: BufferId,
    ) -> Result<()>;
    /// Writes the sum of two values of `c` channels to `y`.
    fn sum(&self, memory: &mut Self::Memory, a: Source<Self>, b: Source<Self>, c: usize, y: BufferId) -> Result<()>;
    /// Writes a value of `c` channels, with its norm applied, to `y`.
    fn apply(&self, memory: &mut Self::Memory, x: Source<Self>, c: usize, y: BufferId) -> Result<()>;
    /// Writes sums over the pixels of an activation of this shape to `y`.
    fn sums(&self, memory: &mut Self::Memory, of: Sums<Self>, shape: [usize; 4], y: BufferId) -> Result<()>;
    /// Writes the product of an activation of this shape with one factor per image and channel to `y`.
    fn scale(&self, memory: &mut Self::Memory, of: Scale<Self>, shape: [usize; 4], y: BufferId) -> Result<()>;
    /// Writes the activation of a value of `c` channels to `y`.
    fn activate(
        &self,
        memory: &mut Self::Memory,
        x: Source<Self>,
        activation: Activation,
        c: usize,
        y: BufferId,
    ) -> Result<()>;
    /// Writes the largest value of each window of an activation of this shape to `y`.
    fn max_pool(
        &self,
        memory: &mut Self::Memory,
        x: Source<Self>,
        window: Window,
        shape: [usize; 4],
        y: BufferId,
    ) -> Result<()>;
    /// Writes an activation of this shape, upsampled by a factor, to `y`.
    fn upsample(
        &self,
        memory: &mut Self::Memory,
        x: Source<Self>,
        factor: usize,
        shape: [usize; 4],
        y: BufferId,
    ) -> Result<()>;
    /// Writes the channels of all parts, one after the other, to `y`. Each part comes with the number of its channels
    /// without those that the device adds.
    fn concat(&self, memory: &mut Self::Memory, parts: &[(Source<Self>, usize)], y: BufferId) -> Result<()>;
    /// Writes the input of a fully connected layer, times the mask, to `flat`, in the order of the layer's weight.
    fn flatten(
        &self,
        memory: &mut Self::Memory,
        x: Source<Self>,
        shape: [usize; 4],
        mask: Option<&Self::Mask>,
        flat: BufferId,
    ) -> Result<()>;
    /// Writes `flat w^T + bias` to `y`; sizes are `[n, inputs, outputs]`.
    fn full(
        &self,
        memory: &mut Self::Memory,
        flat: BufferId,
        weight: Part<Self>,
        bias: Option<Part<Self>>,
        sizes: [usize; 3],
        y: BufferId,
    ) -> Result<()>;

    /// Writes the gradient of a filter.
    fn conv_grad_w(
        &self,
        memory: &mut Self::Memory,
        conv: &ConvShape,
        x: Source<Self>,
        gy: BufferId,
        grads: Grads<Self>,
    ) -> Result<()>;
    /// Writes the gradient of a convolution's input, plus `other`, to `gx`.
    fn conv_grad_x(
        &self,
        memory: &mut Self::Memory,
        conv: &ConvShape,
        gy: BufferId,
        weight: Part<Self>,
        other: Option<BufferId>,
        gx: BufferId,
    ) -> Result<()>;
    /// Overwrites `x`, the input of a norm of `c` channels, with its gradient plus `direct`; writes those of the
    /// parameters.
    fn norm_backward(
        &self,
        memory: &mut Self::Memory,
        norm: &Self::Norm,
        task: NormGrad,
        c: usize,
        grads: Grads<Self>,
    ) -> Result<()>;
    /// Writes the gradient of an activation's input to `gx`, from its result.
    fn activate_backward(
        &self,
        memory: &mut Self::Memory,
        y: BufferId,
        gy: BufferId,
        activation: Activation,
        gx: BufferId,
    ) -> Result<()>;
    /// Writes the gradient of max pooling's input, an activation of this shape, plus `other`, to `gx`. The first of a
    /// window's largest values gets the gradient of its result.
    fn max_pool_backward(
        &self,
        memory: &mut Self::Memory,
        x: Source<Self>,
        window: Window,
        shape: [usize; 4],
        grad: MapGrad,
    ) -> Result<()>;
    /// Writes the gradient of the input of upsampling by a factor, an activation of this shape, plus `other`, to `gx`.
    fn upsample_backward(
        &self,
        memory: &mut Self::Memory,
        factor: usize,
        shape: [usize; 4],
        grad: MapGrad,
    ) -> Result<()>;
    /// Writes the channels `[first, all, c]`, `c` of all of them from the first one on, plus `other`, to `gx`. The
    /// numbers leave out the channels that the device adds.
    fn concat_backward(&self, memory: &mut Self::Memory, channels: [usize; 3], grad: MapGrad) -> Result<()>;
    /// Writes the gradients of a fully connected layer; may overwrite `flat`.
    fn full_backward(
        &self,
        memory: &mut Self::Memory,
        task: FullGrad<Self>,
        weight: Part<Self>,
        grads: Grads<Self>,
    ) -> Result<()>;

    /// Returns how each pass of these convolutions runs, after running each once; empty where there is no choice.
    fn convolutions(&self, _convs: &[ConvShape]) -> Result<Vec<ConvolutionPass>> {
        Ok(Vec::new())
    }
}

/// Sizes of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Shape of the input, `(n, h, w, c)`.
    pub x: [usize; 4],
    /// Shape of the filter in a checkpoint, `(co, c / groups, kh, kw)`.
    pub w: [usize; 4],
    /// Stride, padding, groups.
    pub config: ConvConfig,
}

/// A filter of 8-bit integers, and the types of what its convolution reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct Int8Filter<'a> {
    /// The filter.
    pub weight: &'a Int8Weight,
    /// Quantisation of the input.
    pub input: Affine,
    /// Whether the input's buffer holds bytes; else they are made while it is read.
    pub reads_bytes: bool,
    /// Quantisation of the result, if its buffer holds bytes.
    pub output: Option<Affine>,
}

/// Conversion of 8-bit values, scaled to `[0, 1]`: `(x - mean) / std`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Subtracted first.
    pub mean: f32,
    /// Divisor.
    pub std: f32,
    /// Whether the network's first channel is blue.
    pub is_bgr: bool,
}

/// A buffer, and the norm that it is read through.
#[derive(Debug)]
pub struct Source<'a, B: Kernels> {
    /// The values.
    pub buffer: BufferId,
    /// None reads them unchanged.
    pub norm: Option<&'a B::Norm>,
}

impl<B: Kernels> Clone for Source<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Kernels> Copy for Source<'_, B> {}

/// Sums over the pixels of each image and channel.
#[derive(Debug)]
pub struct Sums<'a, B: Kernels> {
    /// First factor, or what is summed.
    pub x: Source<'a, B>,
    /// Second factor of the products that are summed, if there is one.
    pub with: Option<BufferId>,
    /// Factor of the sums.
    pub factor: f32,
}

/// `x * by * factor + plus`.
#[derive(Debug)]
pub struct Scale<'a, B: Kernels> {
    /// First side of the product; none is 1.
    pub x: Option<Source<'a, B>>,
    /// One number per image and channel.
    pub by: BufferId,
    /// Factor of all products.
    pub factor: f32,
    /// Second side of the sum, if there is one.
    pub plus: Option<Source<'a, B>>,
}

/// Elements of an array of parameters.
#[derive(Debug)]
pub struct Part<'a, B: Backend> {
    /// The array.
    pub array: &'a B::Array,
    /// The elements.
    pub range: Range<usize>,
}

/// A convolution's filter.
#[derive(Debug)]
pub enum Weight<'a, B: Kernels> {
    /// As it is trained.
    Trained(Part<'a, B>),
    /// Prepared for inference.
    Prepared(&'a B::Filter),
}

/// Place of a parameter: whether it is in the fixed array, not the trained one, and its elements.
#[derive(Clone, Debug)]
pub struct Place {
    /// Whether the parameter is not trained.
    pub is_fixed: bool,
    /// Its elements.
    pub range: Range<usize>,
}

/// Parameters of batch norm and PReLU.
#[derive(Debug)]
pub struct NormParams<'a, B: Backend> {
    /// Trained parameters.
    pub trained: &'a B::Array,
    /// Other parameters, and the running statistics.
    pub fixed: &'a mut B::Array,
    /// Batch norm's weight.
    pub weight: Place,
    /// Batch norm's bias.
    pub bias: Place,
    /// PReLU's slopes.
    pub slope: Option<Place>,
    /// Running mean in `fixed`.
    pub mean: Range<usize>,
    /// Running variance in `fixed`.
    pub var: Range<usize>,
}

/// Statistics that a norm uses.
#[derive(Clone, Copy, Debug)]
pub enum Statistics<'a> {
    /// Statistics of the batch.
    OfBatch,
    /// Statistics of the batches of all ranks, which have equal sizes.
    OfRanks(&'a Ranks),
    /// Running statistics.
    Running,
}

/// Gradients of a layer's parameters to write: a place in the array, or none if the parameter is not trained.
#[derive(Debug)]
pub struct Grads<'a, B: Backend> {
    /// Gradients of all trained parameters.
    pub array: &'a mut B::Array,
    /// The weight's.
    pub weight: Option<Range<usize>>,
    /// The bias's.
    pub bias: Option<Range<usize>>,
    /// The slope's.
    pub slope: Option<Range<usize>>,
}

/// Buffers of the backward pass of a product, pooling, upsampling or concatenation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapGrad {
    /// Gradient of the result.
    pub gy: BufferId,
    /// Gradient that reaches the input by other paths.
    pub other: Option<BufferId>,
    /// Gradient of the input, which is written.
    pub gx: BufferId,
}

impl MapGrad {
    /// Buffers that are read.
    pub fn read(&self) -> impl Iterator<Item = BufferId> {
        [self.gy].into_iter().chain(self.other)
    }
}

/// Buffers of a norm's backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NormGrad {
    /// Values before the norm.
    pub x: BufferId,
    /// Gradient after the norm.
    pub gy: BufferId,
    /// Gradient that reaches the values by other paths.
    pub direct: Option<BufferId>,
}

/// Buffers of a fully connected layer's backward pass.
#[derive(Debug)]
pub struct FullGrad<'a, B: Kernels> {
    /// Flattened input, as [`Kernels::flatten`] wrote it.
    pub flat: BufferId,
    /// Gradient of the result.
    pub gy: BufferId,
    /// Gradient of the input, if it is needed.
    pub gx: Option<BufferId>,
    /// Shape of the input.
    pub shape: [usize; 4],
    /// Number of outputs.
    pub outputs: usize,
    /// Factors of dropout.
    pub mask: Option<&'a B::Mask>,
}
