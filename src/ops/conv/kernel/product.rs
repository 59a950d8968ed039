//! Small matrix products on blocks that stay in the cache.

use pulp::{Simd, WithSimd};

use super::Epilogue;
use crate::ops::lanes::{load, prefetch, store};

/// Columns of a block of the first matrix: the stride of its rows, a constant of the kernels.
pub(in crate::ops::conv) const BLOCK: usize = 64;
/// Rows that a product may compute beyond those requested.
pub(in crate::ops::conv) const SPARE_ROWS: usize = 4;

/// Number of rows of the second matrix between the prefetch and the use of a row.
const AHEAD: usize = 16;

/// Output channels of a packed block: two vectors.
pub(in crate::ops::conv) fn width<S: Simd>() -> usize {
    2 * S::F32_LANES
}

/// Writes `y = a * b`.
///
/// - `a`: `rows x k`; row `r` of the `i`-th [`BLOCK`] columns is at `a[i * a_stride + r * BLOCK..]`
/// - `b`: `(k, width)`
/// - `y`: `(rows + SPARE_ROWS, width)`; spare rows get the products of the spare rows of `a`
pub(in crate::ops::conv) struct Product<'a> {
    pub rows: usize,
    pub k: usize,
    pub a: &'a [f32],
    pub a_stride: usize,
    pub b: &'a [f32],
    pub y: &'a mut [f32],
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, k, a, a_stride, b, y } = self;
        assert!(y.len() >= rows.next_multiple_of(SPARE_ROWS) * width::<S>(), "{rows} rows in {}", y.len());
        all_rows(simd, rows, k, a, a_stride, b, Scratch { y });
    }
}

/// Writes `epilogue(a * b)` to a block of the channels of `rows` pixels, from pixel `first` of the output on.
///
/// - `a`, `b`: as in [`Product`], with as many spare rows
/// - `y`: `(rows, co)`
pub(in crate::ops::conv) struct ProductOfPixels<'a> {
    pub rows: usize,
    pub k: usize,
    pub a: &'a [f32],
    pub a_stride: usize,
    pub b: &'a [f32],
    pub block: usize,
    pub epilogue: Epilogue<'a>,
    pub first: usize,
    pub co: usize,
    pub y: &'a mut [f32],
}

impl WithSimd for ProductOfPixels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, k, a, a_stride, b, block, epilogue, first, co, y } = self;
        let channel = block * width::<S>();
        assert!(y.len() == rows * co && channel < co && (co - channel).is_multiple_of(S::F32_LANES), "{co} channels");
        assert!(epilogue.covers(co, first * co + y.len()), "constants per channel, a residual of {rows} rows");
        let is_whole = co - channel >= width::<S>();
        all_rows(simd, rows, k, a, a_stride, b, Pixels { epilogue, rows, channel, is_whole, first, co, y });
    }
}

/// Destination of the rows of a product.
trait Sink<S: Simd> {
    /// Stores row `row`.
    ///
    /// # Safety
    /// The row is one of the product's, spare ones included.
    unsafe fn put(&mut self, simd: S, row: usize, sums: [S::f32s; 2]);
}

/// Scratch buffer `(rows, width)`, spare rows included.
struct Scratch<'a> {
    y: &'a mut [f32],
}

impl<S: Simd> Sink<S> for Scratch<'_> {
    #[inline(always)]
    unsafe fn put(&mut self, _: S, row: usize, sums: [S::f32s; 2]) {
        // SAFETY: by the contract; there is room for all rows.
        unsafe {
            store::<S>(self.y, row * width::<S>(), sums[0]);
            store::<S>(self.y, row * width::<S>() + S::F32_LANES, sums[1]);
        }
    }
}

/// Output pixels: two vectors of the channels of `rows` pixels, or one at the end of the channels.
struct Pixels<'a> {
    epilogue: Epilogue<'a>,
    rows: usize,
    channel: usize,
    is_whole: bool,
    first: usize,
    co: usize,
    y: &'a mut [f32],
}

impl<S: Simd> Sink<S> for Pixels<'_> {
    #[inline(always)]
    unsafe fn put(&mut self, simd: S, row: usize, sums: [S::f32s; 2]) {
        if row >= self.rows {
            return;
        }
        let (at, second) = (row * self.co + self.channel, self.channel + S::F32_LANES);
        let all = self.first * self.co + at;
        // SAFETY: the pixel is in `y`, and so are one or two vectors of its channels; [`ProductOfPixels`]
        // checked the epilogue.
        unsafe {
            store::<S>(self.y, at, self.epilogue.apply(simd, sums[0], self.channel, all));
            if self.is_whole {
                let value = self.epilogue.apply(simd, sums[1], second, all + S::F32_LANES);
                store::<S>(self.y, at + S::F32_LANES, value);
            }
        }
    }
}

/// Computes all rows of a product, a few at a time.
#[inline(always)]
fn all_rows<S: Simd>(simd: S, rows: usize, k: usize, a: &[f32], a_stride: usize, b: &[f32], mut sink: impl Sink<S>) {
    let padded = rows.next_multiple_of(SPARE_ROWS);
    assert!(k > 0 && rows > 0, "an empty product");
    assert!(a.len() >= (k - 1) / BLOCK * a_stride + padded * BLOCK, "{rows} rows of {k} columns in {}", a.len());
    assert!(b.len() >= k * width::<S>(), "{rows}x{k} times {}", b.len());
    let mut row = 0;
    // SAFETY: `row + R <= padded` in every call, and the assertions above hold for all rows up to there.
    unsafe {
        if S::F32_LANES >= 16 {
            // Eight twice rather than twelve and four: four rows are too few to hide the latency of their sums.
            while row + 12 <= padded && row + 16 != padded {
                rows_of::<S, 12>(simd, row, k, a, a_stride, b, &mut sink);
                row += 12;
            }
            while row + 8 <= padded {
                rows_of::<S, 8>(simd, row, k, a, a_stride, b, &mut sink);
                row += 8;
            }
        } else {
            while row + 6 <= padded {
                rows_of::<S, 6>(simd, row, k, a, a_stride, b, &mut sink);
                row += 6;
            }
        }
        while row < padded {
            // After steps of six, the last four rows may overlap those already computed.
            rows_of::<S, 4>(simd, row.min(padded - 4), k, a, a_stride, b, &mut sink);
            row += 4;
        }
    }
}

