//! The convolution of the input with a transformed filter.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::tiles::{Gather, Planes, Scatter, Tiling};
use super::{Tile, group_tiles};
use crate::ops::conv::Dims;
use crate::ops::conv::kernel::product::{BLOCK, Product, width};
use crate::ops::conv::kernel::{Epilogue, Prologue};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::vectorize;
use crate::parallel::Each;

/// Elements of transformed tiles, and of one block of their products, that fit in a worker thread's cache.
const PIECE_ELEMENTS: usize = 164 * 1024;
/// Elements of the largest filter that the threads' shared cache holds, so that it can be read for every piece.
const MAX_FILTER: usize = 3 << 20;

/// Writes `epilogue(conv(prologue(x), filter))` to `y`; `filter` is packed by [`super::pack`].
pub(in crate::ops::conv) fn convolve(
    x: &[f32],
    filter: &[f32],
    d: Dims,
    tile: Tile,
    arch: Arch,
    (prologue, epilogue): (Prologue, Epilogue),
    y: &mut [f32],
) {
    arch.dispatch(Convolve { x, filter, d, tile, prologue, epilogue, y });
}

struct Convolve<'a> {
    x: &'a [f32],
    filter: &'a [f32],
    d: Dims,
    tile: Tile,
    prologue: Prologue<'a>,
    epilogue: Epilogue<'a>,
    y: &'a mut [f32],
}

impl WithSimd for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.tile {
            Tile::Two => self.tiles::<S, 2, 4>(simd),
            Tile::Three => self.tiles::<S, 3, 5>(simd),
            Tile::Four => self.tiles::<S, 4, 6>(simd),
        }
    }
}

impl Convolve<'_> {
    #[inline(always)]
    fn tiles<S: Simd, const M: usize, const N: usize>(self, simd: S) {
        let Self { x, filter, d, tile: _, prologue, epilogue, y } = self;
        let tiling = Tiling::new(d, M);
        let job = Job::<S, M, N> { simd, x, filter, d, tiling, prologue, epilogue };
        let rows = (PIECE_ELEMENTS / (N * N * (d.c + width::<S>())) / tiling.cols).max(1);
        let is_cached = N * N * d.c * d.co <= MAX_FILTER;
        if is_cached && tiling.num_rows().div_ceil(rows) >= 2 * rayon::current_num_threads() {
            job.pieces(y, rows)
        } else {
            job.phases(y)
        }
    }
}

/// A convolution with tiles of `M x M` outputs and `N = M + 2`.
#[derive(Clone, Copy)]
struct Job<'a, S, const M: usize, const N: usize> {
    simd: S,
    x: &'a [f32],
    filter: &'a [f32],
    d: Dims,
    tiling: Tiling,
    prologue: Prologue<'a>,
    epilogue: Epilogue<'a>,
}

