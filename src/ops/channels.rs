//! Passes of the fused engine over rows of channels between convolutions, in f32: batch norm with PReLU as one map per
//! channel, sums of two inputs, and the backward passes. Reductions run over blocks of a fixed number of rows and are
//! joined in f64 in the blocks' order, so they do not depend on the number of threads.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::batch_norm::Stats;
use super::conv::Prologue;
use super::lanes::{load, prelu, store};
use super::rows::block_len;
use super::simd::{dispatch, for_lanes};
use crate::dist::Ranks;
use crate::parallel::{self, Each};

/// Constants are repeated to at least this many elements, so that inner loops are long with few channels too.
const PERIOD: usize = 512;

/// Map per channel: `z = scale * x + shift`, then `z` above zero and `slope * z` elsewhere.
#[derive(Clone, Debug)]
pub struct Constants {
    /// Factor per channel.
    pub scale: Vec<f32>,
    /// Offset per channel.
    pub shift: Vec<f32>,
    /// Slope per channel; `None` without an activation.
    pub slope: Option<Vec<f32>>,
}

/// Values with the map that is applied when they are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen<'a> {
    /// Stored values, `(.., channels)`.
    pub x: &'a [f32],
    /// The map; `None` leaves the values as they are.
    pub constants: Option<&'a Constants>,
}

impl<'a> Seen<'a> {
    /// Returns the same map as the prologue of a convolution.
    pub fn prologue(&self) -> Prologue<'a> {
        let affine = |c: &'a Constants| Prologue { affine: Some([&c.scale, &c.shift]), slope: c.slope.as_deref() };
        self.constants.map(affine).unwrap_or_default()
    }
}

/// Constants repeated to [`period`] elements.
pub(super) struct Repeated {
    scale: Vec<f32>,
    shift: Vec<f32>,
    slope: Vec<f32>,
}

impl Repeated {
    pub(super) fn new(constants: Option<&Constants>, channels: usize) -> Self {
        let ones = || vec![1.0; period(channels)];
        // The kernels load all three without looking at their lengths.
        let fits = |c: &Constants| {
            [Some(&c.scale), Some(&c.shift), c.slope.as_ref()].into_iter().flatten().all(|c| c.len() == channels)
        };
        assert!(constants.is_none_or(fits), "constants of {channels} channels");
        match constants {
            None => Self { scale: ones(), shift: vec![0.0; period(channels)], slope: ones() },
            Some(c) => Self {
                scale: repeat(&c.scale),
                shift: repeat(&c.shift),
                slope: c.slope.as_ref().map_or_else(ones, |slope| repeat(slope)),
            },
        }
    }

    /// Number of elements of each constant.
    pub(super) fn period(&self) -> usize {
        self.scale.len()
    }
}

/// Number of elements that constants are repeated to: whole rows of `channels`, at least [`PERIOD`].
fn period(channels: usize) -> usize {
    channels * PERIOD.div_ceil(channels)
}

fn repeat(constants: &[f32]) -> Vec<f32> {
    constants.repeat(PERIOD.div_ceil(constants.len()))
}

/// Writes `x`, with its map applied, to `y`.
pub(crate) fn write(x: Seen, channels: usize, y: &mut [f32]) {
    assert_eq!(x.x.len(), y.len());
    let constants = Repeated::new(x.constants, channels);
    let (len, period) = (block_len(channels), constants.period());
    y.par_chunks_mut(len).zip(x.x.par_chunks(len)).each(&|(y, x)| {
        let x = Some(SeenBlock { x, constants: &constants });
        dispatch(MapBlock { x, by: None, plus: None, period, y });
    });
}

/// Writes the sum of `a` and `b`, each with its map applied, to `y`.
pub(crate) fn add(a: Seen, b: Seen, channels: usize, y: &mut [f32]) {
    assert!(a.x.len() == y.len() && b.x.len() == y.len(), "{} + {}", a.x.len(), b.x.len());
    let (of_a, of_b) = (Repeated::new(a.constants, channels), Repeated::new(b.constants, channels));
    let (len, period) = (block_len(channels), of_a.period());
    let sides = a.x.par_chunks(len).zip(b.x.par_chunks(len));
    y.par_chunks_mut(len).zip(sides).each(&|(y, (a, b))| {
        let (a, b) = (SeenBlock { x: a, constants: &of_a }, SeenBlock { x: b, constants: &of_b });
        dispatch(MapBlock { x: Some(a), by: None, plus: Some(b), period, y });
    });
}

