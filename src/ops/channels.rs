//! What the fused engine does to rows of channels between convolutions, in f32: batch norm with PReLU as one map per
//! channel, sums of two, and their backward. Reductions run over blocks of a fixed number of rows and are joined in f64
//! in the blocks' order, so they do not depend on the number of threads.

use rayon::prelude::*;

use super::batch_norm::{Stats, cpu};
use super::conv::Prologue;
use super::rows::block_len;
use super::simd::simd;

/// Elements that constants are repeated to at least: a long inner loop for few channels.
const PERIOD: usize = 512;

/// `z = scale * x + shift`, then `z` above zero and `slope * z` elsewhere, per channel.
#[derive(Clone, Debug)]
pub(crate) struct Constants {
    /// Factor per channel.
    pub scale: Vec<f32>,
    /// Added per channel.
    pub shift: Vec<f32>,
    /// Slope per channel; none for no activation.
    pub slope: Option<Vec<f32>>,
}

impl Constants {
    /// The same as a convolution applies while it loads.
    pub fn prologue(&self) -> Prologue<'_> {
        Prologue { affine: Some([&self.scale, &self.shift]), slope: self.slope.as_deref() }
    }
}

/// Values with what becomes of them when they are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen<'a> {
    /// `(.., channels)`.
    pub x: &'a [f32],
    /// None for the values as they are.
    pub constants: Option<&'a Constants>,
}

/// Constants repeated over whole rows.
struct Repeated {
    scale: Vec<f32>,
    shift: Vec<f32>,
    slope: Vec<f32>,
}

impl Repeated {
    fn new(constants: Option<&Constants>, channels: usize) -> Self {
        let ones = || vec![1.0; period(channels)];
        match constants {
            None => Self { scale: ones(), shift: vec![0.0; period(channels)], slope: ones() },
            Some(c) => Self {
                scale: repeat(&c.scale),
                shift: repeat(&c.shift),
                slope: c.slope.as_ref().map_or_else(ones, |slope| repeat(slope)),
            },
        }
    }
}

/// Elements of the rows that constants are repeated over.
fn period(channels: usize) -> usize {
    channels * PERIOD.div_ceil(channels)
}

fn repeat(constants: &[f32]) -> Vec<f32> {
    constants.repeat(PERIOD.div_ceil(constants.len()))
}

/// Returns the mean and biased variance per channel.
pub(crate) fn stats(x: &[f32], channels: usize) -> Stats {
    cpu::stats(x, channels)
}

/// Writes what is seen to `y`.
pub(crate) fn write(x: Seen, channels: usize, y: &mut [f32]) {
    assert_eq!(x.x.len(), y.len());
    let constants = Repeated::new(x.constants, channels);
    let len = block_len(channels);
    y.par_chunks_mut(len).zip(x.x.par_chunks(len)).for_each(|(y, x)| {
        simd(|| {
            for (y, x) in y.chunks_mut(period(channels)).zip(x.chunks(period(channels))) {
                let Repeated { scale, shift, slope } = &constants;
                for ((((y, x), scale), shift), slope) in y.iter_mut().zip(x).zip(scale).zip(shift).zip(slope) {
                    let z = x * scale + shift;
                    *y = if z > 0.0 { z } else { z * slope };
                }
            }
        });
    });
}

/// Writes the sum of two to `y`.
pub(crate) fn add(a: Seen, b: Seen, channels: usize, y: &mut [f32]) {
    assert!(a.x.len() == y.len() && b.x.len() == y.len(), "{} + {}", a.x.len(), b.x.len());
    let (of_a, of_b) = (Repeated::new(a.constants, channels), Repeated::new(b.constants, channels));
    let len = block_len(channels);
    y.par_chunks_mut(len).zip(a.x.par_chunks(len).zip(b.x.par_chunks(len))).for_each(|(y, (a, b))| {
        simd(|| {
            let period = period(channels);
            for (y, (a, b)) in y.chunks_mut(period).zip(a.chunks(period).zip(b.chunks(period))) {
                for i in 0..y.len().min(period) {
                    let z = a[i] * of_a.scale[i] + of_a.shift[i];
                    y[i] = if z > 0.0 { z } else { z * of_a.slope[i] };
                }
                for i in 0..y.len().min(period) {
                    let z = b[i] * of_b.scale[i] + of_b.shift[i];
                    y[i] += if z > 0.0 { z } else { z * of_b.slope[i] };
                }
            }
        });
    });
}

