//! Convolutions of 8-bit integers: activations are unsigned with a zero point for the tensor, weights signed with a
//! scale for each output channel (Jacob et al., CVPR 2018, without their rounding of multipliers).
//!
//! ```text
//! x = s_x (q_x - z_x)     w = s_w q_w     sum = Σ (q_x - z_x) q_w     y = s_x s_w sum + bias
//! ```
//!
//! Sums are exact, so results have the same bits whatever the vector instructions and the number of threads.

mod affine;
mod depthwise;
mod product;
mod weight;

use candle_core::{Result, Shape, bail};
use rayon::prelude::*;

pub use self::affine::Affine;
use self::product::{ROWS, Tile, WIDTH};
pub use self::weight::Int8Weight;
use super::{ConvConfig, Dims};
use crate::ops::simd::simd;
use crate::parallel::Each;

/// Largest number of products of a sum: with more, sums of 32 bits could overflow.
const MAX_PRODUCTS: usize = i32::MAX as usize / (255 * 127);
/// Elements of patches that a worker thread gathers at a time.
const PIECE_ELEMENTS: usize = 48 * 1024;

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
    /// Quantised values.
    Bytes(&'a mut [u8], Affine),
    /// Values.
    Floats(&'a mut [f32]),
}

/// A convolution with quantised weights, and what follows it.
#[derive(Clone, Debug)]
pub struct Int8Conv {
    /// Shape of the weight.
    w: [usize; 4],
    config: ConvConfig,
    input: Affine,
    /// Weights in the order in which they are read.
    packed: Vec<i16>,
    /// What sums are multiplied by, per output channel.
    scale: Vec<f32>,
    bias: Vec<f32>,
    /// PReLU slopes per output channel.
    slope: Option<Vec<f32>>,
}

impl Int8Conv {
    /// Returns a convolution with a dense filter, or a depthwise one of one input channel for each output channel, over
    /// input quantised by `input`, plus `bias`, followed by PReLU with `slope`, both per output channel.
    ///
    /// # Errors
    /// When the lengths do not fit, the groups have several channels, or a sum could overflow.
    pub fn new(
        weight: &Int8Weight,
        config: ConvConfig,
        input: Affine,
        bias: Vec<f32>,
        slope: Option<Vec<f32>>,
    ) -> Result<Self> {
        let w @ [co, lanes, kh, kw] = weight.shape();
        if bias.len() != co || slope.as_ref().is_some_and(|slope| slope.len() != co) {
            bail!("int8 convolution: {co} outputs, {} biases, slopes {:?}", bias.len(), slope.map(|slope| slope.len()));
        }
        let is_depthwise = config.groups > 1;
        if is_depthwise && (lanes != 1 || config.groups != co) {
            bail!("int8 convolution: groups of {lanes} inputs and {co} outputs in {} groups", config.groups);
        }
        if lanes * kh * kw > MAX_PRODUCTS {
            bail!("int8 convolution: expected at most {MAX_PRODUCTS} products in a sum, found {}", lanes * kh * kw);
        }
        let packed = if is_depthwise { depthwise::pack(weight) } else { product::pack(weight) };
        let scale = weight.scales().iter().map(|scale| scale * input.scale).collect();
        Ok(Self { w, config, input, packed, scale, bias, slope })
    }

    /// Returns the shape of the result for an input of shape `(n, h, w, c)`.
    ///
    /// # Errors
    /// When it does not fit the weight.
    pub fn output_shape(&self, x: [usize; 4]) -> Result<[usize; 4]> {
        super::output_shape(x, self.w, self.config)
    }

    /// Computes the convolution of `x`, of shape `(n, h, w, c)`, plus `residual`, of the shape of the result, which is
    /// added last.
    ///
    /// # Errors
    /// When a length does not fit.
    pub fn run(&self, x: Input, shape: [usize; 4], residual: Option<&[f32]>, y: Output) -> Result<()> {
        let d = Dims::new(&Shape::from(&shape), &Shape::from(&self.w), self.config)?;
        let (len, y_len) = (d.n * d.h * d.w * d.c, d.pixels() * d.co);
        let found = match x {
            Input::Bytes(x) => x.len(),
            Input::Floats(x) => x.len(),
        };
        let found_y = match &y {
            Output::Bytes(y, _) => y.len(),
            Output::Floats(y) => y.len(),
        };
        if found != len || found_y != y_len || residual.is_some_and(|residual| residual.len() != y_len) {
            bail!("int8 convolution: {found} inputs and {found_y} outputs of {d:?}");
        }
        // Each value is used several times: it is quantised once.
        if let (Input::Floats(values), true) = (x, d.kh * d.kw > 1) {
            let mut bytes = vec![0; len];
            bytes.par_chunks_mut(PIECE_ELEMENTS).zip(values.par_chunks(PIECE_ELEMENTS)).each(&|(bytes, values)| {
                self.input.quantise_all(values, bytes);
            });
            return self.run(Input::Bytes(&bytes), shape, residual, y);
        }
        let finish = Finish { conv: self, residual };
        match y {
            Output::Floats(y) => self.pieces(x, d, y, |sums, first, y| finish.floats(sums, first, y)),
            Output::Bytes(y, affine) => self.pieces(x, d, y, |sums, first, y| finish.bytes(sums, affine, first, y)),
        }
        Ok(())
    }

    /// Computes pieces of whole pixels in parallel. `finish` gets the sums of [`WIDTH`] channels or fewer, the index of
    /// their first one in the output, and their place.
    fn pieces<T: Send>(&self, x: Input, d: Dims, y: &mut [T], finish: impl Fn(&[i32], usize, &mut [T]) + Copy + Sync) {
        if self.config.groups > 1 {
            return depthwise::rows(self, x, d, y, finish);
        }
        let k = d.patch().next_multiple_of(2);
        let least = d.pixels().div_ceil(2 * rayon::current_num_threads()).max(ROWS);
        let piece = (PIECE_ELEMENTS / k).clamp(ROWS, 128).min(least).next_multiple_of(ROWS);
        let tile = Tile::of_machine();
        y.par_chunks_mut(piece * d.co).enumerate().each(&|(i, y)| {
            let count = y.len() / d.co;
            let mut rows = vec![0i16; count.next_multiple_of(ROWS) * k];
            simd(|| self.gather(x, d, i * piece, &mut rows[..count * k], k));
            let mut sums = [[0; WIDTH]; ROWS];
            for (block, filter) in self.packed.chunks_exact(k * WIDTH).enumerate() {
                let channel = block * WIDTH;
                let channels = WIDTH.min(d.co - channel);
                for (group, rows) in rows.chunks_exact(ROWS * k).enumerate() {
                    tile.multiply(rows, filter, &mut sums);
                    for (row, sums) in sums.iter().enumerate().take(count - group * ROWS) {
                        let at = (group * ROWS + row) * d.co + channel;
                        let first = i * piece * d.co + at;
                        finish(&sums[..channels], first, &mut y[at..][..channels]);
                    }
                }
            }
        });
    }

    /// Writes the patches of the pixels from `first` on, less the zero point, to `rows`, of `k` values each.
    #[inline(always)]
    fn gather(&self, x: Input, d: Dims, first: usize, rows: &mut [i16], k: usize) {
        for (i, row) in rows.chunks_exact_mut(k).enumerate() {
            let pixel = first + i;
            let (image, oy, ox) = (pixel / (d.ho * d.wo), pixel / d.wo % d.ho, pixel % d.wo);
            for (tap, row) in row.chunks_exact_mut(d.c).enumerate().take(d.kh * d.kw) {
                // Coordinates above or left of the image wrap to values beyond it.
                let y = (oy * d.stride + tap / d.kw).wrapping_sub(d.padding);
                let column = (ox * d.stride + tap % d.kw).wrapping_sub(d.padding);
                if y >= d.h || column >= d.w {
                    row.fill(0);
                    continue;
                }
                let at = ((image * d.h + y) * d.w + column) * d.c;
                match x {
                    Input::Bytes(x) => self.input.centre(&x[at..][..d.c], row),
                    Input::Floats(x) => self.input.quantise_centred(&x[at..][..d.c], row),
                }
            }
        }
    }
}

/// What follows the sums.
#[derive(Clone, Copy)]
struct Finish<'a> {
    conv: &'a Int8Conv,
    residual: Option<&'a [f32]>,
}

impl Finish<'_> {
    /// Returns value `j` of the channels from `channel` on, which is at `at` in the output.
    #[inline(always)]
    fn value(&self, sum: i32, channel: usize, at: usize) -> f32 {
        let Int8Conv { scale, bias, slope, .. } = self.conv;
        let mut value = (sum as f32).mul_add(scale[channel], bias[channel]);
        if let Some(slope) = slope {
            value = if value > 0.0 { value } else { value * slope[channel] };
        }
        self.residual.map_or(value, |residual| value + residual[at])
    }

    fn floats(&self, sums: &[i32], first: usize, y: &mut [f32]) {
        let channel = first % self.conv.w[0];
        simd(|| {
            for (j, y) in y.iter_mut().enumerate() {
                *y = self.value(sums[j], channel + j, first + j);
            }
        });
    }

    fn bytes(&self, sums: &[i32], affine: Affine, first: usize, y: &mut [u8]) {
        let channel = first % self.conv.w[0];
        simd(|| {
            for (j, y) in y.iter_mut().enumerate() {
                *y = affine.quantise(self.value(sums[j], channel + j, first + j));
            }
        });
    }
}

#[cfg(test)]
mod tests;