/// Returns `z = scale * x + shift` above zero, `slope * z` elsewhere.
#[inline(always)]
pub(super) fn see(x: f32, constants: &Repeated, i: usize) -> f32 {
    let z = x * constants.scale[i] + constants.shift[i];
    if z > 0.0 { z } else { z * constants.slope[i] }
}

/// [`see`] for the vector of elements from `at` on.
///
/// # Safety
/// The vector lies within the constants.
#[inline(always)]
pub(super) unsafe fn see_lanes<S: Simd>(simd: S, x: S::f32s, constants: &Repeated, at: usize) -> S::f32s {
    // SAFETY: by the contract.
    unsafe {
        let (scale, shift) = (load::<S>(&constants.scale, at), load::<S>(&constants.shift, at));
        let z = simd.mul_add_e_f32s(x, scale, shift);
        prelu(simd, z, load::<S>(&constants.slope, at))
    }
}

/// Values with their map repeated for a block.
#[derive(Clone, Copy)]
pub(super) struct SeenBlock<'a> {
    pub x: &'a [f32],
    pub constants: &'a Repeated,
}

impl SeenBlock<'_> {
    /// `n` of the values, the first of which is the first of a period.
    #[inline(always)]
    fn part(self, first: usize, n: usize) -> Self {
        Self { x: &self.x[first..][..n], ..self }
    }
}

/// Writes `x * by + plus`, each side with its map applied; `x` and `by`, one factor per element of a period, are 1 if
/// not given, and `plus` is 0.
pub(super) struct MapBlock<'a> {
    pub x: Option<SeenBlock<'a>>,
    pub by: Option<&'a [f32]>,
    pub plus: Option<SeenBlock<'a>>,
    pub period: usize,
    pub y: &'a mut [f32],
}

impl WithSimd for MapBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, by, plus, period, y } = self;
        for side in [x, plus].into_iter().flatten() {
            assert!(side.x.len() == y.len() && side.constants.period() == period, "{} values", y.len());
        }
        assert!(by.is_none_or(|by| by.len() == period), "factors of a period");
        for first in (0..y.len()).step_by(period) {
            let n = period.min(y.len() - first);
            let [x, plus] = [x, plus].map(|side| side.map(|side| side.part(first, n)));
            let y = &mut y[first..][..n];
            for_lanes!(
                n,
                S,
                |at| {
                    // SAFETY: the vector is in the rows, the constants and the factors.
                    unsafe {
                        let see = |side: SeenBlock| see_lanes(simd, load::<S>(side.x, at), side.constants, at);
                        let mut value = match (x, by) {
                            (Some(x), Some(by)) => simd.mul_f32s(see(x), load::<S>(by, at)),
                            (Some(x), None) => see(x),
                            (None, Some(by)) => load::<S>(by, at),
                            (None, None) => simd.splat_f32s(1.0),
                        };
                        if let Some(plus) = plus {
                            value = simd.add_f32s(value, see(plus));
                        }
                        store::<S>(y, at, value);
                    }
                },
                |i| {
                    let seen = |side: SeenBlock| see(side.x[i], side.constants, i);
                    y[i] = x.map_or(1.0, seen) * by.map_or(1.0, |by| by[i]) + plus.map_or(0.0, seen);
                }
            );
        }
    }
}

/// Batch norm, with PReLU if there are slopes, and everything that its backward pass needs.
#[derive(Clone, Debug)]
pub struct Normalised {
    mean: Vec<f64>,
    inv_std: Vec<f64>,
    constants: Constants,
    /// Whether the statistics are the batch's own, so that the gradient flows through them.
    of_batch: bool,
    /// The ranks whose batches the statistics are of.
    ranks: Ranks,
}

