//! Filters in the transformed domain.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{Tile, transform};
use crate::ops::conv::Dims;
use crate::ops::conv::kernel::Width;
use crate::ops::conv::kernel::product::width;
use crate::ops::lanes::{load, store};
use crate::parallel::Each;

/// Number of elements of the transformed filter of the forward pass.
pub(in crate::ops::conv) fn filter_len(d: Dims, tile: Tile, arch: Arch) -> usize {
    d.co.next_multiple_of(arch.dispatch(Width)) * tile.positions() * d.c
}

/// Transforms `w: (co, c, 3, 3)` to `(blocks of output channels, positions, c, width)`, the order in which it is read.
pub(in crate::ops::conv) fn pack(w: &[f32], d: Dims, tile: Tile, arch: Arch, packed: &mut [f32]) {
    let at = |o: usize, i: usize, tap: usize| w[(o * d.c + i) * 9 + tap];
    arch.dispatch(Pack { tile, c: d.c, co: d.co, at, packed });
}

/// Transforms the filter of the input's gradient: `w: (co, c, 3, 3)` with both kernel axes reversed, and inputs and
/// outputs exchanged.
pub(super) fn pack_flipped(w: &[f32], d: Dims, tile: Tile, arch: Arch, packed: &mut [f32]) {
    let at = |o: usize, i: usize, tap: usize| w[(i * d.c + o) * 9 + 8 - tap];
    arch.dispatch(Pack { tile, c: d.co, co: d.c, at, packed });
}

struct Pack<'a, F> {
    tile: Tile,
    c: usize,
    co: usize,
    at: F,
    packed: &'a mut [f32],
}

impl<F: Fn(usize, usize, usize) -> f32 + Sync> WithSimd for Pack<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.tile {
            Tile::Two => self.blocks::<S, 4>(simd),
            Tile::Three => self.blocks::<S, 5>(simd),
            Tile::Four => self.blocks::<S, 6>(simd),
        }
    }
}

impl<F: Fn(usize, usize, usize) -> f32 + Sync> Pack<'_, F> {
    #[inline(always)]
    fn blocks<S: Simd, const N: usize>(self, simd: S) {
        let Self { tile: _, c, co, at, packed } = self;
        packed.par_chunks_mut(N * N * c * width::<S>()).enumerate().each(&|(block, packed)| {
            simd.vectorize(PackBlock::<S, F, N> { simd, c, co, block, at: &at, packed });
        });
    }
}

struct PackBlock<'a, S, F, const N: usize> {
    simd: S,
    c: usize,
    co: usize,
    block: usize,
    at: &'a F,
    packed: &'a mut [f32],
}

impl<S: Simd, F: Fn(usize, usize, usize) -> f32, const N: usize> pulp::NullaryFnOnce for PackBlock<'_, S, F, N> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { simd, c, co, block, at, packed } = self;
        let width = width::<S>();
        let mut taps = [[0.0; 64]; 9];
        assert!(width <= 64, "vectors of at most 32 values");
        assert!(packed.len() >= N * N * c * width, "{c} channels in {}", packed.len());
        for i in 0..c {
            for lane in 0..width {
                let o = block * width + lane;
                for (tap, taps) in taps.iter_mut().enumerate() {
                    taps[lane] = if o < co { at(o, i, tap) } else { 0.0 };
                }
            }
            for lane in (0..width).step_by(S::F32_LANES) {
                let mut half = [[simd.splat_f32s(0.0); 3]; N];
                for k in 0..3 {
                    let mut g = [simd.splat_f32s(0.0); 3];
                    for (j, g) in g.iter_mut().enumerate() {
                        // SAFETY: `lane + F32_LANES <= width <= 64`.
                        *g = unsafe { load::<S>(&taps[3 * j + k], lane) };
                    }
                    for (half, value) in half.iter_mut().zip(transform::filter::<S, N>(simd, g)) {
                        half[k] = value;
                    }
                }
                for (j, half) in half.into_iter().enumerate() {
                    for (k, value) in transform::filter::<S, N>(simd, half).into_iter().enumerate() {
                        // SAFETY: the position is below N^2, `i` below `c` and the lane below the width.
                        unsafe { store::<S>(packed, ((N * j + k) * c + i) * width + lane, value) };
                    }
                }
            }
        }
    }
}
