//! Depthwise convolution of 8-bit integers.

use rayon::prelude::*;

use super::{Dims, Input, Int8Conv, Int8Weight};
use crate::ops::simd::simd;
use crate::parallel::Each;

/// Packs a filter `(co, 1, kh, kw)` to `(kh * kw, co)`.
pub(super) fn pack(weight: &Int8Weight) -> Vec<i16> {
    let [co, _, kh, kw] = weight.shape();
    let taps = kh * kw;
    (0..taps * co).map(|i| i16::from(weight.values()[i % co * taps + i / co])).collect()
}

/// Computes rows of pixels in parallel; `finish` as in [`Int8Conv::pieces`].
pub(super) fn rows<T: Send>(
    conv: &Int8Conv,
    x: Input,
    d: Dims,
    y: &mut [T],
    finish: impl Fn(&[i32], usize, &mut [T]) + Copy + Sync,
) {
    let row_len = d.wo * d.co;
    y.par_chunks_mut(row_len).enumerate().each(&|(row, y)| {
        let (image, oy) = (row / d.ho, row % d.ho);
        // The rows of pixels below the taps, with the padding left and right of them.
        let width = d.w + 2 * d.padding;
        let (mut seen, mut sums) = (vec![0i16; d.kh * width * d.c], vec![0i32; d.co]);
        for (ky, seen) in seen.chunks_exact_mut(width * d.c).enumerate() {
            let iy = (oy * d.stride + ky).wrapping_sub(d.padding);
            if iy < d.h {
                let (at, len) = ((image * d.h + iy) * d.w * d.c, d.w * d.c);
                let seen = &mut seen[d.padding * d.c..][..len];
                simd(|| match x {
                    Input::Bytes(x) => conv.input.centre(&x[at..][..len], seen),
                    Input::Floats(x) => conv.input.quantise_centred(&x[at..][..len], seen),
                });
            }
        }
        for (ox, y) in y.chunks_exact_mut(d.co).enumerate() {
            simd(|| {
                sums.fill(0);
                for (tap, filter) in conv.packed.chunks_exact(d.co).enumerate() {
                    let at = (tap / d.kw * width + ox * d.stride + tap % d.kw) * d.c;
                    let seen = &seen[at..][..d.co];
                    let (sums, filter) = (&mut sums[..d.co], &filter[..d.co]);
                    for j in 0..d.co {
                        sums[j] += i32::from(seen[j]) * i32::from(filter[j]);
                    }
                }
            });
            finish(&sums, row * row_len + ox * d.co, y);
        }
    });
}
