//! Positions of an output's tiles, and the transforms of their values into and out of the transformed domain.

#![allow(clippy::needless_range_loop, reason = "what iterators do not inline loses the machine's vectors")]

use pulp::{Simd, WithSimd};

use super::transform;
use crate::ops::conv::Dims;
use crate::ops::conv::kernel::product::{BLOCK, SPARE_ROWS, width};
use crate::ops::conv::kernel::{Epilogue, Prologue};
use crate::ops::lanes::{load, store};

/// One matrix per position of a tile, `(positions, rows, columns)`, with a small gap after each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planes {
    positions: usize,
    rows: usize,
    columns: usize,
}

impl Planes {
    /// Elements between planes. If planes were multiples of a page apart, stores to the same place in each would
    /// compete for one set of the cache.
    const GAP: usize = 16;

    /// Returns planes with room for `tiles` rows and the spare rows of a product.
    pub fn new(positions: usize, tiles: usize, columns: usize) -> Self {
        Self { positions, rows: tiles.next_multiple_of(SPARE_ROWS), columns }
    }

    /// Number of elements of all planes, gaps included.
    pub fn len(&self) -> usize {
        self.positions * (self.rows * self.columns + Self::GAP)
    }

    /// Index of the first element of a row of a plane.
    pub fn at(&self, position: usize, row: usize) -> usize {
        position * (self.rows * self.columns + Self::GAP) + row * self.columns
    }
}

/// The tiles of a batch, image by image and row by row; those at the right and bottom edges may extend beyond the
/// output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    d: Dims,
    /// Side of a tile in output pixels.
    side: usize,
    /// Rows of tiles of an image.
    rows: usize,
    /// Tiles in a row.
    pub cols: usize,
}

impl Tiling {
    pub fn new(d: Dims, side: usize) -> Self {
        Self { d, side, rows: d.ho.div_ceil(side), cols: d.wo.div_ceil(side) }
    }

    /// Number of rows of tiles in the batch.
    pub fn num_rows(&self) -> usize {
        self.d.n * self.rows
    }

    pub fn num_tiles(&self) -> usize {
        self.num_rows() * self.cols
    }

    /// Index of the output pixel at which row `row` of tiles starts; the number of pixels for the row after the last.
    pub fn first_pixel(&self, row: usize) -> usize {
        (row / self.rows * self.d.ho + row % self.rows * self.side) * self.d.wo
    }

    /// Image, output row and output column of a tile.
    fn place(&self, tile: usize) -> [usize; 3] {
        let (row, col) = (tile / self.cols, tile % self.cols);
        [row / self.rows, row % self.rows * self.side, col * self.side]
    }
}

/// Transforms block `block` of the channels of the input tiles `[first, count]`: `count` tiles from `first` on.
///
/// `v`: [`Planes`] of [`BLOCK`] columns, one tile per row.
pub(super) struct Gather<'a, const N: usize> {
    pub tiling: &'a Tiling,
    pub x: &'a [f32],
    pub prologue: Prologue<'a>,
    pub block: usize,
    pub tiles: [usize; 2],
    pub planes: Planes,
    pub v: &'a mut [f32],
}

