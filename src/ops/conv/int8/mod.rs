//! Convolutions of 8-bit integers: activations are unsigned with a zero point for the tensor, weights signed with a
//! scale for each output channel (Jacob et al., CVPR 2018, without their rounding of multipliers).
//!
//! ```text
//! x = s_x (q_x - z_x)     w = s_w q_w     sum = Σ (q_x - z_x) q_w     y = s_x s_w sum
//! ```
//!
//! Sums are exact, so results have the same bits whatever the number of threads, and differ between vector instructions
//! only by the rounding of what is done with a sum.

mod affine;
mod dense;
mod depthwise;
mod finish;
mod product;
mod weight;

use candle_core::{Result, Shape, bail};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

pub use self::affine::Affine;
use self::finish::{Finish, Maps};
use self::product::{Kind, Packed};
pub use self::weight::Int8Weight;
use super::{ConvConfig, Dims, Prologue};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::dispatch;
use crate::parallel::Each;

/// Largest number of products of a sum: with more, sums of 32 bits could overflow.
const MAX_PRODUCTS: usize = i32::MAX as usize / (255 * 127);
/// Elements that a worker thread gathers or quantises at a time.
const PIECE_ELEMENTS: usize = 48 * 1024;
/// Channels that are finished together.
const LANES: usize = 16;

