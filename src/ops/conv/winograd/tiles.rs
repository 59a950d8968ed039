//! Where the 4x4 tiles of an output are, and the way of their values into and out of the transformed domain.

use super::transform;
use crate::ops::conv::Dims;
use crate::ops::conv::kernel::lanes::{load, store};
use crate::ops::conv::kernel::product::{BLOCK, SPARE_ROWS, width};
use crate::ops::conv::kernel::{Epilogue, Prologue};
use crate::ops::simd::kernel;

/// Products of a tile: its transform is 6x6.
pub(super) const POSITIONS: usize = 36;

/// A matrix for each of the 36 products: `(36, rows, columns)`, a little apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planes {
    rows: usize,
    columns: usize,
}

impl Planes {
    /// Between planes: at multiples of the page's size, stores to one place in each would fall into one set of the cache.
    const GAP: usize = 16;

    /// With room for `tiles` rows and the spare ones of a product.
    pub fn new(tiles: usize, columns: usize) -> Self {
        Self { rows: tiles.next_multiple_of(SPARE_ROWS), columns }
    }

    /// Elements of all planes.
    pub fn len(&self) -> usize {
        POSITIONS * (self.rows * self.columns + Self::GAP)
    }

    /// Where a row of a plane begins.
    pub fn at(&self, position: usize, row: usize) -> usize {
        position * (self.rows * self.columns + Self::GAP) + row * self.columns
    }
}

/// The tiles of a batch, row after row of image after image; those at the right and at the bottom may hang over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    d: Dims,
    /// Rows of tiles of an image.
    rows: usize,
    /// Tiles of a row.
    pub cols: usize,
}

impl Tiling {
    pub fn new(d: Dims) -> Self {
        Self { d, rows: d.ho.div_ceil(4), cols: d.wo.div_ceil(4) }
    }

    /// Rows of tiles of the whole batch.
    pub fn num_rows(&self) -> usize {
        self.d.n * self.rows
    }

    pub fn num_tiles(&self) -> usize {
        self.num_rows() * self.cols
    }

    /// The output pixel at which row `row` of tiles starts, and the number of pixels if there is no such row.
    pub fn first_pixel(&self, row: usize) -> usize {
        (row / self.rows * self.d.ho + row % self.rows * 4) * self.d.wo
    }

    /// Image, output row and output column of a tile.
    fn place(&self, tile: usize) -> [usize; 3] {
        let (row, col) = (tile / self.cols, tile % self.cols);
        [row / self.rows, row % self.rows * 4, col * 4]
    }
}

kernel! {
    /// Transforms block `block` of the channels of `count` tiles from `first` on.
    ///
    /// `v`: [`Planes`] of [`BLOCK`] columns, with a tile a row.
    pub(super) fn gather<S>(simd, tiling: &'a Tiling, x: &'a [f32], prologue: Prologue<'a>, block: usize, tiles: [usize; 2], planes: Planes, v: &'a mut [f32]) {
        let [first, count] = tiles;
        let d = &tiling.d;
        let channels = BLOCK.min(d.c - block * BLOCK);
        assert!(count <= planes.rows && first + count <= tiling.num_tiles(), "tiles {first} and {count} more");
        assert!(planes.columns == BLOCK && v.len() >= planes.len(), "{planes:?} in {} elements", v.len());
        assert!(x.len() >= d.n * d.h * d.w * d.c && channels.is_multiple_of(S::F32_LANES), "{d:?}");
        assert!(prologue.fits(d.c), "constants per channel");
        for tile in 0..count {
            let [image, oy, ox] = tiling.place(first + tile);
            // Where each of the 6x6 pixels starts; outside the image there is none.
            let inside = |at: usize, i: usize, end: usize| (at + i).checked_sub(d.padding).filter(|&at| at < end);
            let pixel = |i, j| Some(((image * d.h + inside(oy, i, d.h)?) * d.w + inside(ox, j, d.w)?) * d.c);
            let pixels: [[Option<usize>; 6]; 6] = std::array::from_fn(|j| std::array::from_fn(|i| pixel(i, j)));
            for lane in (0..channels).step_by(S::F32_LANES) {
                let channel = block * BLOCK + lane;
                let zero = simd.splat_f32s(0.0);
                let mut half = [[zero; 6]; 6];
                for (j, pixels) in pixels.iter().enumerate() {
                    let mut column = [zero; 6];
                    // Loops, not closures: what is not inlined here loses the vectors of the machine.
                    for (value, pixel) in column.iter_mut().zip(pixels) {
                        if let Some(at) = pixel {
                            // SAFETY: pixels start inside `x`, which holds all their channels; so do the constants.
                            *value = unsafe { prologue.apply(simd, load::<S>(x, at + channel), channel) };
                        }
                    }
                    for (half, value) in half.iter_mut().zip(transform::input(simd, column)) {
                        half[j] = value;
                    }
                }
                for (i, half) in half.into_iter().enumerate() {
                    for (j, value) in transform::input(simd, half).into_iter().enumerate() {
                        // SAFETY: the position is below 36, the tile one of the rows and the lane below BLOCK.
                        unsafe { store::<S>(v, planes.at(6 * i + j, tile) + lane, value) };
                    }
                }
            }
        }
    }
}

