//! f32 convolutions of any stride and kernel as products of gathered patches, forward and for both gradients.
//!
//! A worker thread gathers the patches of some places into blocks of columns that stay in its cache. The gradient of
//! the input is gathered too: its pixels fall into classes by their position within a stride, and every pixel of a
//! class depends on the same taps. Sums run in an order that depends on the sizes only.

mod gather;
mod grad_w;
mod grad_x;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use self::gather::{Patches, with_rows};
pub(super) use self::grad_w::grad_w;
pub(super) use self::grad_x::grad_x;
use super::Dims;
use super::kernel::product::{BLOCK, Product, ProductOfPixels, width};
use super::kernel::{CHANNELS, Epilogue, Prologue, Width};
use crate::ops::lanes::{load, store};
use crate::ops::simd::vectorize;
use crate::parallel::Each;

/// Places whose results a worker thread moves to the output at a time, if there are few places.
const PLACES: usize = 48;

/// Whether a convolution can be computed from patches; the input's gradient also needs a multiple of [`CHANNELS`]
/// inputs.
pub(super) fn fits(d: Dims) -> bool {
    d.groups == 1 && d.co.is_multiple_of(CHANNELS)
}

/// Number of elements of a packed filter with `columns` columns for each of `outputs` outputs.
fn packed_len(columns: usize, outputs: usize, arch: Arch) -> usize {
    outputs.next_multiple_of(arch.dispatch(Width)) * columns
}

/// Elements of the filter of the forward pass.
pub(super) fn filter_len(d: Dims, arch: Arch) -> usize {
    packed_len(d.patch(), d.co, arch)
}

/// Packs `w: (co, c, kh, kw)` for the forward pass.
pub(super) fn pack(w: &[f32], d: Dims, arch: Arch, packed: &mut [f32]) {
    let taps = d.kh * d.kw;
    pack_columns([taps, d.c], d.co, |o, tap, i| w[(o * d.c + i) * taps + tap], arch, packed);
}

/// Packs a filter to `(blocks of outputs, columns, width)`, the order in which it is read. `columns` is
/// `[taps, channels]`, and `at(output, tap, channel)` returns an element.
fn pack_columns(
    columns: [usize; 2],
    outputs: usize,
    at: impl Fn(usize, usize, usize) -> f32 + Sync,
    arch: Arch,
    packed: &mut [f32],
) {
    let width = arch.dispatch(Width);
    let [taps, channels] = columns;
    packed.par_chunks_mut((taps * channels * width).max(1)).enumerate().each(&|(block, packed)| {
        let valid = width.min(outputs - block * width);
        for (tap, packed) in packed.chunks_exact_mut(channels * width).enumerate() {
            for (i, packed) in packed.chunks_exact_mut(width).enumerate() {
                let (packed, rest) = packed.split_at_mut(valid);
                packed.iter_mut().enumerate().for_each(|(lane, value)| *value = at(block * width + lane, tap, i));
                rest.fill(0.0);
            }
        }
    });
}

/// Writes `epilogue(conv(prologue(x), filter))` to `y`; `filter` is packed by [`pack`].
pub(super) fn convolve(
    x: &[f32],
    filter: &[f32],
    d: Dims,
    arch: Arch,
    (prologue, epilogue): (Prologue, Epilogue),
    y: &mut [f32],
) {
    assert!(epilogue.fits(d.co, y.len()) && y.len() == d.pixels() * d.co, "an output of {} for {d:?}", y.len());
    arch.dispatch(Convolve { patches: Patches::forward(x, prologue, d), filter, epilogue, co: d.co, y });
}

struct Convolve<'a> {
    patches: Patches<'a>,
    filter: &'a [f32],
    epilogue: Epilogue<'a>,
    co: usize,
    y: &'a mut [f32],
}