impl<const N: usize> WithSimd for Gather<'_, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tiling, x, prologue, block, tiles, planes, v } = self;
        let [first, count] = tiles;
        let d = &tiling.d;
        assert!(block * BLOCK < d.c, "block {block} of {d:?}");
        let channels = BLOCK.min(d.c - block * BLOCK);
        assert!(count <= planes.rows && first + count <= tiling.num_tiles(), "tiles {first} and {count} more");
        assert!(tiling.side + 2 == N && planes.positions == N * N, "{planes:?} of {N} points");
        assert!(planes.columns == BLOCK && v.len() >= planes.len(), "{planes:?} in {} elements", v.len());
        assert!(x.len() >= d.n * d.h * d.w * d.c && channels.is_multiple_of(S::F32_LANES), "{d:?}");
        assert!(prologue.fits(d.c), "constants per channel");
        for tile in 0..count {
            let [image, oy, ox] = tiling.place(first + tile);
            // The tile is NxN pixels from row `oy - padding` and column `ox - padding` on; the ranges below are inside
            // the image.
            let inside =
                |at: usize, len: usize| (d.padding.saturating_sub(at), (len + d.padding).saturating_sub(at).min(N));
            let ((top, bottom), (left, right)) = (inside(oy, d.h), inside(ox, d.w));
            let is_whole = (top, bottom, left, right) == (0, N, 0, N);
            let corner = ((image * d.h + oy) * d.w + ox) * d.c;
            for lane in (0..channels).step_by(S::F32_LANES) {
                let channel = block * BLOCK + lane;
                let zero = simd.splat_f32s(0.0);
                let mut half = [[zero; N]; N];
                for j in 0..N {
                    let mut column = [zero; N];
                    // SAFETY: `x` holds these pixels with all their channels, and the constants hold the channels.
                    unsafe {
                        let pixel = |i: usize| corner + (i * d.w + j) * d.c - d.padding * (d.w + 1) * d.c + channel;
                        if is_whole {
                            for i in 0..N {
                                column[i] = load::<S>(x, pixel(i));
                            }
                            prologue.apply_to::<S, N>(simd, &mut column, channel);
                        } else if left <= j && j < right {
                            for i in 0..N {
                                if top <= i && i < bottom {
                                    column[i] = load::<S>(x, pixel(i));
                                }
                            }
                            prologue.apply_to::<S, N>(simd, &mut column, channel);
                            // Pixels outside are zeros, whatever the prologue makes of zeros.
                            for i in 0..N {
                                if i < top || bottom <= i {
                                    column[i] = zero;
                                }
                            }
                        }
                    }
                    let column = transform::input(simd, column);
                    for i in 0..N {
                        half[i][j] = column[i];
                    }
                }
                for i in 0..N {
                    let row = transform::input(simd, half[i]);
                    for j in 0..N {
                        // SAFETY: the position is below N^2, the tile one of the rows and the lane below BLOCK.
                        unsafe { store::<S>(v, planes.at(N * i + j, tile) + lane, row[j]) };
                    }
                }
            }
        }
    }
}

/// Transforms block `block` of the output channels of `count` tiles from `first` on back to pixels.
///
/// - `m`: [`Planes`] of [`width`] columns, one tile per row, the first in row `m_row`
/// - `y`: the output from pixel `start` on
pub(super) struct Scatter<'a, const M: usize, const N: usize> {
    pub tiling: &'a Tiling,
    pub planes: Planes,
    pub m_row: usize,
    pub m: &'a [f32],
    pub epilogue: Epilogue<'a>,
    pub block: usize,
    pub tiles: [usize; 2],
    pub start: usize,
    pub y: &'a mut [f32],
}

