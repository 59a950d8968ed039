//! 3x3 convolution of stride 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, CVPR 2016): 36 products
//! where the definition has 144, forward and for both gradients.
//!
//! A worker transforms some rows of tiles, multiplies them with the transformed filter position by position, and
//! transforms back: everything between the two images stays in its cache. Where there are fewer rows than workers, the
//! three phases are shared out one after the other. Sums run in an order that depends on the sizes only.

mod tiles;
mod transform;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::tiles::{POSITIONS, Planes, Tiling, gather, gather_gradient, scatter};
use super::Dims;
use super::kernel::product::{BLOCK, product, transposed_product, width};
use super::kernel::{CHANNELS, Epilogue, Prologue, Width};
use crate::ops::lanes::{load, store};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::kernel;

/// Tiles of the weight gradient that are multiplied at once.
const GRADIENT_TILES: usize = 48;
/// Largest product of channels at which the weight gradient is summed up in the transformed domain by each of some
/// workers, and their number.
const MAX_SUM_CHANNELS: usize = 128 * 128;
const NUM_SUMS: usize = 8;
/// Most tiles that the weight gradient of more channels transforms at once.
const MAX_GROUP_TILES: usize = 512;

/// Whether a convolution can be computed this way, and better than by its definition.
pub(super) fn fits(d: Dims) -> bool {
    (d.kh, d.kw, d.stride, d.groups) == (3, 3, 1, 1)
        && d.padding <= 2
        && d.c.is_multiple_of(CHANNELS)
        && d.co.is_multiple_of(CHANNELS)
        && d.ho >= 3
        && d.wo >= 3
}

/// Whether it is faster than the definition by patches: its filters are four times as large, and few pixels do not pay for
/// reading them from memory.
pub(super) fn pays(d: Dims) -> bool {
    let (pixels, tiles) = (d.pixels(), Tiling::new(d).num_tiles());
    let is_cached = POSITIONS * d.c * d.co <= CACHED_FILTER;
    is_cached || 18 * pixels >= 94 * tiles + READING
}

/// Elements of a transformed filter that caches hold.
const CACHED_FILTER: usize = 1 << 19;
/// What reading a transformed filter costs more than reading the filter, per product of an input and an output channel, in
/// multiplications and additions. Measured: 14x14 pixels pay (r100, batch 1: 37 ms, 49 ms by patches), 7x7 do not.
const READING: usize = 1000;

/// Elements of a filter of `co` and `c` channels in the transformed domain.
fn packed_len(c: usize, co: usize, arch: Arch) -> usize {
    co.next_multiple_of(arch.dispatch(Width)) * POSITIONS * c
}

/// Elements of the filter of the forward pass.
pub(super) fn filter_len(d: Dims, arch: Arch) -> usize {
    packed_len(d.c, d.co, arch)
}

/// Transforms `w: (co, c, 3, 3)` to `(blocks of output channels, 36, c, width)`, the order in which it is read.
pub(super) fn pack(w: &[f32], d: Dims, arch: Arch, packed: &mut [f32]) {
    let at = |o: usize, i: usize, tap: usize| w[(o * d.c + i) * 9 + tap];
    arch.dispatch(Pack { c: d.c, co: d.co, at, packed });
}

/// Transforms the filter of the input's gradient: `w: (co, c, 3, 3)` from back to front, with inputs and outputs
/// exchanged.
fn pack_flipped(w: &[f32], d: Dims, arch: Arch, packed: &mut [f32]) {
    let at = |o: usize, i: usize, tap: usize| w[(i * d.c + o) * 9 + 8 - tap];
    arch.dispatch(Pack { c: d.co, co: d.c, at, packed });
}

struct Pack<'a, F> {
    c: usize,
    co: usize,
    at: F,
    packed: &'a mut [f32],
}

impl<F: Fn(usize, usize, usize) -> f32 + Sync> WithSimd for Pack<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { c, co, at, packed } = self;
        packed.par_chunks_mut(POSITIONS * c * width::<S>()).enumerate().for_each(|(block, packed)| {
            simd.vectorize(PackBlock { simd, c, co, block, at: &at, packed });
        });
    }
}

struct PackBlock<'a, S, F> {
    simd: S,
    c: usize,
    co: usize,
    block: usize,
    at: &'a F,
    packed: &'a mut [f32],
}