/// Gradients of the parameters of batch norm and PReLU.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NormGrads {
    /// Gradient of batch norm's weight.
    pub weight: Vec<f64>,
    /// Gradient of batch norm's bias.
    pub bias: Vec<f64>,
    /// Gradient of PReLU's slope; zeros without PReLU.
    pub slope: Vec<f64>,
}

impl Normalised {
    /// Returns the map `(x - mean) / sqrt(var + eps) * weight + bias`, followed by PReLU if there are slopes.
    pub fn new(stats: &Stats, of_batch: bool, eps: f64, [weight, bias]: [&[f32]; 2], slope: Option<&[f32]>) -> Self {
        let inv_std: Vec<f64> = stats.var.iter().map(|var| 1.0 / (var + eps).sqrt()).collect();
        let scale = |c: usize| f64::from(weight[c]) * inv_std[c];
        let shift = |c: usize| f64::from(bias[c]) - stats.mean[c] * scale(c);
        let constants = Constants {
            scale: (0..weight.len()).map(|c| scale(c) as f32).collect(),
            shift: (0..weight.len()).map(|c| shift(c) as f32).collect(),
            slope: slope.map(<[f32]>::to_vec),
        };
        Self { mean: stats.mean.clone(), inv_std, constants, of_batch, ranks: Ranks::default() }
    }

    /// Returns the same norm with statistics of the batches of all ranks.
    pub fn with_ranks(self, ranks: &Ranks) -> Self {
        Self { ranks: ranks.clone(), ..self }
    }

    /// Returns a norm without a backward pass.
    pub fn constant(constants: Constants) -> Self {
        Self { mean: Vec::new(), inv_std: Vec::new(), constants, of_batch: false, ranks: Ranks::default() }
    }

    /// Returns the map of the forward pass.
    pub fn constants(&self) -> &Constants {
        &self.constants
    }

    /// Returns the gradients of the parameters from the input and the gradient of the output.
    pub fn param_grads(&self, x: &[f32], gy: &[f32]) -> NormGrads {
        assert_eq!(x.len(), gy.len());
        let channels = self.mean.len();
        let constants = Repeated::new(Some(&self.constants), channels);
        let mean = repeat(&self.mean.iter().map(|&m| m as f32).collect::<Vec<_>>());
        let (len, period) = (block_len(channels), period(channels));
        let blocks: Vec<(&[f32], &[f32])> = x.chunks(len).zip(gy.chunks(len)).collect();
        let blocks = parallel::map(blocks.len(), |block| {
            let (x, gy) = blocks[block];
            let mut sums = [vec![0f32; period], vec![0f32; period], vec![0f32; period]];
            dispatch(SumsBlock {
                x,
                gy,
                mean: &mean,
                constants: &constants,
                has_slope: self.constants.slope.is_some(),
                sums: &mut sums,
            });
            sums
        });
        let mut grads =
            NormGrads { weight: vec![0.0; channels], bias: vec![0.0; channels], slope: vec![0.0; channels] };
        for [of_gy, of_x, of_slope] in &blocks {
            let totals = [(&mut grads.bias, of_gy), (&mut grads.weight, of_x), (&mut grads.slope, of_slope)];
            for (total, sums) in totals {
                for sums in sums.chunks_exact(channels) {
                    total.iter_mut().zip(sums).for_each(|(total, sum)| *total += f64::from(*sum));
                }
            }
        }
        grads.weight.iter_mut().zip(&self.inv_std).for_each(|(weight, inv_std)| *weight *= inv_std);
        grads
    }