impl<const M: usize, const N: usize> WithSimd for Scatter<'_, M, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tiling, planes, m_row, m, epilogue, block, tiles, start, y } = self;
        let [first, count] = tiles;
        let d = &tiling.d;
        let width = width::<S>();
        assert!(block * width < d.co, "block {block} of {d:?}");
        let channels = width.min(d.co - block * width);
        let last = if count == 0 { start } else { tiling.first_pixel((first + count - 1) / tiling.cols + 1) };
        assert!(
            m_row + count <= planes.rows && tiling.first_pixel(first / tiling.cols) >= start,
            "tiles {first} and {count} more"
        );
        assert!(first + count <= tiling.num_tiles(), "tiles {first} and {count} more");
        assert!(tiling.side == M && planes.positions == N * N, "{planes:?} of {N} points");
        assert!(planes.columns == width && m.len() >= planes.len(), "{planes:?} in {} elements", m.len());
        assert!(y.len() >= (last - start) * d.co && channels.is_multiple_of(S::F32_LANES), "{d:?}");
        assert!(epilogue.fits(d.co, d.pixels() * d.co), "constants per channel, a residual of the output's shape");
        for tile in 0..count {
            let [image, oy, ox] = tiling.place(first + tile);
            let (rows, cols) = (M.min(d.ho - oy), M.min(d.wo - ox));
            for lane in (0..channels).step_by(S::F32_LANES) {
                let channel = block * width + lane;
                let zero = simd.splat_f32s(0.0);
                let mut half = [[zero; N]; M];
                for j in 0..N {
                    let mut column = [zero; N];
                    for i in 0..N {
                        // SAFETY: the position is below N^2, the tile one of the rows and the lane below the width.
                        column[i] = unsafe { load::<S>(m, planes.at(N * i + j, m_row + tile) + lane) };
                    }
                    let column = transform::output::<S, M, N>(simd, column);
                    for i in 0..M {
                        half[i][j] = column[i];
                    }
                }
                for i in 0..M {
                    let row = transform::output::<S, M, N>(simd, half[i]);
                    for j in 0..M {
                        if i < rows && j < cols {
                            let at = (((image * d.ho + oy + i) * d.wo) + ox + j) * d.co + channel;
                            // SAFETY: constants have an element per channel; the pixel is one of the tiles', which `y`
                            // and the residual hold.
                            unsafe {
                                let value = epilogue.apply(simd, row[j], channel, at);
                                store::<S>(y, at - start * d.co, value);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Transforms block `block` of the channels of the output's gradient, for the gradient of the weight: 4x4 tiles.
///
/// `m`: [`Planes`] of [`width`] columns, one tile per row; channels beyond the last become zeros.
pub(super) struct GatherGradient<'a> {
    pub tiling: &'a Tiling,
    pub gy: &'a [f32],
    pub block: usize,
    pub tiles: [usize; 2],
    pub planes: Planes,
    pub m: &'a mut [f32],
}

impl WithSimd for GatherGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tiling, gy, block, tiles, planes, m } = self;
        let [first, count] = tiles;
        let d = &tiling.d;
        let width = width::<S>();
        assert!(block * width < d.co, "block {block} of {d:?}");
        let channels = width.min(d.co - block * width);
        assert!(count <= planes.rows && first + count <= tiling.num_tiles(), "tiles {first} and {count} more");
        assert!(tiling.side == 4 && planes.positions == 36, "{planes:?}");
        assert!(planes.columns == width && m.len() >= planes.len(), "{planes:?} in {} elements", m.len());
        assert!(gy.len() >= d.pixels() * d.co && channels.is_multiple_of(S::F32_LANES), "{d:?}");
        for tile in 0..count {
            let [image, oy, ox] = tiling.place(first + tile);
            let (rows, cols) = (4.min(d.ho - oy), 4.min(d.wo - ox));
            for lane in (0..width).step_by(S::F32_LANES) {
                let zero = simd.splat_f32s(0.0);
                let mut values = [[zero; 4]; 4];
                if lane < channels {
                    let at = ((image * d.ho + oy) * d.wo + ox) * d.co + block * width + lane;
                    for i in 0..4 {
                        for j in 0..4 {
                            if i < rows && j < cols {
                                // SAFETY: the pixel is inside `gy`, which holds all its channels.
                                values[j][i] = unsafe { load::<S>(gy, at + (i * d.wo + j) * d.co) };
                            }
                        }
                    }
                }
                let mut half = [[zero; 4]; 6];
                for j in 0..4 {
                    let column = transform::output_adjoint(simd, values[j]);
                    for i in 0..6 {
                        half[i][j] = column[i];
                    }
                }
                for i in 0..6 {
                    let row = transform::output_adjoint(simd, half[i]);
                    for j in 0..6 {
                        // SAFETY: the position is below 36, the tile one of the rows and the lane below the width.
                        unsafe { store::<S>(m, planes.at(6 * i + j, tile) + lane, row[j]) };
                    }
                }
            }
        }
    }
}
