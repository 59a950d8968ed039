//! Gradient of the weight, with tiles of 4x4 outputs.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::tiles::{Gather, GatherGradient, Planes, Tiling};
use super::{group_tiles, transform};
use crate::ops::conv::Dims;
use crate::ops::conv::kernel::Prologue;
use crate::ops::conv::kernel::product::{BLOCK, TransposedProduct, width};
use crate::ops::conv::kernel::sums::{NUM_SUMS, join, with_zeros};
use crate::ops::lanes::{load, store};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::vectorize;
use crate::parallel::Each;

/// Products of a tile.
const POSITIONS: usize = 36;
/// Tiles that are multiplied at a time.
const GRADIENT_TILES: usize = 48;
/// Largest product of input and output channels for which the gradient is accumulated in several sums in the
/// transformed domain.
const MAX_SUM_CHANNELS: usize = 128 * 128;

/// Writes the gradient of the weight, `(co, c, 3, 3)`, for the convolution of `prologue(x)`.
pub(in crate::ops::conv) fn grad_w(x: &[f32], prologue: Prologue, gy: &[f32], d: Dims, arch: Arch, gw: &mut [f32]) {
    assert!(gw.len() == d.co * d.c * 9, "a gradient of {} for {d:?}", gw.len());
    arch.dispatch(GradW { x, prologue, gy, d, gw });
}

struct GradW<'a> {
    x: &'a [f32],
    prologue: Prologue<'a>,
    gy: &'a [f32],
    d: Dims,
    gw: &'a mut [f32],
}

impl WithSimd for GradW<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let d = self.d;
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        // Layout in the transformed domain: (sums, blocks of outputs, blocks of inputs, 36, BLOCK, width).
        let size = POSITIONS * BLOCK * width::<S>();
        let few = d.c * d.co <= MAX_SUM_CHANNELS;
        let num_sums = if few { NUM_SUMS } else { 1 };
        let len = o_blocks * c_blocks * size;
        with_zeros(num_sums * len, |sums| {
            if few {
                self.by_sums(simd, sums)
            } else {
                self.by_blocks(simd, sums)
            }
            let blocks = join(sums, len).par_chunks_exact(c_blocks * size);
            self.gw
                .par_chunks_mut(width::<S>() * d.c * 9)
                .zip(blocks)
                .each(&|(gw, sum)| vectorize(simd, Fold { sum, c: d.c, gw }));
        });
    }
}

impl GradW<'_> {
    /// Transforms a block of the input's channels.
    #[inline(always)]
    fn gather<S: Simd>(
        &self,
        simd: S,
        tiling: &Tiling,
        (block, tiles): (usize, [usize; 2]),
        planes: Planes,
        v: &mut [f32],
    ) {
        vectorize(simd, Gather::<6> { tiling, x: self.x, prologue: self.prologue, block, tiles, planes, v });
    }

    /// Transforms a block of the channels of the output's gradient.
    #[inline(always)]
    fn gather_gradient<S: Simd>(
        &self,
        simd: S,
        tiling: &Tiling,
        (block, tiles): (usize, [usize; 2]),
        planes: Planes,
        m: &mut [f32],
    ) {
        vectorize(simd, GatherGradient { tiling, gy: self.gy, block, tiles, planes, m });
    }

    /// Few channels, many tiles: each sum covers its share of the tiles, a few at a time.
    #[inline(always)]
    fn by_sums<S: Simd>(&self, simd: S, sums: &mut [f32]) {
        let d = self.d;
        let tiling = Tiling::new(d, 4);
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        let share = tiling.num_tiles().div_ceil(NUM_SUMS);
        sums.par_chunks_mut(sums.len() / NUM_SUMS).enumerate().each(&|(i, sums)| {
            let last = ((i + 1) * share).min(tiling.num_tiles());
            for first in (i * share..last).step_by(GRADIENT_TILES) {
                let tiles = [first, GRADIENT_TILES.min(last - first)];
                let (planes_v, planes_m) =
                    (Planes::new(POSITIONS, tiles[1], BLOCK), Planes::new(POSITIONS, tiles[1], width::<S>()));
                with_scratch(c_blocks * planes_v.len() + o_blocks * planes_m.len(), |scratch| {
                    let (v, m) = scratch.split_at_mut(c_blocks * planes_v.len());
                    for (block, v) in v.chunks_exact_mut(planes_v.len()).enumerate() {
                        self.gather(simd, &tiling, (block, tiles), planes_v, v);
                    }
                    for (block, m) in m.chunks_exact_mut(planes_m.len()).enumerate() {
                        self.gather_gradient(simd, &tiling, (block, tiles), planes_m, m);
                    }
                    // Position by position: the planes of all blocks stay in the cache while each sum is passed over
                    // once.
                    for position in 0..POSITIONS {
                        let mut sums = sums.chunks_exact_mut(BLOCK * width::<S>()).skip(position).step_by(POSITIONS);
                        for m in m.chunks_exact(planes_m.len()) {
                            for (v, sum) in v.chunks_exact(planes_v.len()).zip(&mut sums) {
                                let (v, m) = (&v[planes_v.at(position, 0)..], &m[planes_m.at(position, 0)..]);
                                vectorize(simd, TransposedProduct { rows: tiles[1], a: v, b: m, y: sum });
                            }
                        }
                    }
                });
            }
        });
    }

    /// Many channels, few tiles: worker threads share the blocks of the filter.
    #[inline(always)]
    fn by_blocks<S: Simd>(&self, simd: S, sums: &mut [f32]) {
        let d = self.d;
        let tiling = Tiling::new(d, 4);
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        let most = group_tiles(POSITIONS, d);
        for first in (0..tiling.num_tiles()).step_by(most) {
            let tiles = [first, most.min(tiling.num_tiles() - first)];
            let (planes_v, planes_m) =
                (Planes::new(POSITIONS, tiles[1], BLOCK), Planes::new(POSITIONS, tiles[1], width::<S>()));
            with_scratch(c_blocks * planes_v.len() + o_blocks * planes_m.len(), |scratch| {
                let (v, m) = scratch.split_at_mut(c_blocks * planes_v.len());
                v.par_chunks_exact_mut(planes_v.len()).enumerate().each(&|(block, v)| {
                    self.gather(simd, &tiling, (block, tiles), planes_v, v);
                });
                m.par_chunks_exact_mut(planes_m.len()).enumerate().each(&|(block, m)| {
                    self.gather_gradient(simd, &tiling, (block, tiles), planes_m, m);
                });
                let (v, m) = (&*v, &*m);
                sums.par_chunks_exact_mut(POSITIONS * BLOCK * width::<S>()).enumerate().each(&|(i, sum)| {
                    let v = &v[i % c_blocks * planes_v.len()..][..planes_v.len()];
                    let m = &m[i / c_blocks * planes_m.len()..][..planes_m.len()];
                    vectorize(simd, MultiplyGradient { tiles: tiles[1], planes_v, v, planes_m, m, sum });
                });
            });
        }
    }
}