    /// Returns the gradients of the parameters on all ranks that share the statistics: what the gradient of the input
    /// needs.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn over_ranks(&self, grads: NormGrads) -> crate::Result<NormGrads> {
        if self.ranks.is_single() {
            return Ok(grads);
        }
        let mut both = [&grads.weight[..], &grads.bias].concat();
        self.ranks.total(&mut both)?;
        let bias = both.split_off(grads.weight.len());
        Ok(NormGrads { weight: both, bias, ..grads })
    }

    /// Overwrites the input `x` with its gradient plus `other`, the gradient from the other uses of the input;
    /// `grads` are [`Self::over_ranks`].
    pub fn grad_x(&self, x: &mut [f32], gy: &[f32], grads: &NormGrads, other: Option<&[f32]>) {
        assert!(x.len() == gy.len() && other.is_none_or(|other| other.len() == x.len()));
        let channels = self.mean.len();
        let count = (self.ranks.size() * x.len() / channels) as f64;
        let through_stats = |c: usize| {
            let factor = if self.of_batch { -f64::from(self.constants.scale[c]) / count } else { 0.0 };
            [factor * grads.bias[c], factor * self.inv_std[c] * grads.weight[c]]
        };
        let repeated = |f: &dyn Fn(usize) -> f64| repeat(&(0..channels).map(|c| f(c) as f32).collect::<Vec<_>>());
        let (mean, constant) = (repeated(&|c| self.mean[c]), repeated(&|c| through_stats(c)[0]));
        let linear = repeated(&|c| through_stats(c)[1]);
        let constants = Repeated::new(Some(&self.constants), channels);
        let terms = [mean, linear, constant];
        let len = block_len(channels);
        let has_slope = self.constants.slope.is_some();
        x.par_chunks_mut(len).zip(gy.par_chunks(len)).enumerate().each(&|(block, (x, gy))| {
            let other = other.map(|other| &other[block * len..][..x.len()]);
            dispatch(GradBlock { x, gy, terms: &terms, constants: &constants, has_slope, other });
        });
    }
}

/// Adds to the sums of `g`, of `g * (x - mean)` and of the slope's gradient, where `g` is the gradient before the
/// PReLU.
struct SumsBlock<'a> {
    x: &'a [f32],
    gy: &'a [f32],
    mean: &'a [f32],
    constants: &'a Repeated,
    has_slope: bool,
    sums: &'a mut [Vec<f32>; 3],
}

impl WithSimd for SumsBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, gy, mean, constants, has_slope, sums } = self;
        let period = mean.len();
        let [of_gy, of_x, of_slope] = sums;
        assert!(x.len() == gy.len() && constants.scale.len() == period, "{} values", x.len());
        assert!([&of_gy, &of_x, &of_slope].iter().all(|sums| sums.len() == period), "sums of a period");
        let zero = simd.splat_f32s(0.0);
        for first in (0..x.len()).step_by(period) {
            let n = period.min(x.len() - first);
            let (x, gy) = (&x[first..][..n], &gy[first..][..n]);
            for_lanes!(
                n,
                S,
                |at| {
                    // SAFETY: the vector is in the rows, the constants and the sums.
                    unsafe {
                        let (x, mut g) = (load::<S>(x, at), load::<S>(gy, at));
                        if has_slope {
                            let (scale, shift) = (load::<S>(&constants.scale, at), load::<S>(&constants.shift, at));
                            let z = simd.mul_add_e_f32s(x, scale, shift);
                            let is_above = simd.greater_than_f32s(z, zero);
                            let below = simd.select_f32s(is_above, zero, z);
                            let of_z = simd.mul_add_e_f32s(g, below, load::<S>(of_slope, at));
                            store::<S>(of_slope, at, of_z);
                            let sloped = simd.mul_f32s(g, load::<S>(&constants.slope, at));
                            g = simd.select_f32s(is_above, g, sloped);
                        }
                        let sum = simd.add_f32s(load::<S>(of_gy, at), g);
                        store::<S>(of_gy, at, sum);
                        let centred = simd.sub_f32s(x, load::<S>(mean, at));
                        let sum = simd.mul_add_e_f32s(g, centred, load::<S>(of_x, at));
                        store::<S>(of_x, at, sum);
                    }
                },
                |i| {
                    let mut g = gy[i];
                    if has_slope {
                        let z = x[i] * constants.scale[i] + constants.shift[i];
                        of_slope[i] += if z > 0.0 { 0.0 } else { g * z };
                        g = if z > 0.0 { g } else { g * constants.slope[i] };
                    }
                    of_gy[i] += g;
                    of_x[i] += g * (x[i] - mean[i]);
                }
            );
        }
    }
}

