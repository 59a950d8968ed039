//! Convolutions of any stride and kernel in f32, as products of gathered patches: forward and for both gradients.
//!
//! A worker gathers the patches of some places into blocks of columns that stay in its cache. The gradient of the input
//! is gathered too: its pixels fall into classes by their place within a stride, and every pixel of a class sees the same
//! taps. Sums run in an order that depends on the sizes only.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::Dims;
use super::kernel::product::{BLOCK, SPARE_ROWS, product, product_of_pixels, transposed_product, width};
use super::kernel::{CHANNELS, Epilogue, Prologue, Width};
use crate::ops::lanes::{load, store};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::kernel;

/// Elements of the patches that a worker gathers at once.
const PIECE_ELEMENTS: usize = 96 * 1024;
/// Largest filter whose gradient is summed up by each of some workers, in elements, and their number.
const MAX_SUM_ELEMENTS: usize = 1 << 19;
const NUM_SUMS: usize = 8;
/// Elements of the patches that the gradient of a larger filter gathers at once.
const GROUP_ELEMENTS: usize = 4 << 20;
/// Places whose results a worker moves to the output at once, where there are few.
const PLACES: usize = 48;

/// Whether a convolution can be computed this way; the gradient of the input only with whole vectors of it.
pub(super) fn fits(d: Dims) -> bool {
    d.groups == 1 && d.co.is_multiple_of(CHANNELS)
}

/// Elements of a packed filter of `columns` for each of `outputs`.
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
    // Columns are taps of channels.
    pack_columns(d.patch(), d.co, |o, column| w[(o * d.c + column % d.c) * taps + column / d.c], arch, packed);
}

/// Packs `columns` of each output to `(blocks of outputs, columns, width)`, the order in which they are read.
fn pack_columns(
    columns: usize,
    outputs: usize,
    at: impl Fn(usize, usize) -> f32 + Sync,
    arch: Arch,
    packed: &mut [f32],
) {
    let width = arch.dispatch(Width);
    packed.par_chunks_mut((columns * width).max(1)).enumerate().for_each(|(block, packed)| {
        for lane in 0..width {
            let o = block * width + lane;
            for column in 0..columns {
                packed[column * width + lane] = if o < outputs { at(o, column) } else { 0.0 };
            }
        }
    });
}

/// Images `(n, h, w, c)`, and for each place of a grid over them the pixels of its patch.
struct Patches<'a> {
    x: &'a [f32],
    prologue: Prologue<'a>,
    size: [usize; 4],
    /// Rows and columns of places of an image.
    grid: [usize; 2],
    /// Pixels between neighbouring places.
    step: usize,
    /// Row and column of each pixel, from the place on.
    taps: Vec<[isize; 2]>,
    /// So many taps at a time are neighbours in a row of the image.
    run: usize,
}

impl<'a> Patches<'a> {
    /// Those of the forward pass.
    fn forward(x: &'a [f32], prologue: Prologue<'a>, d: Dims) -> Self {
        let offset = |k: usize| k as isize - d.padding as isize;
        let taps = (0..d.kh * d.kw).map(|tap| [offset(tap / d.kw), offset(tap % d.kw)]).collect();
        Self { x, prologue, size: [d.n, d.h, d.w, d.c], grid: [d.ho, d.wo], step: d.stride, taps, run: d.kw }
    }

    fn columns(&self) -> usize {
        self.taps.len() * self.size[3]
    }

    fn blocks(&self) -> usize {
        self.columns().div_ceil(BLOCK)
    }

    /// Places whose patches a worker gathers at once.
    fn piece(&self) -> usize {
        (PIECE_ELEMENTS / self.columns().max(1)).clamp(24, 240).next_multiple_of(12)
    }

    /// Gathers the patches of `count` places from `first` on: `a` is `(blocks, rows, BLOCK)`, and what is beyond the last
    /// column may be anything.
    #[inline(always)]
    fn gather<S: Simd>(&self, simd: S, first: usize, count: usize, rows: usize, a: &mut [f32]) {
        if self.size[3].is_multiple_of(CHANNELS) {
            for (block, a) in a.chunks_exact_mut(rows * BLOCK).enumerate() {
                gather_block(simd, self, block, first, count, a);
            }
        } else {
            self.gather_few(first, count, rows, a);
        }
    }

