//! PReLU over rows of channels.

use candle_core::WithDType;
use rayon::prelude::*;

use crate::ops::rows::{block_len, join};
use crate::ops::simd::simd;
use crate::parallel::{self, Each};

pub(super) fn forward<T: WithDType>(x: &[T], slope: &[T]) -> Vec<T> {
    let mut y = vec![T::zero(); x.len()];
    let len = block_len(slope.len());
    y.par_chunks_mut(len).zip(x.par_chunks(len)).each(&|(y, x)| {
        simd(|| {
            for (y, x) in y.chunks_exact_mut(slope.len()).zip(x.chunks_exact(slope.len())) {
                for ((y, &x), &a) in y.iter_mut().zip(x).zip(slope) {
                    *y = if x > T::zero() { x } else { a * x };
                }
            }
        });
    });
    y
}

pub(super) fn grad_x<T: WithDType>(x: &[T], slope: &[T], gy: &[T]) -> Vec<T> {
    let mut gx = vec![T::zero(); x.len()];
    let channels = slope.len();
    let len = block_len(channels);
    gx.par_chunks_mut(len).zip(x.par_chunks(len).zip(gy.par_chunks(len))).each(&|(gx, (x, gy))| {
        let rows = gx.chunks_exact_mut(channels).zip(x.chunks_exact(channels).zip(gy.chunks_exact(channels)));
        simd(|| {
            for (gx, (x, gy)) in rows {
                for (((gx, &x), &gy), &a) in gx.iter_mut().zip(x).zip(gy).zip(slope) {
                    *gx = if x > T::zero() { gy } else { a * gy };
                }
            }
        });
    });
    gx
}

/// Returns the sum of `gy * min(x, 0)` per channel; blocks are joined in their order, in f64.
pub(super) fn grad_slope<T: WithDType>(x: &[T], gy: &[T], channels: usize) -> Vec<T> {
    let len = block_len(channels);
    let blocks: Vec<(&[T], &[T])> = x.chunks(len).zip(gy.chunks(len)).collect();
    let blocks = parallel::map(blocks.len(), |block| {
        let (x, gy) = blocks[block];
        let mut sum = vec![T::zero(); channels];
        simd(|| {
            for (x, gy) in x.chunks_exact(channels).zip(gy.chunks_exact(channels)) {
                for ((sum, &x), &gy) in sum.iter_mut().zip(x).zip(gy) {
                    *sum += if x > T::zero() { T::zero() } else { gy * x };
                }
            }
        });
        sum
    });
    join(&blocks, channels).into_iter().map(T::from_f64).collect()
}