impl<S: Simd, F: Fn(usize, usize, usize) -> f32> pulp::NullaryFnOnce for PackBlock<'_, S, F> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { simd, c, co, block, at, packed } = self;
        let width = width::<S>();
        let mut taps = [[0.0; 64]; 9];
        assert!(width <= 64, "vectors of at most 32 values");
        for i in 0..c {
            for lane in 0..width {
                let o = block * width + lane;
                for (tap, taps) in taps.iter_mut().enumerate() {
                    taps[lane] = if o < co { at(o, i, tap) } else { 0.0 };
                }
            }
            for lane in (0..width).step_by(S::F32_LANES) {
                let mut half = [[simd.splat_f32s(0.0); 3]; 6];
                for k in 0..3 {
                    let mut g = [simd.splat_f32s(0.0); 3];
                    for (j, g) in g.iter_mut().enumerate() {
                        // SAFETY: `lane + F32_LANES <= width <= 64`.
                        *g = unsafe { load::<S>(&taps[3 * j + k], lane) };
                    }
                    for (half, value) in half.iter_mut().zip(transform::filter(simd, g)) {
                        half[k] = value;
                    }
                }
                for (j, half) in half.into_iter().enumerate() {
                    for (k, value) in transform::filter(simd, half).into_iter().enumerate() {
                        // SAFETY: the position is below 36, `i` below `c` and the lane below the width.
                        unsafe { store::<S>(packed, ((6 * j + k) * c + i) * width + lane, value) };
                    }
                }
            }
        }
    }
}

/// Writes the gradient of the input, itself a convolution of the output's gradient, and `epilogue` of it to `gx`.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims, arch: Arch, epilogue: Epilogue, gx: &mut [f32]) {
    let back = Dims { h: d.ho, w: d.wo, c: d.co, ho: d.h, wo: d.w, co: d.c, padding: 2 - d.padding, ..d };
    with_scratch(packed_len(back.c, back.co, arch), |packed| {
        pack_flipped(w, d, arch, packed);
        convolve(gy, packed, back, arch, (Prologue::default(), epilogue), gx);
    });
}

/// Writes the convolution of `prologue(x)` with what [`pack`] made, and `epilogue` of it, to `y`.
pub(super) fn convolve(
    x: &[f32],
    filter: &[f32],
    d: Dims,
    arch: Arch,
    (prologue, epilogue): (Prologue, Epilogue),
    y: &mut [f32],
) {
    arch.dispatch(Convolve { x, filter, d, prologue, epilogue, y });
}

struct Convolve<'a> {
    x: &'a [f32],
    filter: &'a [f32],
    d: Dims,
    prologue: Prologue<'a>,
    epilogue: Epilogue<'a>,
    y: &'a mut [f32],
}

impl WithSimd for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, filter, d, prologue, epilogue, y } = self;
        let tiling = Tiling::new(d);
        let job = Job { simd, x, filter, d, tiling, prologue, epilogue };
        let wanted = if d.c.max(d.co) <= 64 { 28 } else { 48 };
        let pieces = tiling.num_rows().div_ceil((wanted / tiling.cols).max(1));
        if pieces < 2 * rayon::current_num_threads() {
            job.phases(y)
        } else {
            job.pieces(y, (wanted / tiling.cols).max(1))
        }
    }
}

/// A convolution.
#[derive(Clone, Copy)]
struct Job<'a, S> {
    simd: S,
    x: &'a [f32],
    filter: &'a [f32],
    d: Dims,
    tiling: Tiling,
    prologue: Prologue<'a>,
    epilogue: Epilogue<'a>,
}

