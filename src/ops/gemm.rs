//! A bounds-checked wrapper of the `gemm` crate's single-threaded matrix product.

use candle_core::WithDType;

/// A strided view of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A row-major `rows x cols` matrix.
    pub(super) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "matrix {rows}x{cols} in {} elements", data.len());
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// `cols` columns, from `first` on, of a row-major matrix with `stride` columns.
    pub(super) fn columns(data: &'a [T], rows: usize, stride: usize, first: usize, cols: usize) -> Self {
        assert!(first + cols <= stride && data.len() >= rows * stride, "columns {first} and {cols} more of {stride}");
        Self { data: &data[first..], rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose, without a copy.
    pub(super) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// Whether a product replaces the values in the output or is added to them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Overwrite,
    Accumulate,
}

/// Writes `a * b` to the row-major `y`, or adds it to `y`.
pub(super) fn gemm<T: WithDType>(y: &mut [T], a: Mat<T>, b: Mat<T>, output: Output) {
    assert_eq!(a.cols, b.rows, "inner sizes of a matrix product");
    assert!(y.len() >= a.rows * b.cols, "output {}x{} in {} elements", a.rows, b.cols, y.len());
    // SAFETY: `Mat` and the assertions above keep every index inside the three slices, and `y` is exclusively ours.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            y.as_mut_ptr(),
            1,
            b.cols as isize,
            output == Output::Accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::one(),
            T::one(),
            false,
            false,
            false,
            gemm::Parallelism::None,
        )
    }
}