/// Computes `R` rows of a product from `row` on, with their sums in registers for all of `k`.
///
/// # Safety
/// The assertions of [`all_rows`] hold with `padded >= row + R`.
#[inline(always)]
unsafe fn rows_of<S: Simd, const R: usize>(
    simd: S,
    row: usize,
    k: usize,
    a: &[f32],
    a_stride: usize,
    b: &[f32],
    sink: &mut impl Sink<S>,
) {
    let width = width::<S>();
    let mut sums = [[simd.splat_f32s(0.0); 2]; R];
    // Loops that test at their end, and raw pointers: only then does the compiler keep all sums in registers.
    let (mut first, mut b) = (0, b.as_ptr());
    loop {
        let columns = BLOCK.min(k - first);
        // SAFETY: rows `row..row + R` of this block of columns are in `a`.
        let mut a = unsafe { a.as_ptr().add(first / BLOCK * a_stride + row * BLOCK) };
        // SAFETY: `columns <= BLOCK`, so the end is inside this row of `a` or just behind it.
        let end = unsafe { a.add(columns) };
        loop {
            // The hardware's prefetching stops at the end of each page.
            prefetch(b.wrapping_add(AHEAD * width));
            prefetch(b.wrapping_add(AHEAD * width + S::F32_LANES));
            // SAFETY: `b` is at one of the `k` rows of `width` values, `a` at one of the columns of `R` rows of `BLOCK`
            // values.
            unsafe {
                let values =
                    [b.cast::<S::f32s>().read_unaligned(), b.add(S::F32_LANES).cast::<S::f32s>().read_unaligned()];
                for (r, sum) in sums.iter_mut().enumerate() {
                    let a = simd.splat_f32s(*a.add(r * BLOCK));
                    sum[0] = simd.mul_add_e_f32s(a, values[0], sum[0]);
                    sum[1] = simd.mul_add_e_f32s(a, values[1], sum[1]);
                }
                a = a.add(1);
                b = b.add(width);
            }
            if a == end {
                break;
            }
        }
        first += columns;
        if first == k {
            break;
        }
    }
    for (r, sum) in sums.into_iter().enumerate() {
        // SAFETY: `row + r < row + R <= padded`.
        unsafe { sink.put(simd, row + r, sum) };
    }
}

/// Adds `a^T * b` to `y`.
///
/// - `a`: `(rows, BLOCK)`
/// - `b`: `(rows, width)`
/// - `y`: `(BLOCK, width)`
pub(in crate::ops::conv) struct TransposedProduct<'a> {
    pub rows: usize,
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub y: &'a mut [f32],
}

impl WithSimd for TransposedProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, a, b, y } = self;
        assert!(
            a.len() >= rows * BLOCK && b.len() >= rows * width::<S>() && y.len() >= BLOCK * width::<S>(),
            "{rows} rows"
        );
        // SAFETY: `column + C <= BLOCK` in every call: both numbers divide it.
        unsafe {
            let mut column = 0;
            while column < BLOCK {
                if S::F32_LANES >= 16 {
                    columns_of::<S, 8>(simd, column, rows, a, b, y);
                    column += 8;
                } else {
                    columns_of::<S, 4>(simd, column, rows, a, b, y);
                    column += 4;
                }
            }
        }
    }
}

/// Computes `C` rows of the result of [`TransposedProduct`], with their sums in registers.
///
/// # Safety
/// The assertion of [`TransposedProduct`] holds, and `column + C <= BLOCK`.
#[inline(always)]
unsafe fn columns_of<S: Simd, const C: usize>(
    simd: S,
    column: usize,
    rows: usize,
    a: &[f32],
    b: &[f32],
    y: &mut [f32],
) {
    let width = width::<S>();
    // SAFETY: `(column + c + 1) * width <= BLOCK * width <= y.len()`, `(row + 1) * width <= b.len()`,
    // `row * BLOCK + column + c < rows * BLOCK <= a.len()`.
    unsafe {
        let mut sums = [[simd.splat_f32s(0.0); 2]; C];
        for (c, sum) in sums.iter_mut().enumerate() {
            let at = (column + c) * width;
            *sum = [load::<S>(y, at), load::<S>(y, at + S::F32_LANES)];
        }
        for row in 0..rows {
            let b = [load::<S>(b, row * width), load::<S>(b, row * width + S::F32_LANES)];
            for (c, sum) in sums.iter_mut().enumerate() {
                let a = simd.splat_f32s(*a.get_unchecked(row * BLOCK + column + c));
                sum[0] = simd.mul_add_e_f32s(a, b[0], sum[0]);
                sum[1] = simd.mul_add_e_f32s(a, b[1], sum[1]);
            }
        }
        for (c, sum) in sums.iter().enumerate() {
            let at = (column + c) * width;
            store::<S>(y, at, sum[0]);
            store::<S>(y, at + S::F32_LANES, sum[1]);
        }
    }
}