    /// As [`Self::gather`], the blocks shared out.
    #[inline(always)]
    fn gather_in_parallel<S: Simd>(&self, simd: S, first: usize, count: usize, rows: usize, a: &mut [f32]) {
        if self.size[3].is_multiple_of(CHANNELS) {
            a.par_chunks_exact_mut(rows * BLOCK).enumerate().for_each(|(block, a)| {
                gather_block(simd, self, block, first, count, a);
            });
        } else {
            self.gather_few(first, count, rows, a);
        }
    }

    /// Where the pixel at an offset from a place begins, if it is inside.
    #[inline(always)]
    fn pixel(&self, place: usize, [dy, dx]: [isize; 2]) -> Option<usize> {
        let ([_, h, w, c], [grid_rows, grid_cols]) = (self.size, self.grid);
        let (row, column) = (place / grid_cols, place % grid_cols);
        let (image, row) = (row / grid_rows, row % grid_rows);
        let y = (row * self.step).checked_add_signed(dy).filter(|&y| y < h)?;
        let x = (column * self.step).checked_add_signed(dx).filter(|&x| x < w)?;
        Some(((image * h + y) * w + x) * c)
    }

    /// As [`Self::gather`] for any number of channels: taps that are neighbours in the image are copied together.
    fn gather_few(&self, first: usize, count: usize, rows: usize, a: &mut [f32]) {
        let c = self.size[3];
        assert!(self.prologue.is_identity(), "a prologue of {c} channels");
        for place in 0..count {
            let at = |column: usize| (column / BLOCK * rows + place) * BLOCK + column % BLOCK;
            for (run, taps) in self.taps.chunks(self.run).enumerate() {
                let (column, len) = (run * self.run * c, taps.len() * c);
                let ends = (self.pixel(first + place, taps[0]), self.pixel(first + place, taps[taps.len() - 1]));
                if let ((Some(start), Some(_)), true) = (ends, column / BLOCK == (column + len - 1) / BLOCK) {
                    a[at(column)..][..len].copy_from_slice(&self.x[start..][..len]);
                    continue;
                }
                for (k, tap) in taps.iter().enumerate() {
                    let pixel = self.pixel(first + place, *tap);
                    for channel in 0..c {
                        a[at(column + k * c + channel)] = pixel.map_or(0.0, |pixel| self.x[pixel + channel]);
                    }
                }
            }
        }
    }
}

kernel! {
    /// Gathers one block of columns of `count` places from `first` on, for whole vectors of channels.
    fn gather_block<S>(simd, patches: &'a Patches<'a>, block: usize, first: usize, count: usize, a: &'a mut [f32]) {
        let ([n, h, w, c], [grid_rows, grid_cols]) = (patches.size, patches.grid);
        let (x, prologue) = (patches.x, patches.prologue);
        assert!(x.len() >= n * h * w * c && first + count <= n * grid_rows * grid_cols, "{:?}", patches.size);
        assert!(a.len() >= count * BLOCK && prologue.fits(c) && c.is_multiple_of(S::F32_LANES), "{c} channels");
        let last = ((block + 1) * BLOCK).min(patches.columns());
        let mut column = block * BLOCK;
        while column < last {
            // The channels of one tap that are in this block.
            let (tap, channel) = (column / c, column % c);
            let len = (c - channel).min(last - column);
            for place in 0..count {
                let pixel = patches.pixel(first + place, patches.taps[tap]);
                for lane in (0..len).step_by(S::F32_LANES) {
                    // SAFETY: the pixel and its channels are in `x`, the channels in the constants; the place and the column
                    // in `a`, whose rows are whole vectors.
                    unsafe {
                        let value = match pixel {
                            Some(at) => prologue.apply(simd, load::<S>(x, at + channel + lane), channel + lane),
                            None => simd.splat_f32s(0.0),
                        };
                        store::<S>(a, place * BLOCK + column % BLOCK + lane, value);
                    }
                }
            }
            column += len;
        }
    }
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
            y.par_chunks_mut(piece * co).enumerate().for_each(|(i, y)| {
                let count = y.len() / co;
                with_rows(&patches, 0, count, |rows, a, _| {
                    patches.gather(simd, i * piece, count, rows, a);
                    let (k, size) = (patches.columns(), patches.columns() * width::<S>());
                    for (block, filter) in filter.chunks_exact(size).enumerate() {
                        let stride = rows * BLOCK;
                        product_of_pixels(simd, count, k, a, stride, filter, block, epilogue, i * piece, co, y);
                    }
                });
            });
        } else {
            // Few places: the channels are shared out instead.
            with_rows(&patches, blocks * width::<S>(), places, |rows, a, m| {
                patches.gather_in_parallel(simd, 0, places, rows, a);
                let a = &*a;
                m.par_chunks_exact_mut(rows * width::<S>()).enumerate().for_each(|(block, m)| {
                    multiply(simd, (filter, patches.columns()), block, places, rows, a, m);
                });
                let m = &*m;
                y.par_chunks_mut(PLACES * co).enumerate().for_each(|(i, y)| {
                    for (block, m) in m.chunks_exact(rows * width::<S>()).enumerate() {
                        place(simd, &m[i * PLACES * width::<S>()..], block, epilogue, i * PLACES, co, y);
                    }
                });
            });
        }
    }
}

