//! Convolution with several groups, computed directly; vector lanes run over the channels.
//!
//! With one input channel per group (depthwise) the inner loops are plain products of channel vectors. Groups of
//! several channels (MobileFaceNet has some of two) go through the same loops once per channel of the group, on a copy
//! of the input whose channels are laid out as the outputs want them.

use candle_core::WithDType;
use rayon::prelude::*;

use super::Dims;

pub(super) fn forward<T: WithDType>(x: &[T], w: &[T], d: Dims) -> Vec<T> {
    let w = tap_major(w, d);
    let mut y = vec![T::zero(); d.pixels() * d.co];
    y.par_chunks_mut(d.wo * d.co).enumerate().for_each_init(Vec::new, |gathered, (row, y)| {
        let (image, oy) = (row / d.ho, row % d.ho);
        for_taps(oy, d, |ky, kx, iy, columns| {
            for lane in 0..d.c / d.groups {
                let w = &w[((ky * d.kw + kx) * (d.c / d.groups) + lane) * d.co..][..d.co];
                for ox in columns.clone() {
                    let x = input_lane(x, pixel(image, iy, ox * d.stride + kx - d.padding, d), lane, d, gathered);
                    let y = &mut y[ox * d.co..][..d.co];
                    for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                        *y += x * w;
                    }
                }
            }
        });
    });
    y
}

pub(super) fn grad_x<T: WithDType>(gy: &[T], w: &[T], d: Dims) -> Vec<T> {
    let w = tap_major(w, d);
    let (lanes, per_group) = (d.c / d.groups, d.co / d.groups);
    let mut gx = vec![T::zero(); d.n * d.h * d.w * d.c];
    let images = gx.par_chunks_mut(d.h * d.w * d.c).zip(gy.par_chunks(d.ho * d.wo * d.co));
    images.for_each(|(gx, gy)| {
        for oy in 0..d.ho {
            for_taps(oy, d, |ky, kx, iy, columns| {
                for ox in columns {
                    let gx = &mut gx[pixel(0, iy, ox * d.stride + kx - d.padding, d)..][..d.c];
                    let gy = &gy[(oy * d.wo + ox) * d.co..][..d.co];
                    for lane in 0..lanes {
                        let w = &w[((ky * d.kw + kx) * lanes + lane) * d.co..][..d.co];
                        if lanes == 1 && per_group == 1 {
                            for ((gx, &gy), &w) in gx.iter_mut().zip(gy).zip(w) {
                                *gx += gy * w;
                            }
                        } else {
                            for (o, (&gy, &w)) in gy.iter().zip(w).enumerate() {
                                gx[o / per_group * lanes + lane] += gy * w;
                            }
                        }
                    }
                }
            });
        }
    });
    gx
}

pub(super) fn grad_w<T: WithDType>(x: &[T], gy: &[T], d: Dims) -> Vec<T> {
    let lanes = d.c / d.groups;
    let size = d.kh * d.kw * lanes * d.co;
    // One sum per image, added in their order: the same bits for any number of threads.
    let mut partial = vec![T::zero(); d.n * size];
    partial.par_chunks_mut(size).enumerate().for_each_init(Vec::new, |gathered, (image, sum)| {
        for oy in 0..d.ho {
            for_taps(oy, d, |ky, kx, iy, columns| {
                for lane in 0..lanes {
                    let sum = &mut sum[((ky * d.kw + kx) * lanes + lane) * d.co..][..d.co];
                    for ox in columns.clone() {
                        let x = input_lane(x, pixel(image, iy, ox * d.stride + kx - d.padding, d), lane, d, gathered);
                        let gy = &gy[((image * d.ho + oy) * d.wo + ox) * d.co..][..d.co];
                        for ((sum, &x), &gy) in sum.iter_mut().zip(x).zip(gy) {
                            *sum += x * gy;
                        }
                    }
                }
            });
        }
    });
    let mut taps = vec![T::zero(); size];
    for sum in partial.chunks_exact(size) {
        taps.iter_mut().zip(sum).for_each(|(a, &b)| *a += b);
    }
    let mut gw = vec![T::zero(); size];
    for (o, gw) in gw.chunks_exact_mut(lanes * d.kh * d.kw).enumerate() {
        for (i, gw) in gw.iter_mut().enumerate() {
            let (lane, tap) = (i / (d.kh * d.kw), i % (d.kh * d.kw));
            *gw = taps[(tap * lanes + lane) * d.co + o];
        }
    }
    gw
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

/// Index of the first channel of an input pixel.
fn pixel(image: usize, y: usize, x: usize, d: Dims) -> usize {
    ((image * d.h + y) * d.w + x) * d.c
}

/// Per output channel, the value of the `lane`-th input channel of its group.
fn input_lane<'a, T: WithDType>(x: &'a [T], start: usize, lane: usize, d: Dims, gathered: &'a mut Vec<T>) -> &'a [T] {
    let (lanes, per_group) = (d.c / d.groups, d.co / d.groups);
    let x = &x[start..start + d.c];
    if lanes == 1 && per_group == 1 {
        return x;
    }
    gathered.clear();
    gathered.extend((0..d.co).map(|o| x[o / per_group * lanes + lane]));
    gathered
}

/// `(C_out, C / groups, KH, KW)` to `(KH, KW, C / groups, C_out)`.
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