impl WithSimd for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { patches, filter, epilogue, co, y } = self;
        let piece = patches.piece();
        let blocks = co.div_ceil(width::<S>());
        let places = y.len() / co;
        if places.div_ceil(piece) >= 2 * rayon::current_num_threads() {
            y.par_chunks_mut(piece * co).enumerate().each(&|(i, y)| {
                convolve_pixels(simd, (&patches, filter), epilogue, i * piece, co, y);
            });
        } else {
            // Few places: the threads share the channels instead.
            with_rows(&patches, blocks * width::<S>(), places, |rows, a, m| {
                patches.gather_in_parallel(simd, 0, places, rows, a);
                let a = &*a;
                m.par_chunks_exact_mut(rows * width::<S>()).enumerate().each(&|(block, m)| {
                    multiply(simd, (filter, patches.columns()), block, places, rows, a, m);
                });
                let m = &*m;
                y.par_chunks_mut(PLACES * co).enumerate().each(&|(i, y)| {
                    for (block, m) in m.chunks_exact(rows * width::<S>()).enumerate() {
                        let (m, count) = (&m[i * PLACES * width::<S>()..], y.len() / co);
                        vectorize(
                            simd,
                            Place { m, block, epilogue, co, pixels: Pixels::All, count, first: i * PLACES, y },
                        );
                    }
                });
            });
        }
    }
}

/// Writes `epilogue` of the products of the patches from `first` on to `y`, for places and pixels that are the same in
/// number and order.
#[inline(always)]
fn convolve_pixels<S: Simd>(
    simd: S,
    (patches, filter): (&Patches, &[f32]),
    epilogue: Epilogue,
    first: usize,
    co: usize,
    y: &mut [f32],
) {
    let (count, k) = (y.len() / co, patches.columns());
    with_rows(patches, 0, count, |rows, a, _| {
        patches.gather(simd, first, count, rows, a);
        for (block, filter) in filter.chunks_exact(k * width::<S>()).enumerate() {
            vectorize(
                simd,
                ProductOfPixels { rows: count, k, a, a_stride: rows * BLOCK, b: filter, block, epilogue, first, co, y },
            );
        }
    });
}

/// Computes the products of `count` gathered patches with one block of a filter.
#[inline(always)]
fn multiply<S: Simd>(
    simd: S,
    (filter, columns): (&[f32], usize),
    block: usize,
    count: usize,
    rows: usize,
    a: &[f32],
    m: &mut [f32],
) {
    let size = columns * width::<S>();
    vectorize(
        simd,
        Product { rows: count, k: columns, a, a_stride: rows * BLOCK, b: &filter[block * size..][..size], y: m },
    );
}

/// Pixel of each place.
#[derive(Clone, Copy)]
enum Pixels {
    /// Place `i` is pixel `i`.
    All,
    /// The pixels of a class: `stride` apart from row and column `class` on, `grid_cols` in a row of `width` pixels.
    Class { stride: usize, class: [usize; 2], grid_cols: usize, width: usize },
}

impl Pixels {
    #[inline(always)]
    fn of(self, place: usize) -> usize {
        match self {
            Self::All => place,
            Self::Class { stride, class: [a, b], grid_cols, width } => {
                (place / grid_cols * stride + a) * width + place % grid_cols * stride + b
            }
        }
    }
}

/// Writes `epilogue` of a block of channels of `count` places to their pixels in `y`, which starts at output pixel
/// `first`.
struct Place<'a> {
    m: &'a [f32],
    block: usize,
    epilogue: Epilogue<'a>,
    co: usize,
    pixels: Pixels,
    count: usize,
    first: usize,
    y: &'a mut [f32],
}

impl WithSimd for Place<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { m, block, epilogue, co, pixels, count, first, y } = self;
        assert!(block * width::<S>() < co, "block {block} of {co} channels");
        let channels = width::<S>().min(co - block * width::<S>());
        assert!(channels.is_multiple_of(S::F32_LANES) && m.len() >= count * width::<S>(), "{co} channels");
        assert!(epilogue.covers(co, first * co + y.len()), "constants per channel, a residual of the output's shape");
        for place in 0..count {
            let start = pixels.of(place) * co + block * width::<S>();
            let y = &mut y[start..][..channels];
            for lane in (0..channels).step_by(S::F32_LANES) {
                let channel = block * width::<S>() + lane;
                // SAFETY: the place and the lane are in `m`, the lane in this pixel, which the epilogue covers.
                unsafe {
                    let value = load::<S>(m, place * width::<S>() + lane);
                    store::<S>(y, lane, epilogue.apply(simd, value, channel, first * co + start + lane));
                }
            }
        }
    }
}