/// Batch norm, and PReLU if there are slopes, with all that its backward needs.
#[derive(Clone, Debug)]
pub(crate) struct Normalised {
    mean: Vec<f64>,
    inv_std: Vec<f64>,
    constants: Constants,
    /// Whether the statistics are those of the very batch, and the gradient flows through them.
    of_batch: bool,
}

/// The gradients of batch norm's and PReLU's parameters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NormGrads {
    /// Of batch norm's weight.
    pub weight: Vec<f64>,
    /// Of its bias.
    pub bias: Vec<f64>,
    /// Of PReLU's slope; zeros without one.
    pub slope: Vec<f64>,
}

impl Normalised {
    /// With `(x - mean) / sqrt(var + eps) * weight + bias`.
    pub fn new(
        stats: &Stats,
        of_batch: bool,
        eps: f64,
        [weight, bias]: [&[f32]; 2],
        slope: Option<&[f32]>,
    ) -> Self {
        let inv_std: Vec<f64> = stats.var.iter().map(|var| 1.0 / (var + eps).sqrt()).collect();
        let scale = |c: usize| f64::from(weight[c]) * inv_std[c];
        let shift = |c: usize| f64::from(bias[c]) - stats.mean[c] * scale(c);
        let constants = Constants {
            scale: (0..weight.len()).map(|c| scale(c) as f32).collect(),
            shift: (0..weight.len()).map(|c| shift(c) as f32).collect(),
            slope: slope.map(<[f32]>::to_vec),
        };
        Self { mean: stats.mean.clone(), inv_std, constants, of_batch }
    }

    /// What becomes of each value.
    pub fn constants(&self) -> &Constants {
        &self.constants
    }

    /// Returns the gradients of the parameters from the input and the gradient of the output.
    pub fn param_grads(&self, x: &[f32], gy: &[f32]) -> NormGrads {
        assert_eq!(x.len(), gy.len());
        let channels = self.mean.len();
        let Repeated { scale, shift, slope } = Repeated::new(Some(&self.constants), channels);
        let mean = repeat(&self.mean.iter().map(|&m| m as f32).collect::<Vec<_>>());
        let (len, period) = (block_len(channels), period(channels));
        let blocks: Vec<[Vec<f32>; 3]> = x
            .par_chunks(len)
            .zip(gy.par_chunks(len))
            .map(|(x, gy)| {
                let mut sums = [vec![0f32; period], vec![0f32; period], vec![0f32; period]];
                let [of_gy, of_x, of_slope] = &mut sums;
                let has_slope = self.constants.slope.is_some();
                simd(|| {
                    for (x, gy) in x.chunks(period).zip(gy.chunks(period)) {
                        let n = x.len();
                        let (of_gy, of_x, of_slope) = (&mut of_gy[..n], &mut of_x[..n], &mut of_slope[..n]);
                        let (gy, mean) = (&gy[..n], &mean[..n]);
                        if has_slope {
                            let (scale, shift, slope) = (&scale[..n], &shift[..n], &slope[..n]);
                            for i in 0..n {
                                let z = x[i] * scale[i] + shift[i];
                                let g = if z > 0.0 { gy[i] } else { gy[i] * slope[i] };
                                of_slope[i] += if z > 0.0 { 0.0 } else { gy[i] * z };
                                of_gy[i] += g;
                                of_x[i] += g * (x[i] - mean[i]);
                            }
                        } else {
                            for i in 0..n {
                                of_gy[i] += gy[i];
                                of_x[i] += gy[i] * (x[i] - mean[i]);
                            }
                        }
                    }
                });
                sums
            })
            .collect();
        let mut grads = NormGrads { weight: vec![0.0; channels], bias: vec![0.0; channels], slope: vec![0.0; channels] };
        for [of_gy, of_x, of_slope] in &blocks {
            let totals = [(&mut grads.bias, of_gy), (&mut grads.weight, of_x), (&mut grads.slope, of_slope)];
            for (total, sums) in totals {
                for (i, sum) in sums.iter().enumerate() {
                    total[i % channels] += f64::from(*sum);
                }
            }
        }
        grads.weight.iter_mut().zip(&self.inv_std).for_each(|(weight, inv_std)| *weight *= inv_std);
        grads
    }