impl<S: Simd> Job<'_, S> {
    /// Each worker takes `rows` rows of tiles from image to image.
    #[inline(always)]
    fn pieces(self, y: &mut [f32], rows: usize) {
        let (tiling, d) = (self.tiling, self.d);
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        pieces(&tiling, y, rows, d.co).into_par_iter().for_each(|(row, rows, y)| {
            let tiles = [row * tiling.cols, rows * tiling.cols];
            let (planes_v, planes_m) = (Planes::new(tiles[1], BLOCK), Planes::new(tiles[1], width::<S>()));
            with_scratch(c_blocks * planes_v.len() + o_blocks * planes_m.len(), |scratch| {
                let (v, m) = scratch.split_at_mut(c_blocks * planes_v.len());
                for (block, v) in v.chunks_exact_mut(planes_v.len()).enumerate() {
                    gather(self.simd, &tiling, self.x, self.prologue, block, tiles, planes_v, v);
                }
                for position in 0..POSITIONS {
                    for (block, m) in m.chunks_exact_mut(planes_m.len()).enumerate() {
                        self.multiply(position, block, tiles[1], (planes_v, v), (planes_m, m));
                    }
                }
                for (block, m) in m.chunks_exact(planes_m.len()).enumerate() {
                    let start = tiling.first_pixel(row);
                    scatter(self.simd, &tiling, planes_m, 0, m, self.epilogue, block, tiles, start, y);
                }
            });
        });
    }

    /// All workers transform, then multiply, then transform back.
    #[inline(always)]
    fn phases(self, y: &mut [f32]) {
        let (tiling, d) = (self.tiling, self.d);
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        let tiles = [0, tiling.num_tiles()];
        let (planes_v, planes_m) = (Planes::new(tiles[1], BLOCK), Planes::new(tiles[1], width::<S>()));
        with_scratch(c_blocks * planes_v.len() + o_blocks * planes_m.len(), |scratch| {
            let (v, m) = scratch.split_at_mut(c_blocks * planes_v.len());
            v.par_chunks_exact_mut(planes_v.len()).enumerate().for_each(|(block, v)| {
                gather(self.simd, &tiling, self.x, self.prologue, block, tiles, planes_v, v);
            });
            m.par_chunks_exact_mut(planes_m.len()).enumerate().for_each(|(block, m)| {
                for position in 0..POSITIONS {
                    self.multiply(position, block, tiles[1], (planes_v, v), (planes_m, m));
                }
            });
            pieces(&tiling, y, 1, d.co).into_par_iter().for_each(|(row, rows, y)| {
                for (block, m) in m.chunks_exact(planes_m.len()).enumerate() {
                    let (tiles, start) = ([row * tiling.cols, rows * tiling.cols], tiling.first_pixel(row));
                    scatter(self.simd, &tiling, planes_m, tiles[0], m, self.epilogue, block, tiles, start, y);
                }
            });
        });
    }

    /// The product of one position for one block of output channels.
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
        let filter = &self.filter[(block * POSITIONS + position) * size..][..size];
        let v = &v[planes_v.at(position, 0)..];
        product(self.simd, tiles, self.d.c, v, planes_v.len(), filter, &mut m[planes_m.at(position, 0)..]);
    }
}

/// Parts of `y`, each with its first row of tiles and how many of them it has.
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

/// Writes the gradient of the weight, `(co, c, 3, 3)`, for the convolution of `prologue(x)`.
pub(super) fn grad_w(x: &[f32], prologue: Prologue, gy: &[f32], d: Dims, arch: Arch, gw: &mut [f32]) {
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
        // In the transformed domain: (sums, blocks of outputs, blocks of inputs, 36, BLOCK, width).
        let size = POSITIONS * BLOCK * width::<S>();
        let few = d.c * d.co <= MAX_SUM_CHANNELS;
        let num_sums = if few { NUM_SUMS } else { 1 };
        with_scratch(num_sums * o_blocks * c_blocks * size, |sums| {
            sums.par_chunks_mut(size).for_each(|sums| sums.fill(0.0));
            if few {
                self.by_sums(simd, sums)
            } else {
                self.by_blocks(simd, sums)
            }
            self.fold(simd, sums);
        });
    }
}