/// What a convolution reads, channels last, `(n, h, w, c)`.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Quantised values.
    Bytes(&'a [u8]),
    /// Values that it quantises while it reads them.
    Floats(&'a [f32]),
}

/// What a convolution writes, channels last, `(n, ho, wo, co)`.
#[derive(Debug)]
pub enum Output<'a> {
    /// Quantised values, of a convolution with [`Int8Conv::into_bytes`].
    Bytes(&'a mut [u8]),
    /// Values.
    Floats(&'a mut [f32]),
}

/// A filter in the order in which it is read.
#[derive(Clone, Debug)]
enum Filter {
    Dense(Kind, Packed),
    Depthwise(depthwise::Taps),
}

/// A convolution with quantised weights, and what follows it.
#[derive(Clone, Debug)]
pub struct Int8Conv {
    /// Shape of the weight.
    w: [usize; 4],
    config: ConvConfig,
    input: Affine,
    filter: Filter,
    maps: Maps,
    output: Option<Affine>,
}

impl Int8Conv {
    /// Returns a convolution with a dense filter, or a depthwise one of one input channel for each output channel, over
    /// input quantised by `input`.
    ///
    /// # Errors
    /// When the groups have several channels, or a sum could overflow.
    pub fn new(weight: &Int8Weight, config: ConvConfig, input: Affine) -> Result<Self> {
        Self::with(weight, config, input, Kind::of_machine())
    }

    fn with(weight: &Int8Weight, config: ConvConfig, input: Affine, kind: Kind) -> Result<Self> {
        let w @ [co, ..] = weight.shape();
        if !Self::fits(w, config) {
            bail!("int8 convolution: weight {w:?} in {} groups", config.groups);
        }
        let filter = if config.groups > 1 {
            Filter::Depthwise(depthwise::Taps::new(weight))
        } else {
            Filter::Dense(kind, dense::packed(kind, weight, input))
        };
        let scale = weight.scales().iter().map(|scale| scale * input.scale);
        Ok(Self { w, config, input, filter, maps: Maps::new(scale, co), output: None })
    }

    /// Whether there are kernels for a weight of shape `(co, c / groups, kh, kw)`.
    pub fn fits([co, lanes, kh, kw]: [usize; 4], config: ConvConfig) -> bool {
        let has_groups_of_one = lanes == 1 && config.groups == co;
        (config.groups == 1 || has_groups_of_one) && lanes * kh * kw <= MAX_PRODUCTS
    }

    /// Returns the convolution with a map of its results, per output channel: `z = scale * y + shift`, then `z` above
    /// zero and `slope * z` elsewhere.
    ///
    /// # Panics
    /// When a length is not the number of output channels, or the results are bytes.
    #[must_use]
    pub fn followed_by(self, affine: [&[f32]; 2], slope: Option<&[f32]>) -> Self {
        assert!(self.output.is_none(), "what follows comes before quantisation");
        Self { maps: self.maps.followed_by(affine, slope), ..self }
    }

    /// Returns the convolution with quantised results.
    #[must_use]
    pub fn into_bytes(self, output: Affine) -> Self {
        Self { maps: self.maps.in_steps_of(output.scale), output: Some(output), ..self }
    }

    /// Quantisation of the results, if they are.
    pub fn output(&self) -> Option<Affine> {
        self.output
    }

    /// Returns the shape of the result for an input of shape `(n, h, w, c)`.
    ///
    /// # Errors
    /// When it does not fit the weight.
    pub fn output_shape(&self, x: [usize; 4]) -> Result<[usize; 4]> {
        super::output_shape(x, self.w, self.config)
    }

    /// Computes the convolution of `x`, of shape `(n, h, w, c)`.
    ///
    /// # Errors
    /// When a length or the type of the result does not fit.
    pub fn run(&self, x: Input, shape: [usize; 4], y: Output) -> Result<()> {
        self.run_between(x, Prologue::default(), shape, None, y)
    }

    /// Like [`Self::run`], of floats that `prologue` is applied to, plus `residual`, of the shape of the result, which
    /// is added last to floats.
    pub(crate) fn run_between(
        &self,
        x: Input,
        prologue: Prologue,
        shape: [usize; 4],
        residual: Option<&[f32]>,
        y: Output,
    ) -> Result<()> {
        let d = Dims::new(&Shape::from(&shape), &Shape::from(&self.w), self.config)?;
        let (len, y_len) = (d.n * d.h * d.w * d.c, d.pixels() * d.co);
        let found = match x {
            Input::Bytes(x) => x.len(),
            Input::Floats(x) => x.len(),
        };
        let found_y = match &y {
            Output::Bytes(y) => y.len(),
            Output::Floats(y) => y.len(),
        };
        let has_residual = residual.is_some_and(|residual| residual.len() != y_len || self.output.is_some());
        if found != len || found_y != y_len || has_residual || !prologue.fits(d.c) {
            bail!("int8 convolution: {found} inputs and {found_y} outputs of {d:?}");
        }
        // Each value is used several times: it is quantised once.
        if let (Input::Floats(values), true) = (x, d.kh * d.kw > 1) {
            return with_scratch(len.div_ceil(4), |bytes| {
                let bytes = &mut bytemuck::cast_slice_mut::<f32, u8>(bytes)[..len];
                self.quantise(values, prologue, d.c, bytes);
                self.run_between(Input::Bytes(bytes), Prologue::default(), shape, residual, y)
            });
        }
        let x = Source { x, prologue };
        match (y, self.output) {
            (Output::Floats(y), None) => self.fill(x, d, Finish::new(&self.maps, residual, None), y),
            (Output::Bytes(y), Some(affine)) => self.fill(x, d, Finish::new(&self.maps, None, Some(affine.zero)), y),
            (_, output) => bail!("int8 convolution: expected results of {output:?}, found the other type"),
        }
        Ok(())
    }

    fn fill<T: finish::Element>(&self, x: Source, d: Dims, finish: Finish, y: &mut [T]) {
        match &self.filter {
            Filter::Dense(kind, packed) => {
                dense::fill(*kind, dense::Job { packed, input: self.input, x, d, finish }, y);
            }
            Filter::Depthwise(taps) => depthwise::fill(taps, self.input, x, d, finish, y),
        }
    }

    /// Writes the bytes of values that a prologue is applied to.
    fn quantise(&self, values: &[f32], prologue: Prologue, c: usize, bytes: &mut [u8]) {
        let piece = (PIECE_ELEMENTS / c).max(1) * c;
        bytes.par_chunks_mut(piece).zip(values.par_chunks(piece)).each(&|(bytes, values)| {
            dispatch(Quantise { affine: self.input, values, prologue, c, bytes });
        });
    }
}

/// Writes the bytes of pixels of `c` values.
struct Quantise<'a> {
    affine: Affine,
    values: &'a [f32],
    prologue: Prologue<'a>,
    c: usize,
    bytes: &'a mut [u8],
}

impl WithSimd for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { affine, values, prologue, c, bytes } = self;
        for (bytes, values) in bytes.chunks_exact_mut(c).zip(values.chunks_exact(c)) {
            affine.quantise_all(values, prologue, bytes);
        }
    }
}

/// Values, and what is applied to them before they are quantised.
#[derive(Clone, Copy)]
struct Source<'a> {
    x: Input<'a>,
    prologue: Prologue<'a>,
}

impl Source<'_> {
    /// Writes the columns of the `c` channels of a pixel.
    #[inline(always)]
    fn pixel<C: product::Column>(&self, affine: Affine, pixel: usize, c: usize, columns: &mut [C]) {
        match self.x {
            Input::Bytes(x) => C::of_bytes(affine, &x[pixel * c..][..c], columns),
            Input::Floats(x) => affine.quantise_all(&x[pixel * c..][..c], self.prologue, columns),
        }
    }

    /// Writes the columns of `num` pixels of `c` channels from `first` on.
    #[inline(always)]
    fn pixels<C: product::Column>(&self, affine: Affine, first: usize, num: usize, c: usize, columns: &mut [C]) {
        match self.x {
            Input::Bytes(x) => C::of_bytes(affine, &x[first * c..][..num * c], columns),
            Input::Floats(_) => {
                for (i, columns) in columns.chunks_exact_mut(c).enumerate() {
                    self.pixel(affine, first + i, c, columns);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