    /// Overwrites the input `x` by its gradient, plus `other`, the gradient that reaches it by other ways.
    pub fn grad_x(&self, x: &mut [f32], gy: &[f32], grads: &NormGrads, other: Option<&[f32]>) {
        assert!(x.len() == gy.len() && other.is_none_or(|other| other.len() == x.len()));
        let channels = self.mean.len();
        let count = (x.len() / channels) as f64;
        let through_stats = |c: usize| {
            let factor = if self.of_batch { -f64::from(self.constants.scale[c]) / count } else { 0.0 };
            [factor * grads.bias[c], factor * self.inv_std[c] * grads.weight[c]]
        };
        let repeated = |f: &dyn Fn(usize) -> f64| repeat(&(0..channels).map(|c| f(c) as f32).collect::<Vec<_>>());
        let (mean, constant) = (repeated(&|c| self.mean[c]), repeated(&|c| through_stats(c)[0]));
        let linear = repeated(&|c| through_stats(c)[1]);
        let Repeated { scale, shift, slope } = Repeated::new(Some(&self.constants), channels);
        let (len, period) = (block_len(channels), period(channels));
        let has_slope = self.constants.slope.is_some();
        x.par_chunks_mut(len).zip(gy.par_chunks(len)).enumerate().for_each(|(block, (x, gy))| {
            let other = other.map(|other| &other[block * len..][..x.len()]);
            simd(|| {
                for (row, (x, gy)) in x.chunks_mut(period).zip(gy.chunks(period)).enumerate() {
                    let n = x.len();
                    let (gy, mean, constant, linear) = (&gy[..n], &mean[..n], &constant[..n], &linear[..n]);
                    let (scale, shift, slope) = (&scale[..n], &shift[..n], &slope[..n]);
                    let through = |i: usize, x: f32, g: f32| g * scale[i] + (x - mean[i]) * linear[i] + constant[i];
                    let sloped = |i: usize, x: f32| {
                        let z = x * scale[i] + shift[i];
                        if z > 0.0 { gy[i] } else { gy[i] * slope[i] }
                    };
                    match (has_slope, other.map(|other| &other[row * period..][..n])) {
                        (false, None) => (0..n).for_each(|i| x[i] = through(i, x[i], gy[i])),
                        (false, Some(other)) => (0..n).for_each(|i| x[i] = through(i, x[i], gy[i]) + other[i]),
                        (true, None) => (0..n).for_each(|i| x[i] = through(i, x[i], sloped(i, x[i]))),
                        (true, Some(other)) => {
                            (0..n).for_each(|i| x[i] = through(i, x[i], sloped(i, x[i])) + other[i]);
                        }
                    }
                }
            });
        });
    }
}

/// Moves `(n, c, hw)` to `(n, hw, c)`, as `constants` show it.
pub(crate) fn to_channels_last(x: &[f32], channels: usize, pixels: usize, y: &mut [f32]) {
    assert!(x.len() == y.len() && x.len().is_multiple_of(channels * pixels), "{} values", x.len());
    let images = y.par_chunks_mut(channels * pixels).zip(x.par_chunks(channels * pixels));
    images.for_each(|(y, x)| {
        y.par_chunks_mut(1024 * channels).enumerate().for_each(|(piece, y)| {
            for (i, y) in y.chunks_exact_mut(channels).enumerate() {
                for (c, y) in y.iter_mut().enumerate() {
                    *y = x[c * pixels + piece * 1024 + i];
                }
            }
        });
    });
}

/// Moves what is seen of `(n, hw, c)` to `(n, c, hw)`.
pub(crate) fn to_channels_first(x: Seen, channels: usize, pixels: usize, y: &mut [f32]) {
    assert!(x.x.len() == y.len() && y.len().is_multiple_of(channels * pixels), "{} values", y.len());
    let constants = Repeated::new(x.constants, channels);
    let Repeated { scale, shift, slope } = &constants;
    let images = y.par_chunks_mut(channels * pixels).zip(x.x.par_chunks(channels * pixels));
    images.for_each(|(y, x)| {
        for (c, y) in y.chunks_exact_mut(pixels).enumerate() {
            for (pixel, y) in y.iter_mut().enumerate() {
                let z = x[pixel * channels + c] * scale[c] + shift[c];
                *y = if z > 0.0 { z } else { z * slope[c] };
            }
        }
    });
}
