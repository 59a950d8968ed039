//! Gradient of the weight: transposed patches times the gradient of the output.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gather::{Patches, with_rows};
use crate::ops::conv::Dims;
use crate::ops::conv::kernel::Prologue;
use crate::ops::conv::kernel::product::{BLOCK, TransposedProduct, width};
use crate::ops::conv::kernel::sums::{NUM_SUMS, join, with_zeros};
use crate::ops::lanes::{load, store};
use crate::ops::simd::vectorize;
use crate::parallel::Each;

/// Elements of the largest filter whose gradient is accumulated in several sums.
const MAX_SUM_ELEMENTS: usize = 1 << 19;
/// Elements of the patches that are gathered at a time for a larger filter.
const GROUP_ELEMENTS: usize = 4 << 20;

/// Writes the gradient of the weight, `(co, c, kh, kw)`, for the convolution of `prologue(x)`.
pub(in crate::ops::conv) fn grad_w(x: &[f32], prologue: Prologue, gy: &[f32], d: Dims, arch: Arch, gw: &mut [f32]) {
    assert!(gw.len() == d.co * d.patch() && gy.len() == d.pixels() * d.co, "{d:?}");
    arch.dispatch(GradW { patches: Patches::forward(x, prologue, d), gy, d, gw });
}

struct GradW<'a> {
    patches: Patches<'a>,
    gy: &'a [f32],
    d: Dims,
    gw: &'a mut [f32],
}

impl WithSimd for GradW<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let d = self.d;
        let (blocks, o_blocks) = (self.patches.blocks(), d.co.div_ceil(width::<S>()));
        // Layout: (sums, blocks of outputs, blocks of columns, BLOCK, width)
        let size = BLOCK * width::<S>();
        let few = blocks * o_blocks * size <= MAX_SUM_ELEMENTS;
        let num_sums = if few { NUM_SUMS } else { 1 };
        let len = o_blocks * blocks * size;
        with_zeros(num_sums * len, |sums| {
            if few {
                self.by_sums(simd, sums)
            } else {
                self.by_blocks(simd, sums)
            }
            let (total, taps) = (join(sums, len), d.kh * d.kw);
            self.gw.par_chunks_mut(d.c * taps).enumerate().each(&|(o, gw)| {
                let total = &total[o / width::<S>() * blocks * size..][..blocks * size];
                let mut columns = total.chunks_exact(width::<S>()).map(|column| column[o % width::<S>()]);
                for tap in 0..taps {
                    gw[tap..].iter_mut().step_by(taps).zip(&mut columns).for_each(|(gw, sum)| *gw = sum);
                }
            });
        });
    }
}

impl GradW<'_> {
    /// Small filter: each sum covers its share of the places, a few at a time.
    #[inline(always)]
    fn by_sums<S: Simd>(&self, simd: S, sums: &mut [f32]) {
        let Self { patches, gy, d, .. } = self;
        let (piece, share) = (patches.piece(), d.pixels().div_ceil(NUM_SUMS));
        let o_blocks = d.co.div_ceil(width::<S>());
        sums.par_chunks_mut(sums.len() / NUM_SUMS).enumerate().each(&|(i, sums)| {
            let last = ((i + 1) * share).min(d.pixels());
            for first in (i * share..last).step_by(piece) {
                let count = piece.min(last - first);
                with_rows(patches, o_blocks * width::<S>(), count, |rows, a, m| {
                    patches.gather(simd, first, count, rows, a);
                    let mut sums = sums.chunks_exact_mut(BLOCK * width::<S>());
                    for (block, m) in m.chunks_exact_mut(rows * width::<S>()).enumerate() {
                        vectorize(simd, Split { gy, co: d.co, block, first, count, m });
                        for (a, sum) in a.chunks_exact(rows * BLOCK).zip(&mut sums) {
                            vectorize(simd, TransposedProduct { rows: count, a, b: m, y: sum });
                        }
                    }
                });
            }
        });
    }

    /// Large filter: worker threads share its blocks.
    #[inline(always)]
    fn by_blocks<S: Simd>(&self, simd: S, sums: &mut [f32]) {
        let Self { patches, gy, d, .. } = self;
        let (blocks, o_blocks) = (patches.blocks(), d.co.div_ceil(width::<S>()));
        let group = (GROUP_ELEMENTS / patches.columns()).max(64);
        for first in (0..d.pixels()).step_by(group) {
            let count = group.min(d.pixels() - first);
            with_rows(patches, o_blocks * width::<S>(), count, |rows, a, m| {
                patches.gather_in_parallel(simd, first, count, rows, a);
                m.par_chunks_exact_mut(rows * width::<S>()).enumerate().each(&|(block, m)| {
                    vectorize(simd, Split { gy, co: d.co, block, first, count, m });
                });
                let (a, m) = (&*a, &*m);
                sums.par_chunks_exact_mut(BLOCK * width::<S>()).enumerate().each(&|(i, sum)| {
                    let a = &a[i % blocks * rows * BLOCK..][..rows * BLOCK];
                    let m = &m[i / blocks * rows * width::<S>()..][..rows * width::<S>()];
                    vectorize(simd, TransposedProduct { rows: count, a, b: m, y: sum });
                });
            });
        }
    }
}

/// Copies a block of the channels of `count` pixels from `first` on; channels beyond the last become zeros.
struct Split<'a> {
    gy: &'a [f32],
    co: usize,
    block: usize,
    first: usize,
    count: usize,
    m: &'a mut [f32],
}

impl WithSimd for Split<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { gy, co, block, first, count, m } = self;
        assert!(block * width::<S>() < co, "block {block} of {co} channels");
        let channels = width::<S>().min(co - block * width::<S>());
        assert!(gy.len() >= (first + count) * co && m.len() >= count * width::<S>(), "{count} pixels from {first} on");
        assert!(channels.is_multiple_of(S::F32_LANES), "{co} channels");
        for pixel in 0..count {
            for lane in (0..width::<S>()).step_by(S::F32_LANES) {
                // SAFETY: the pixel and its channels are in `gy`, the pixel and the lane in `m`.
                unsafe {
                    let value = match lane < channels {
                        true => load::<S>(gy, (first + pixel) * co + block * width::<S>() + lane),
                        false => simd.splat_f32s(0.0),
                    };
                    store::<S>(m, pixel * width::<S>() + lane, value);
                }
            }
        }
    }
}