/// Writes `x = g * scale + (x - mean) * linear + constant + other`, where `g` is the gradient before the PReLU and
/// `terms` are `mean`, `linear` and `constant`.
struct GradBlock<'a> {
    x: &'a mut [f32],
    gy: &'a [f32],
    terms: &'a [Vec<f32>; 3],
    constants: &'a Repeated,
    has_slope: bool,
    other: Option<&'a [f32]>,
}

impl WithSimd for GradBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, gy, terms, constants, has_slope, other } = self;
        let [mean, linear, constant] = terms;
        let period = mean.len();
        assert!(x.len() == gy.len() && constants.scale.len() == period, "{} values", x.len());
        assert!(linear.len() == period && constant.len() == period, "terms of a period");
        assert!(other.is_none_or(|other| other.len() == x.len()), "{} values", x.len());
        let zero = simd.splat_f32s(0.0);
        for first in (0..gy.len()).step_by(period) {
            let n = period.min(gy.len() - first);
            let (x, gy, other) = (&mut x[first..][..n], &gy[first..][..n], other.map(|other| &other[first..][..n]));
            for_lanes!(
                n,
                S,
                |at| {
                    // SAFETY: the vector is in the rows, the constants and the terms.
                    unsafe {
                        let (value, mut g) = (load::<S>(x, at), load::<S>(gy, at));
                        let scale = load::<S>(&constants.scale, at);
                        if has_slope {
                            let z = simd.mul_add_e_f32s(value, scale, load::<S>(&constants.shift, at));
                            let sloped = simd.mul_f32s(g, load::<S>(&constants.slope, at));
                            g = simd.select_f32s(simd.greater_than_f32s(z, zero), g, sloped);
                        }
                        let centred = simd.sub_f32s(value, load::<S>(mean, at));
                        let mut y = simd.mul_add_e_f32s(centred, load::<S>(linear, at), load::<S>(constant, at));
                        y = simd.mul_add_e_f32s(g, scale, y);
                        if let Some(other) = other {
                            y = simd.add_f32s(y, load::<S>(other, at));
                        }
                        store::<S>(x, at, y);
                    }
                },
                |i| {
                    let mut g = gy[i];
                    if has_slope {
                        let z = x[i] * constants.scale[i] + constants.shift[i];
                        g = if z > 0.0 { g } else { g * constants.slope[i] };
                    }
                    let y = g * constants.scale[i] + (x[i] - mean[i]) * linear[i] + constant[i];
                    x[i] = y + other.map_or(0.0, |other| other[i]);
                }
            );
        }
    }
}

/// Transposes `x: (n, c, hw)` to `y: (n, hw, c)`.
pub(crate) fn to_channels_last(x: &[f32], channels: usize, pixels: usize, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(channels * pixels), "{} values", x.len());
    let images = y.par_chunks_mut(channels * pixels).zip(x.par_chunks(channels * pixels));
    images.each(&|(y, x)| {
        y.par_chunks_mut(1024 * channels).enumerate().each(&|(piece, y)| {
            for (i, y) in y.chunks_exact_mut(channels).enumerate() {
                for (c, y) in y.iter_mut().enumerate() {
                    *y = x[c * pixels + piece * 1024 + i];
                }
            }
        });
    });
}

/// Applies the map of `x: (n, hw, c)` and transposes the result to `y: (n, c, hw)`.
pub(crate) fn to_channels_first(x: Seen, channels: usize, pixels: usize, y: &mut [f32]) {
    assert!(x.x.len() == y.len() && y.len().is_multiple_of(channels * pixels), "{} values", y.len());
    let constants = Repeated::new(x.constants, channels);
    let images = y.par_chunks_mut(channels * pixels).zip(x.x.par_chunks(channels * pixels));
    images.each(&|(y, x)| {
        for (c, y) in y.chunks_exact_mut(pixels).enumerate() {
            for (pixel, y) in y.iter_mut().enumerate() {
                *y = see(x[pixel * channels + c], &constants, c);
            }
        }
    });
}