kernel! {
    /// Transforms back block `block` of the output channels of `count` tiles from `first` on.
    ///
    /// - `m`: [`Planes`] of [`width`] columns, with a tile a row, the first in row `m_row`
    /// - `y`: the output from pixel `start` on
    pub(super) fn scatter<S>(simd, tiling: &'a Tiling, planes: Planes, m_row: usize, m: &'a [f32], epilogue: Epilogue<'a>, block: usize, tiles: [usize; 2], start: usize, y: &'a mut [f32]) {
        let [first, count] = tiles;
        let d = &tiling.d;
        let width = width::<S>();
        let channels = width.min(d.co - block * width);
        let last = if count == 0 { start } else { tiling.first_pixel((first + count - 1) / tiling.cols + 1) };
        assert!(
            m_row + count <= planes.rows && tiling.first_pixel(first / tiling.cols) >= start,
            "tiles {first} and {count} more"
        );
        assert!(planes.columns == width && m.len() >= planes.len(), "{planes:?} in {} elements", m.len());
        assert!(y.len() >= (last - start) * d.co && channels.is_multiple_of(S::F32_LANES), "{d:?}");
        assert!(epilogue.fits(d.co, d.pixels() * d.co), "constants per channel, a residual of the output's shape");
        for tile in 0..count {
            let [image, oy, ox] = tiling.place(first + tile);
            for lane in (0..channels).step_by(S::F32_LANES) {
                let channel = block * width + lane;
                let mut half = [[simd.splat_f32s(0.0); 6]; 4];
                for j in 0..6 {
                    let mut column = [simd.splat_f32s(0.0); 6];
                    for (i, value) in column.iter_mut().enumerate() {
                        // SAFETY: the position is below 36, the tile one of the rows and the lane below the width.
                        *value = unsafe { load::<S>(m, planes.at(6 * i + j, m_row + tile) + lane) };
                    }
                    for (half, value) in half.iter_mut().zip(transform::output(simd, column)) {
                        half[j] = value;
                    }
                }
                for (i, half) in half.into_iter().enumerate().take(d.ho - oy) {
                    let row = ((image * d.ho + oy + i) * d.wo + ox) * d.co + channel;
                    for (j, mut value) in transform::output(simd, half).into_iter().enumerate().take(d.wo - ox) {
                        let at = row + j * d.co;
                        // SAFETY: constants have an element per channel; the pixel is one of the tiles', which `y` and the
                        // residual hold.
                        unsafe {
                            value = epilogue.apply(simd, value, channel, at);
                            store::<S>(y, at - start * d.co, value);
                        }
                    }
                }
            }
        }
    }
}

kernel! {
    /// Transforms block `block` of the channels of the output's gradient, for the gradient of the weight.
    ///
    /// `m`: [`Planes`] of [`width`] columns, with a tile a row; channels beyond the last become zeros.
    pub(super) fn gather_gradient<S>(simd, tiling: &'a Tiling, gy: &'a [f32], block: usize, tiles: [usize; 2], planes: Planes, m: &'a mut [f32]) {
        let [first, count] = tiles;
        let d = &tiling.d;
        let width = width::<S>();
        let channels = width.min(d.co - block * width);
        assert!(count <= planes.rows && first + count <= tiling.num_tiles(), "tiles {first} and {count} more");
        assert!(planes.columns == width && m.len() >= planes.len(), "{planes:?} in {} elements", m.len());
        assert!(gy.len() >= d.pixels() * d.co && channels.is_multiple_of(S::F32_LANES), "{d:?}");
        for tile in 0..count {
            let [image, oy, ox] = tiling.place(first + tile);
            let pixel = |i: usize, j: usize| {
                (oy + i < d.ho && ox + j < d.wo).then(|| ((image * d.ho + oy + i) * d.wo + ox + j) * d.co)
            };
            let pixels: [[Option<usize>; 4]; 4] = std::array::from_fn(|j| std::array::from_fn(|i| pixel(i, j)));
            for lane in (0..width).step_by(S::F32_LANES) {
                let zero = simd.splat_f32s(0.0);
                let mut half = [[zero; 4]; 6];
                for (j, pixels) in pixels.iter().enumerate() {
                    let mut column = [zero; 4];
                    for (value, pixel) in column.iter_mut().zip(pixels) {
                        if let Some(at) = pixel.filter(|_| lane < channels) {
                            // SAFETY: the pixel starts inside `gy`, which holds all its channels.
                            *value = unsafe { load::<S>(gy, at + block * width + lane) };
                        }
                    }
                    for (half, value) in half.iter_mut().zip(transform::output_adjoint(simd, column)) {
                        half[j] = value;
                    }
                }
                for (i, half) in half.into_iter().enumerate() {
                    for (j, value) in transform::output_adjoint(simd, half).into_iter().enumerate() {
                        // SAFETY: the position is below 36, the tile one of the rows and the lane below the width.
                        unsafe { store::<S>(m, planes.at(6 * i + j, tile) + lane, value) };
                    }
                }
            }
        }
    }
}
