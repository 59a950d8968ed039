//! Batch norm over rows of channels. Reductions run over blocks of a fixed number of rows and are joined in f64 in the
//! blocks' order, so they do not depend on the number of threads.

use candle_core::WithDType;
use rayon::prelude::*;

use super::Stats;
use crate::ops::rows::{block_len, join};
use crate::ops::simd::simd;
use crate::parallel::{self, Each};

/// Mean and variance: two passes within a block, then the pairwise update of Chan et al. (1979) between blocks.
pub(crate) fn stats<T: WithDType>(x: &[T], channels: usize) -> Stats {
    let blocks: Vec<&[T]> = x.chunks(block_len(channels)).collect();
    let blocks = parallel::map(blocks.len(), |block| {
        let x = blocks[block];
        let count = T::from_f64((x.len() / channels) as f64);
        let mut mean = vec![T::zero(); channels];
        // Not a `zip`: the compiler may leave a call in the loop for every row.
        simd(|| {
            let mean = &mut mean[..channels];
            for row in x.chunks_exact(channels) {
                for c in 0..channels {
                    mean[c] += row[c];
                }
            }
        });
        mean.iter_mut().for_each(|m| *m /= count);
        let mut m2 = vec![T::zero(); channels];
        simd(|| {
            let (mean, m2) = (&mean[..channels], &mut m2[..channels]);
            for row in x.chunks_exact(channels) {
                for c in 0..channels {
                    let deviation = row[c] - mean[c];
                    m2[c] += deviation * deviation;
                }
            }
        });
        (mean, m2)
    });
    let (mut mean, mut m2, mut count) = (vec![0.0; channels], vec![0.0; channels], 0.0);
    let sizes = x.chunks(block_len(channels)).map(|x| (x.len() / channels) as f64);
    for ((block_mean, block_m2), n) in blocks.iter().zip(sizes) {
        let total = count + n;
        for c in 0..channels {
            let delta = block_mean[c].to_f64() - mean[c];
            mean[c] += delta * n / total;
            m2[c] += block_m2[c].to_f64() + delta * delta * count * n / total;
        }
        count = total;
    }
    let var = m2.iter().map(|m2| m2 / count).collect();
    Stats { mean, var }
}

/// `y = (x - mean) * scale + bias` per channel.
pub(super) struct Affine<T> {
    mean: Vec<T>,
    scale: Vec<T>,
    bias: Vec<T>,
}

impl<T: WithDType> Affine<T> {
    pub(super) fn new(mean: &[f64], inv_std: &[f64], weight: &[T], bias: &[T]) -> Self {
        let scale = weight.iter().zip(inv_std).map(|(w, s)| T::from_f64(w.to_f64() * s)).collect();
        Self { mean: mean.iter().map(|&m| T::from_f64(m)).collect(), scale, bias: bias.to_vec() }
    }

    pub(super) fn apply(&self, x: &[T]) -> Vec<T> {
        let channels = self.mean.len();
        let mut y = vec![T::zero(); x.len()];
        let len = block_len(channels);
        y.par_chunks_mut(len).zip(x.par_chunks(len)).each(&|(y, x)| {
            simd(|| {
                for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                    let constants = self.mean.iter().zip(&self.scale).zip(&self.bias);
                    for ((y, &x), ((&mean, &scale), &bias)) in y.iter_mut().zip(x).zip(constants) {
                        *y = (x - mean) * scale + bias;
                    }
                }
            });
        });
        y
    }
}

/// Returns `(2, C)`: per channel the sum of `gy`, then the sum of `gy * (x - mean) * inv_std`.
pub(super) fn grad_sums<T: WithDType>(x: &[T], gy: &[T], mean: &[f64], inv_std: &[f64]) -> Vec<T> {
    let channels = mean.len();
    let mean: Vec<T> = mean.iter().map(|&m| T::from_f64(m)).collect();
    let len = block_len(channels);
    let blocks: Vec<(&[T], &[T])> = x.chunks(len).zip(gy.chunks(len)).collect();
    let blocks = parallel::map(blocks.len(), |block| {
        let (x, gy) = blocks[block];
        let mut sums = vec![T::zero(); 2 * channels];
        let (sum, sum_x) = sums.split_at_mut(channels);
        simd(|| {
            for (x, gy) in x.chunks_exact(channels).zip(gy.chunks_exact(channels)) {
                let row = x.iter().zip(gy).zip(&mean);
                for ((sum, sum_x), ((&x, &gy), &mean)) in sum.iter_mut().zip(sum_x.iter_mut()).zip(row) {
                    *sum += gy;
                    *sum_x += gy * (x - mean);
                }
            }
        });
        sums
    });
    let mut total = join(&blocks, 2 * channels);
    total[channels..].iter_mut().zip(inv_std).for_each(|(sum, s)| *sum *= s);
    total.into_iter().map(T::from_f64).collect()
}

/// Terms of the input's gradient, `gy * scale + (x - mean) * slope + shift` per channel.
pub(super) struct GradTerms {
    mean: Vec<f64>,
    inv_std: Vec<f64>,
    scale: Vec<f64>,
    slope: Vec<f64>,
    shift: Vec<f64>,
}

impl GradTerms {
    /// Returns the terms for constant statistics.
    pub(super) fn new(mean: &[f64], inv_std: &[f64], weight: &[f64]) -> Self {
        let zeros = vec![0.0; mean.len()];
        Self {
            mean: mean.to_vec(),
            inv_std: inv_std.to_vec(),
            scale: weight.iter().zip(inv_std).map(|(w, s)| w * s).collect(),
            slope: zeros.clone(),
            shift: zeros,
        }
    }

    /// Adds the gradient through the batch's own mean and variance; `sums` are those of [`grad_sums`].
    pub(super) fn through_stats(&mut self, sums: &[f64], count: usize) {
        let (channels, count) = (self.mean.len(), count as f64);
        for c in 0..channels {
            self.shift[c] = -self.scale[c] * sums[c] / count;
            self.slope[c] = -self.scale[c] * self.inv_std[c] * sums[channels + c] / count;
        }
    }

    pub(super) fn apply<T: WithDType>(&self, x: &[T], gy: &[T]) -> Vec<T> {
        let channels = self.mean.len();
        let cast = |v: &[f64]| v.iter().map(|&v| T::from_f64(v)).collect::<Vec<T>>();
        let (mean, scale, slope, shift) = (cast(&self.mean), cast(&self.scale), cast(&self.slope), cast(&self.shift));
        let mut gx = vec![T::zero(); x.len()];
        let len = block_len(channels);
        gx.par_chunks_mut(len).zip(x.par_chunks(len).zip(gy.par_chunks(len))).each(&|(gx, (x, gy))| {
            let rows = gx.chunks_exact_mut(channels).zip(x.chunks_exact(channels).zip(gy.chunks_exact(channels)));
            let (mean, scale) = (&mean[..channels], &scale[..channels]);
            let (slope, shift) = (&slope[..channels], &shift[..channels]);
            simd(|| {
                for (gx, (x, gy)) in rows {
                    for c in 0..channels {
                        gx[c] = gy[c] * scale[c] + (x[c] - mean[c]) * slope[c] + shift[c];
                    }
                }
            });
        });
        gx
    }
}
