//! Convolution with several groups, computed directly; vector lanes run over the channels.
//!
//! With one input channel per group (depthwise) the inner loops are plain products of channel vectors. Groups of
//! several channels (MobileFaceNet has some of two) run through the same loops once per channel of the group, on a copy
//! of the input whose channels are arranged to match the outputs.

use std::borrow::Cow;

use candle_core::WithDType;
use rayon::prelude::*;

use super::Dims;
use crate::ops::simd::simd;
use crate::parallel::Each;

pub(super) fn forward<T: WithDType>(x: &[T], w: &[T], d: Dims, y: &mut [T]) {
    let w = tap_major(w, d);
    y.fill(T::zero());
    for lane in 0..d.lanes() {
        let x = d.spread(x, lane);
        y.par_chunks_mut(d.wo * d.co).enumerate().each(&|(row, y)| {
            let (image, oy) = (row / d.ho, row % d.ho);
            for_taps(oy, d, |ky, kx, iy, columns| {
                let w = &w[d.tap(ky, kx, lane)..][..d.co];
                simd(|| {
                    for ox in columns {
                        let x = &x[d.pixel(image, iy, ox * d.stride + kx - d.padding)..][..d.co];
                        let y = &mut y[ox * d.co..][..d.co];
                        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                            *y += x * w;
                        }
                    }
                });
            });
        });
    }
}

pub(super) fn grad_x<T: WithDType>(gy: &[T], w: &[T], d: Dims, gx: &mut [T]) {
    let w = tap_major(w, d);
    for lane in 0..d.lanes() {
        // Gradient per output channel, then summed over the channels of a group.
        let mut spread = vec![T::zero(); d.n * d.h * d.w * d.co];
        let images = spread.par_chunks_mut(d.h * d.w * d.co).zip(gy.par_chunks(d.ho * d.wo * d.co));
        images.each(&|(gx, gy)| {
            for oy in 0..d.ho {
                for_taps(oy, d, |ky, kx, iy, columns| {
                    let w = &w[d.tap(ky, kx, lane)..][..d.co];
                    simd(|| {
                        for ox in columns {
                            let gx = &mut gx[d.pixel(0, iy, ox * d.stride + kx - d.padding)..][..d.co];
                            let gy = &gy[(oy * d.wo + ox) * d.co..][..d.co];
                            for ((gx, &gy), &w) in gx.iter_mut().zip(gy).zip(w) {
                                *gx += gy * w;
                            }
                        }
                    });
                });
            }
        });
        if d.is_depthwise() {
            return gx.copy_from_slice(&spread);
        }
        let per_group = d.co / d.groups;
        gx.par_chunks_mut(d.c).zip(spread.par_chunks(d.co)).each(&|(gx, spread)| {
            for (gx, group) in gx.chunks_exact_mut(d.lanes()).zip(spread.chunks_exact(per_group)) {
                gx[lane] = group.iter().fold(T::zero(), |sum, &v| sum + v);
            }
        });
    }
}

pub(super) fn grad_w<T: WithDType>(x: &[T], gy: &[T], d: Dims, gw: &mut [T]) {
    let lanes = d.lanes();
    let size = d.kh * d.kw * lanes * d.co;
    // One sum per image, added in order: the same bits for any number of threads.
    let mut partial = vec![T::zero(); d.n * size];
    for lane in 0..lanes {
        let x = d.spread(x, lane);
        partial.par_chunks_mut(size).enumerate().each(&|(image, sum)| {
            for oy in 0..d.ho {
                for_taps(oy, d, |ky, kx, iy, columns| {
                    let sum = &mut sum[d.tap(ky, kx, lane)..][..d.co];
                    simd(|| {
                        for ox in columns {
                            let x = &x[d.pixel(image, iy, ox * d.stride + kx - d.padding)..][..d.co];
                            let gy = &gy[((image * d.ho + oy) * d.wo + ox) * d.co..][..d.co];
                            for ((sum, &x), &gy) in sum.iter_mut().zip(x).zip(gy) {
                                *sum += x * gy;
                            }
                        }
                    });
                });
            }
        });
    }
    let mut taps = vec![T::zero(); size];
    for sum in partial.chunks_exact(size) {
        taps.iter_mut().zip(sum).for_each(|(a, &b)| *a += b);
    }
    for (o, gw) in gw.chunks_exact_mut(lanes * d.kh * d.kw).enumerate() {
        for (i, gw) in gw.iter_mut().enumerate() {
            let (lane, tap) = (i / (d.kh * d.kw), i % (d.kh * d.kw));
            *gw = taps[(tap * lanes + lane) * d.co + o];
        }
    }
}

impl Dims {
    /// Number of input channels that an output channel depends on.
    pub(super) fn lanes(&self) -> usize {
        self.c / self.groups
    }

    pub(super) fn is_depthwise(&self) -> bool {
        self.c == self.groups && self.co == self.groups
    }

    /// Index of the first channel of a pixel of a spread input.
    fn pixel(&self, image: usize, y: usize, x: usize) -> usize {
        ((image * self.h + y) * self.w + x) * self.co
    }

    /// Index of the first channel of a tap's weights.
    fn tap(&self, ky: usize, kx: usize, lane: usize) -> usize {
        ((ky * self.kw + kx) * self.lanes() + lane) * self.co
    }

    /// Returns the input with, for each output channel, the `lane`-th input channel of its group.
    pub(super) fn spread<'a, T: WithDType>(&self, x: &'a [T], lane: usize) -> Cow<'a, [T]> {
        if self.is_depthwise() {
            return Cow::Borrowed(x);
        }
        let (lanes, per_group) = (self.lanes(), self.co / self.groups);
        let mut y = vec![T::zero(); x.len() / self.c * self.co];
        y.par_chunks_mut(self.co).zip(x.par_chunks(self.c)).each(&|(y, x)| {
            for (y, x) in y.chunks_exact_mut(per_group).zip(x.chunks_exact(lanes)) {
                y.fill(x[lane]);
            }
        });
        Cow::Owned(y)
    }
}

/// Calls `f(ky, kx, input row, output columns)` for every kernel tap that touches the image from output row `oy`.
fn for_taps(oy: usize, d: Dims, mut f: impl FnMut(usize, usize, usize, std::ops::Range<usize>)) {
    for ky in 0..d.kh {
        let Some(iy) = (oy * d.stride + ky).checked_sub(d.padding).filter(|&y| y < d.h) else { continue };
        for kx in 0..d.kw {
            let first = d.padding.saturating_sub(kx).div_ceil(d.stride);
            let last = (d.w + d.padding).saturating_sub(kx).div_ceil(d.stride).min(d.wo);
            if first < last {
                f(ky, kx, iy, first..last);
            }
        }
    }
}

/// Reorders `(C_out, C / groups, KH, KW)` to `(KH, KW, C / groups, C_out)`.
fn tap_major<T: WithDType>(w: &[T], d: Dims) -> Vec<T> {
    let (lanes, taps) = (d.c / d.groups, d.kh * d.kw);
    let mut y = vec![T::zero(); w.len()];
    for (o, w) in w.chunks_exact(lanes * taps).enumerate() {
        for (i, &w) in w.iter().enumerate() {
            y[(i % taps * lanes + i / taps) * d.co + o] = w;
        }
    }
    y
}