/// Calls `f(rows, a, m)` with room for the patches of `count` places and for as many rows of `outputs`.
fn with_rows(patches: &Patches, outputs: usize, count: usize, f: impl FnOnce(usize, &mut [f32], &mut [f32])) {
    let rows = count.next_multiple_of(SPARE_ROWS);
    let a = patches.blocks() * rows * BLOCK;
    with_scratch(a + rows * outputs, |scratch| {
        let (a, m) = scratch.split_at_mut(a);
        f(rows, a, m);
    });
}

/// The products of `count` gathered patches with one block of a filter.
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
    product(simd, count, columns, a, rows * BLOCK, &filter[block * size..][..size], m);
}

kernel! {
    /// Moves a block of output channels of the places from `first` on to their places in `y`.
    fn place<S>(simd, m: &'a [f32], block: usize, epilogue: Epilogue<'a>, first: usize, co: usize, y: &'a mut [f32]) {
        let channels = width::<S>().min(co - block * width::<S>());
        assert!(m.len() >= y.len() / co * width::<S>() && channels.is_multiple_of(S::F32_LANES), "{co} channels");
        for place in 0..y.len() / co {
            for lane in (0..channels).step_by(S::F32_LANES) {
                let (channel, at) = (block * width::<S>() + lane, place * co + block * width::<S>() + lane);
                // SAFETY: the place and the lane are in `m`, the place and the channel in `y`; `convolve` checked the epilogue.
                unsafe {
                    let value = load::<S>(m, place * width::<S>() + lane);
                    store::<S>(y, at, epilogue.apply(simd, value, channel, first * co + at));
                }
            }
        }
    }
}

/// Writes the gradient of the input, from that of the output, and `epilogue` of it to `gx`.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims, arch: Arch, epilogue: Epilogue, gx: &mut [f32]) {
    assert!(epilogue.fits(d.c, gx.len()) && gx.len() == d.n * d.h * d.w * d.c, "a gradient of {}", gx.len());
    let s = d.stride;
    for class in 0..s * s {
        let [a, b] = [class / s, class % s];
        // Tap (ky, kx) reaches pixel (y, x) from output ((y + padding - ky) / stride, ..), if that is whole.
        let offset = |at: usize, k: usize| {
            let distance = (at + d.padding) as isize - k as isize;
            (distance % s as isize == 0).then_some(distance / s as isize)
        };
        let seen = |tap: &usize| Some([offset(a, tap / d.kw)?, offset(b, tap % d.kw)?]);
        let taps: Vec<usize> = (0..d.kh * d.kw).filter(|tap| seen(tap).is_some()).collect();
        let grid = [d.h.saturating_sub(a).div_ceil(s), d.w.saturating_sub(b).div_ceil(s)];
        if grid.contains(&0) {
            continue;
        }
        let columns = taps.len() * d.co;
        with_scratch(packed_len(columns, d.c, arch), |filter| {
            let at = |i, column: usize| w[(column % d.co * d.c + i) * d.kh * d.kw + taps[column / d.co]];
            pack_columns(columns, d.c, at, arch, filter);
            let offsets = taps.iter().filter_map(seen).collect();
            let (size, prologue) = ([d.n, d.ho, d.wo, d.co], Prologue::default());
            let patches = Patches { x: gy, prologue, size, grid, step: 1, taps: offsets, run: 1 };
            arch.dispatch(GradX { patches, filter, d, class: [a, b], epilogue, gx });
        });
    }
}