impl<S: Simd, const M: usize, const N: usize> Job<'_, S, M, N> {
    /// Each worker thread takes `rows` rows of tiles through all three phases.
    #[inline(always)]
    fn pieces(self, y: &mut [f32], rows: usize) {
        let (tiling, d) = (self.tiling, self.d);
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        pieces(&tiling, y, rows, d.co).into_par_iter().each(&|(row, rows, y)| {
            let tiles = [row * tiling.cols, rows * tiling.cols];
            let (planes_v, planes_m) =
                (Planes::new(N * N, tiles[1], BLOCK), Planes::new(N * N, tiles[1], width::<S>()));
            with_scratch(c_blocks * planes_v.len() + planes_m.len(), |scratch| {
                let (v, m) = scratch.split_at_mut(c_blocks * planes_v.len());
                for (block, v) in v.chunks_exact_mut(planes_v.len()).enumerate() {
                    self.gather(block, tiles, planes_v, v);
                }
                for block in 0..o_blocks {
                    for position in 0..N * N {
                        self.multiply(position, block, tiles[1], (planes_v, v), (planes_m, m));
                    }
                    self.scatter(block, tiles, (planes_m, 0, m), y);
                }
            });
        });
    }

    /// All worker threads transform, then multiply, then transform back, a group of tiles at a time.
    #[inline(always)]
    fn phases(self, y: &mut [f32]) {
        let (tiling, d) = (self.tiling, self.d);
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        let rows = (group_tiles(N * N, d) / tiling.cols).max(1);
        for group in pieces(&tiling, y, 1, d.co).chunks_mut(rows) {
            let first = group.first().map_or(0, |(row, ..)| row * tiling.cols);
            let tiles = [first, group.len() * tiling.cols];
            let (planes_v, planes_m) =
                (Planes::new(N * N, tiles[1], BLOCK), Planes::new(N * N, tiles[1], width::<S>()));
            with_scratch(c_blocks * planes_v.len() + o_blocks * planes_m.len(), |scratch| {
                let (v, m) = scratch.split_at_mut(c_blocks * planes_v.len());
                v.par_chunks_exact_mut(planes_v.len()).enumerate().each(&|(block, v)| {
                    self.gather(block, tiles, planes_v, v);
                });
                m.par_chunks_exact_mut(planes_m.len()).enumerate().each(&|(block, m)| {
                    for position in 0..N * N {
                        self.multiply(position, block, tiles[1], (planes_v, v), (planes_m, m));
                    }
                });
                group.par_iter_mut().each(&|(row, rows, y)| {
                    for (block, m) in m.chunks_exact(planes_m.len()).enumerate() {
                        let tiles = [*row * tiling.cols, *rows * tiling.cols];
                        self.scatter(block, tiles, (planes_m, tiles[0] - first, m), y);
                    }
                });
            });
        }
    }

    /// Transforms a block of the input's channels.
    #[inline(always)]
    fn gather(self, block: usize, tiles: [usize; 2], planes: Planes, v: &mut [f32]) {
        let Self { simd, x, prologue, tiling, .. } = self;
        vectorize(simd, Gather::<N> { tiling: &tiling, x, prologue, block, tiles, planes, v });
    }

    /// Transforms a block of products back to `y`, which starts with the first tile's row; `m_row` is its row in `m`.
    #[inline(always)]
    fn scatter(self, block: usize, tiles: [usize; 2], (planes, m_row, m): (Planes, usize, &[f32]), y: &mut [f32]) {
        let Self { simd, epilogue, tiling, .. } = self;
        let start = tiling.first_pixel(tiles[0] / tiling.cols);
        vectorize(simd, Scatter::<M, N> { tiling: &tiling, planes, m_row, m, epilogue, block, tiles, start, y });
    }

    /// Computes the product of one position for one block of output channels.
    #[inline(always)]
    fn multiply(
        self,
        position: usize,
        block: usize,
        tiles: usize,
        (planes_v, v): (Planes, &[f32]),
        (planes_m, m): (Planes, &mut [f32]),
    ) {
        let size = self.d.c * width::<S>();
        let filter = &self.filter[(block * N * N + position) * size..][..size];
        let v = &v[planes_v.at(position, 0)..];
        vectorize(
            self.simd,
            Product {
                rows: tiles,
                k: self.d.c,
                a: v,
                a_stride: planes_v.len(),
                b: filter,
                y: &mut m[planes_m.at(position, 0)..],
            },
        );
    }
}

/// Splits `y` into pieces of `rows` rows of tiles; returns each with its first row and its number of rows.
fn pieces<'a>(tiling: &Tiling, mut y: &'a mut [f32], rows: usize, co: usize) -> Vec<(usize, usize, &'a mut [f32])> {
    let mut pieces = Vec::new();
    for first in (0..tiling.num_rows()).step_by(rows) {
        let last = (first + rows).min(tiling.num_rows());
        let (piece, rest) = y.split_at_mut((tiling.first_pixel(last) - tiling.first_pixel(first)) * co);
        pieces.push((first, last - first, piece));
        y = rest;
    }
    pieces
}