/// Adds the products of all positions for one block of inputs and one block of outputs.
struct MultiplyGradient<'a> {
    tiles: usize,
    planes_v: Planes,
    v: &'a [f32],
    planes_m: Planes,
    m: &'a [f32],
    sum: &'a mut [f32],
}

impl WithSimd for MultiplyGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tiles, planes_v, v, planes_m, m, sum } = self;
        for (position, sum) in sum.chunks_exact_mut(BLOCK * width::<S>()).enumerate() {
            let (v, m) = (&v[planes_v.at(position, 0)..], &m[planes_m.at(position, 0)..]);
            vectorize(simd, TransposedProduct { rows: tiles, a: v, b: m, y: sum });
        }
    }
}

/// Transforms a sum `(blocks of inputs, 36, BLOCK, width)` back to `(outputs, c, 3, 3)`.
struct Fold<'a> {
    sum: &'a [f32],
    c: usize,
    gw: &'a mut [f32],
}

impl WithSimd for Fold<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sum, c, gw } = self;
        let size = POSITIONS * BLOCK * width::<S>();
        assert!(sum.len() >= c.div_ceil(BLOCK) * size && gw.len() <= width::<S>() * c * 9, "{c} channels");
        for i in 0..c {
            for lane in (0..gw.len() / (c * 9)).step_by(S::F32_LANES) {
                let mut half = [[simd.splat_f32s(0.0); 6]; 3];
                for k in 0..6 {
                    let mut u = [simd.splat_f32s(0.0); 6];
                    for (j, u) in u.iter_mut().enumerate() {
                        let place = ((6 * j + k) * BLOCK + i % BLOCK) * width::<S>() + lane;
                        // SAFETY: the block, position, row and lane are below their numbers in the sum.
                        *u = unsafe { load::<S>(sum, i / BLOCK * size + place) };
                    }
                    for (half, value) in half.iter_mut().zip(transform::filter_adjoint(simd, u)) {
                        half[k] = value;
                    }
                }
                for (j, half) in half.into_iter().enumerate() {
                    for (k, value) in transform::filter_adjoint(simd, half).into_iter().enumerate() {
                        let mut lanes = [0.0; 64];
                        // SAFETY: a vector has at most 32 values.
                        unsafe { store::<S>(&mut lanes, 0, value) };
                        for (o, value) in lanes[..S::F32_LANES].iter().enumerate() {
                            gw[((lane + o) * c + i) * 9 + 3 * j + k] = *value;
                        }
                    }
                }
            }
        }
    }
}