/// The pixels of one class.
struct GradX<'a> {
    patches: Patches<'a>,
    filter: &'a [f32],
    d: Dims,
    class: [usize; 2],
    epilogue: Epilogue<'a>,
    gx: &'a mut [f32],
}

impl WithSimd for GradX<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { patches, filter, d, class: [a, b], epilogue, gx } = self;
        let [grid_rows, grid_cols] = patches.grid;
        let blocks = d.c.div_ceil(width::<S>());
        // Some rows of places at a time, which are as many rows of pixels.
        let per_piece = (patches.piece() / grid_cols).clamp(1, grid_rows);
        let piece_rows = per_piece * d.stride;
        let pieces: Vec<_> = gx
            .chunks_mut(d.h * d.w * d.c)
            .enumerate()
            .flat_map(|(image, gx)| {
                let rows = gx.chunks_mut(piece_rows * d.w * d.c).enumerate();
                rows.map(move |(i, gx)| (image, i * per_piece, gx))
            })
            .collect();
        pieces.into_par_iter().for_each(|(image, row, gx)| {
            let count = per_piece.min(grid_rows.saturating_sub(row)) * grid_cols;
            if count == 0 {
                return;
            }
            let first_pixel = (image * d.h + row * d.stride) * d.w;
            if d.stride == 1 && !patches.taps.is_empty() {
                // One class: its places are the pixels.
                return with_rows(&patches, 0, count, |rows, a, _| {
                    patches.gather(simd, first_pixel, count, rows, a);
                    let (k, size) = (patches.columns(), patches.columns() * width::<S>());
                    for (block, filter) in filter.chunks_exact(size).enumerate() {
                        let stride = rows * BLOCK;
                        product_of_pixels(simd, count, k, a, stride, filter, block, epilogue, first_pixel, d.c, gx);
                    }
                });
            }
            with_rows(&patches, blocks * width::<S>(), count, |rows, buffer, m| {
                patches.gather(simd, (image * grid_rows + row) * grid_cols, count, rows, buffer);
                for (block, m) in m.chunks_exact_mut(rows * width::<S>()).enumerate() {
                    if patches.taps.is_empty() {
                        // No output saw these pixels.
                        m.fill(0.0);
                    } else {
                        multiply(simd, (filter, patches.columns()), block, count, rows, buffer, m);
                    }
                    place_class(simd, m, block, epilogue, d, [a, b], grid_cols, count, first_pixel, gx);
                }
            });
        });
    }
}

kernel! {
    /// Moves a block of channels of `count` places of a class to their pixels, the first of which is `first_pixel`.
    fn place_class<S>(
        simd,
        m: &'a [f32],
        block: usize,
        epilogue: Epilogue<'a>,
        d: Dims,
        class: [usize; 2],
        grid_cols: usize,
        count: usize,
        first_pixel: usize,
        gx: &'a mut [f32],
    ) {
        let channels = width::<S>().min(d.c - block * width::<S>());
        assert!(channels.is_multiple_of(S::F32_LANES) && m.len() >= count * width::<S>(), "{} channels", d.c);
        for place in 0..count {
            let (y, x) = (place / grid_cols * d.stride + class[0], place % grid_cols * d.stride + class[1]);
            let first = (y * d.w + x) * d.c + block * width::<S>();
            let gx = &mut gx[first..][..channels];
            for lane in (0..channels).step_by(S::F32_LANES) {
                let channel = block * width::<S>() + lane;
                // SAFETY: the place and the lane are in `m`, the lane in this pixel; `grad_x` checked the epilogue for all
                // pixels and channels.
                unsafe {
                    let value = load::<S>(m, place * width::<S>() + lane);
                    let at = first_pixel * d.c + first + lane;
                    store::<S>(gx, lane, epilogue.apply(simd, value, channel, at));
                }
            }
        }
    }
}

