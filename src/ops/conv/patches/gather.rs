//! Gathers image patches into blocks of columns.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::ops::conv::Dims;
use crate::ops::conv::kernel::product::{BLOCK, SPARE_ROWS};
use crate::ops::conv::kernel::{CHANNELS, Prologue};
use crate::ops::lanes::{load, store};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::vectorize;
use crate::parallel::Each;

/// Elements of patches that a worker thread gathers at a time.
const PIECE_ELEMENTS: usize = 96 * 1024;

/// Images `(n, h, w, c)`, a grid of places over them, and the pixels of the patch at each place.
pub(super) struct Patches<'a> {
    pub x: &'a [f32],
    pub prologue: Prologue<'a>,
    pub size: [usize; 4],
    /// Rows and columns of the grid over one image.
    pub grid: [usize; 2],
    /// Pixels between neighbouring places.
    pub step: usize,
    /// Row and column of each pixel of a patch, relative to its place.
    pub taps: Vec<[isize; 2]>,
    /// Number of consecutive taps that are neighbours in a row of the image.
    pub run: usize,
}

impl<'a> Patches<'a> {
    /// Returns the patches of the forward pass.
    pub fn forward(x: &'a [f32], prologue: Prologue<'a>, d: Dims) -> Self {
        let offset = |k: usize| k as isize - d.padding as isize;
        let taps = (0..d.kh * d.kw).map(|tap| [offset(tap / d.kw), offset(tap % d.kw)]).collect();
        Self { x, prologue, size: [d.n, d.h, d.w, d.c], grid: [d.ho, d.wo], step: d.stride, taps, run: d.kw }
    }

    pub fn columns(&self) -> usize {
        self.taps.len() * self.size[3]
    }

    pub fn blocks(&self) -> usize {
        self.columns().div_ceil(BLOCK)
    }

    /// Number of places whose patches a worker thread gathers at a time.
    pub fn piece(&self) -> usize {
        (PIECE_ELEMENTS / self.columns().max(1)).clamp(24, 240).next_multiple_of(12)
    }

    /// Gathers the patches of `count` places from `first` on to `a: (blocks, rows, BLOCK)`; values beyond the last
    /// column are unspecified.
    #[inline(always)]
    pub fn gather<S: Simd>(&self, simd: S, first: usize, count: usize, rows: usize, a: &mut [f32]) {
        if self.size[3].is_multiple_of(CHANNELS) {
            for (block, a) in a.chunks_exact_mut(rows * BLOCK).enumerate() {
                vectorize(simd, GatherBlock { patches: self, block, first, count, a });
            }
        } else {
            self.gather_few(first, count, rows, a);
        }
    }

    /// Like [`Self::gather`], with the blocks shared between worker threads.
    #[inline(always)]
    pub fn gather_in_parallel<S: Simd>(&self, simd: S, first: usize, count: usize, rows: usize, a: &mut [f32]) {
        if self.size[3].is_multiple_of(CHANNELS) {
            a.par_chunks_exact_mut(rows * BLOCK).enumerate().each(&|(block, a)| {
                vectorize(simd, GatherBlock { patches: self, block, first, count, a });
            });
        } else {
            self.gather_few(first, count, rows, a);
        }
    }

    /// Image, row and column of a place.
    #[inline(always)]
    fn place(&self, place: usize) -> [usize; 3] {
        let [grid_rows, grid_cols] = self.grid;
        let row = place / grid_cols;
        [row / grid_rows, row % grid_rows, place % grid_cols]
    }

    /// The place after a place.
    #[inline(always)]
    fn next(&self, [image, row, column]: [usize; 3]) -> [usize; 3] {
        let [grid_rows, grid_cols] = self.grid;
        if column + 1 < grid_cols {
            [image, row, column + 1]
        } else if row + 1 < grid_rows {
            [image, row + 1, 0]
        } else {
            [image + 1, 0, 0]
        }
    }

    /// Index of the first channel of the pixel at an offset from a place, if it is inside the image.
    #[inline(always)]
    fn pixel(&self, [image, row, column]: [usize; 3], [dy, dx]: [isize; 2]) -> Option<usize> {
        let [_, h, w, c] = self.size;
        // Negative coordinates wrap to values beyond every image.
        let (y, x) = ((row * self.step).wrapping_add_signed(dy), (column * self.step).wrapping_add_signed(dx));
        (y < h && x < w).then(|| ((image * h + y) * w + x) * c)
    }

    /// Like [`Self::gather`], for any number of channels: taps that are neighbours in the image are copied together.
    fn gather_few(&self, first: usize, count: usize, rows: usize, a: &mut [f32]) {
        let c = self.size[3];
        assert!(self.prologue.is_identity(), "a prologue of {c} channels");
        let mut of_grid = self.place(first);
        for place in 0..count {
            let at = |column: usize| (column / BLOCK * rows + place) * BLOCK + column % BLOCK;
            for (run, taps) in self.taps.chunks(self.run).enumerate() {
                let (column, len) = (run * self.run * c, taps.len() * c);
                let ends = (self.pixel(of_grid, taps[0]), self.pixel(of_grid, taps[taps.len() - 1]));
                if let ((Some(start), Some(_)), true) = (ends, column / BLOCK == (column + len - 1) / BLOCK) {
                    a[at(column)..][..len].copy_from_slice(&self.x[start..][..len]);
                    continue;
                }
                for (k, tap) in taps.iter().enumerate() {
                    let pixel = self.pixel(of_grid, *tap);
                    for channel in 0..c {
                        a[at(column + k * c + channel)] = pixel.map_or(0.0, |pixel| self.x[pixel + channel]);
                    }
                }
            }
            of_grid = self.next(of_grid);
        }
    }
}

/// Gathers one block of columns of `count` places from `first` on, for full vectors of channels.
struct GatherBlock<'a> {
    patches: &'a Patches<'a>,
    block: usize,
    first: usize,
    count: usize,
    a: &'a mut [f32],
}

impl WithSimd for GatherBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { patches, block, first, count, a } = self;
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
            let offset = patches.taps[tap];
            let mut of_grid = patches.place(first);
            for place in 0..count {
                let pixel = patches.pixel(of_grid, offset);
                of_grid = patches.next(of_grid);
                for lane in (0..len).step_by(S::F32_LANES) {
                    // SAFETY: the pixel and its channels are in `x`, the channels in the constants; the place and the
                    // column are in `a`, whose rows are whole vectors.
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

/// Calls `f(rows, a, m)` with scratch buffers for the patches of `count` places and for `outputs` values per place.
pub(super) fn with_rows(
    patches: &Patches,
    outputs: usize,
    count: usize,
    f: impl FnOnce(usize, &mut [f32], &mut [f32]),
) {
    let rows = count.next_multiple_of(SPARE_ROWS);
    let a = patches.blocks() * rows * BLOCK;
    with_scratch(a + rows * outputs, |scratch| {
        let (a, m) = scratch.split_at_mut(a);
        f(rows, a, m);
    });
}