impl GradW<'_> {
    /// Adds up the sums and transforms them back.
    #[inline(always)]
    fn fold<S: Simd>(self, simd: S, sums: &[f32]) {
        let Self { d, gw, .. } = self;
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        let size = POSITIONS * BLOCK * width::<S>();
        gw.par_chunks_mut(width::<S>() * d.c * 9).enumerate().for_each(|(o_block, gw)| {
            let sums = sums.chunks_exact(o_blocks * c_blocks * size);
            let sums: Vec<&[f32]> = sums.map(|sum| &sum[o_block * c_blocks * size..][..c_blocks * size]).collect();
            fold(simd, &sums, d.c, gw);
        });
    }

    /// Few channels, many tiles: each sum takes its share of the tiles, some at a time.
    #[inline(always)]
    fn by_sums<S: Simd>(&self, simd: S, sums: &mut [f32]) {
        let d = self.d;
        let tiling = Tiling::new(d);
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        let share = tiling.num_tiles().div_ceil(NUM_SUMS);
        sums.par_chunks_mut(sums.len() / NUM_SUMS).enumerate().for_each(|(i, sums)| {
            let last = ((i + 1) * share).min(tiling.num_tiles());
            for first in (i * share..last).step_by(GRADIENT_TILES) {
                let tiles = [first, GRADIENT_TILES.min(last - first)];
                let (planes_v, planes_m) = (Planes::new(tiles[1], BLOCK), Planes::new(tiles[1], width::<S>()));
                with_scratch(c_blocks * planes_v.len() + o_blocks * planes_m.len(), |scratch| {
                    let (v, m) = scratch.split_at_mut(c_blocks * planes_v.len());
                    for (block, v) in v.chunks_exact_mut(planes_v.len()).enumerate() {
                        gather(simd, &tiling, self.x, self.prologue, block, tiles, planes_v, v);
                    }
                    for (block, m) in m.chunks_exact_mut(planes_m.len()).enumerate() {
                        gather_gradient(simd, &tiling, self.gy, block, tiles, planes_m, m);
                    }
                    let mut sums = sums.chunks_exact_mut(POSITIONS * BLOCK * width::<S>());
                    for m in m.chunks_exact(planes_m.len()) {
                        for (v, sum) in v.chunks_exact(planes_v.len()).zip(&mut sums) {
                            multiply_gradient(simd, tiles[1], planes_v, v, planes_m, m, sum);
                        }
                    }
                });
            }
        });
    }

    /// Many channels, few tiles: workers share out the blocks of the filter.
    #[inline(always)]
    fn by_blocks<S: Simd>(&self, simd: S, sums: &mut [f32]) {
        let d = self.d;
        let tiling = Tiling::new(d);
        let (c_blocks, o_blocks) = (d.c.div_ceil(BLOCK), d.co.div_ceil(width::<S>()));
        for first in (0..tiling.num_tiles()).step_by(MAX_GROUP_TILES) {
            let tiles = [first, MAX_GROUP_TILES.min(tiling.num_tiles() - first)];
            let (planes_v, planes_m) = (Planes::new(tiles[1], BLOCK), Planes::new(tiles[1], width::<S>()));
            with_scratch(c_blocks * planes_v.len() + o_blocks * planes_m.len(), |scratch| {
                let (v, m) = scratch.split_at_mut(c_blocks * planes_v.len());
                v.par_chunks_exact_mut(planes_v.len()).enumerate().for_each(|(block, v)| {
                    gather(simd, &tiling, self.x, self.prologue, block, tiles, planes_v, v);
                });
                m.par_chunks_exact_mut(planes_m.len()).enumerate().for_each(|(block, m)| {
                    gather_gradient(simd, &tiling, self.gy, block, tiles, planes_m, m);
                });
                let (v, m) = (&*v, &*m);
                sums.par_chunks_exact_mut(POSITIONS * BLOCK * width::<S>()).enumerate().for_each(|(i, sum)| {
                    let v = &v[i % c_blocks * planes_v.len()..][..planes_v.len()];
                    let m = &m[i / c_blocks * planes_m.len()..][..planes_m.len()];
                    multiply_gradient(simd, tiles[1], planes_v, v, planes_m, m, sum);
                });
            });
        }
    }
}

kernel! {
    /// Adds the products of all positions for one block of inputs and one of outputs.
    fn multiply_gradient<S>(simd, tiles: usize, planes_v: Planes, v: &'a [f32], planes_m: Planes, m: &'a [f32], sum: &'a mut [f32]) {
        for (position, sum) in sum.chunks_exact_mut(BLOCK * width::<S>()).enumerate() {
            let (v, m) = (&v[planes_v.at(position, 0)..], &m[planes_m.at(position, 0)..]);
            transposed_product(simd, tiles, v, m, sum);
        }
    }
}

kernel! {
    /// Adds up some sums `(blocks of inputs, 36, BLOCK, width)` and transforms them back to `(outputs, c, 3, 3)`.
    fn fold<S>(simd, sums: &'a [&'a [f32]], c: usize, gw: &'a mut [f32]) {
        let size = POSITIONS * BLOCK * width::<S>();
        assert!(sums.iter().all(|sum| sum.len() >= c.div_ceil(BLOCK) * size), "{c} channels");
        for i in 0..c {
            for lane in (0..gw.len() / (c * 9)).step_by(S::F32_LANES) {
                let mut half = [[simd.splat_f32s(0.0); 6]; 3];
                for k in 0..6 {
                    let mut u = [simd.splat_f32s(0.0); 6];
                    for (j, u) in u.iter_mut().enumerate() {
                        let place = ((6 * j + k) * BLOCK + i % BLOCK) * width::<S>() + lane;
                        for sum in sums {
                            // SAFETY: the block, position, row and lane are below their numbers in the sum.
                            *u = simd.add_f32s(*u, unsafe { load::<S>(sum, i / BLOCK * size + place) });
                        }
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