/// Writes the gradient of the weight, `(co, c, kh, kw)`, for the convolution of `prologue(x)`.
pub(super) fn grad_w(x: &[f32], prologue: Prologue, gy: &[f32], d: Dims, arch: Arch, gw: &mut [f32]) {
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
        // (sums, blocks of outputs, blocks of columns, BLOCK, width)
        let size = BLOCK * width::<S>();
        let few = blocks * o_blocks * size <= MAX_SUM_ELEMENTS;
        let num_sums = if few { NUM_SUMS } else { 1 };
        with_scratch(num_sums * o_blocks * blocks * size, |sums| {
            sums.par_chunks_mut(size).for_each(|sums| sums.fill(0.0));
            if few {
                self.by_sums(simd, sums)
            } else {
                self.by_blocks(simd, sums)
            }
            let taps = d.kh * d.kw;
            self.gw.par_chunks_mut(d.c * taps).enumerate().for_each(|(o, gw)| {
                for (i, gw) in gw.iter_mut().enumerate() {
                    let column = i % taps * d.c + i / taps;
                    let at = (o / width::<S>() * blocks + column / BLOCK) * size
                        + column % BLOCK * width::<S>()
                        + o % width::<S>();
                    *gw = (0..num_sums).map(|sum| sums[sum * o_blocks * blocks * size + at]).sum();
                }
            });
        });
    }
}

impl GradW<'_> {
    /// A small filter: each sum takes its share of the places, some at a time.
    #[inline(always)]
    fn by_sums<S: Simd>(&self, simd: S, sums: &mut [f32]) {
        let Self { patches, gy, d, .. } = self;
        let (piece, share) = (patches.piece(), d.pixels().div_ceil(NUM_SUMS));
        let o_blocks = d.co.div_ceil(width::<S>());
        sums.par_chunks_mut(sums.len() / NUM_SUMS).enumerate().for_each(|(i, sums)| {
            let last = ((i + 1) * share).min(d.pixels());
            for first in (i * share..last).step_by(piece) {
                let count = piece.min(last - first);
                with_rows(patches, o_blocks * width::<S>(), count, |rows, a, m| {
                    patches.gather(simd, first, count, rows, a);
                    let mut sums = sums.chunks_exact_mut(BLOCK * width::<S>());
                    for (block, m) in m.chunks_exact_mut(rows * width::<S>()).enumerate() {
                        split(simd, gy, d.co, block, first, count, m);
                        for (a, sum) in a.chunks_exact(rows * BLOCK).zip(&mut sums) {
                            transposed_product(simd, count, a, m, sum);
                        }
                    }
                });
            }
        });
    }

    /// A large one: workers share out its blocks.
    #[inline(always)]
    fn by_blocks<S: Simd>(&self, simd: S, sums: &mut [f32]) {
        let Self { patches, gy, d, .. } = self;
        let (blocks, o_blocks) = (patches.blocks(), d.co.div_ceil(width::<S>()));
        let group = (GROUP_ELEMENTS / patches.columns()).max(64);
        for first in (0..d.pixels()).step_by(group) {
            let count = group.min(d.pixels() - first);
            with_rows(patches, o_blocks * width::<S>(), count, |rows, a, m| {
                patches.gather_in_parallel(simd, first, count, rows, a);
                m.par_chunks_exact_mut(rows * width::<S>()).enumerate().for_each(|(block, m)| {
                    split(simd, gy, d.co, block, first, count, m);
                });
                let (a, m) = (&*a, &*m);
                sums.par_chunks_exact_mut(BLOCK * width::<S>()).enumerate().for_each(|(i, sum)| {
                    let a = &a[i % blocks * rows * BLOCK..][..rows * BLOCK];
                    let m = &m[i / blocks * rows * width::<S>()..][..rows * width::<S>()];
                    transposed_product(simd, count, a, m, sum);
                });
            });
        }
    }
}

kernel! {
    /// Copies a block of the channels of `count` pixels from `first` on; channels beyond the last become zeros.
    fn split<S>(simd, gy: &'a [f32], co: usize, block: usize, first: usize, count: usize, m: &'a mut [f32]) {
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
