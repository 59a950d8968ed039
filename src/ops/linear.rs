//! The fully connected layer of the fused engine on f32 slices, and its backward.

use rayon::prelude::*;

use super::gemm::{Mat, Output, gemm};
use super::scratch::with_scratch;
use crate::parallel::Each;

/// Outputs that a worker thread takes at a time; of inputs, 16 times as many.
const PIECE: usize = 32;

/// Writes `x w^T + bias`: `x: (n, k)`, `w: (m, k)`, `bias: (m)`, `y: (n, m)`.
pub(crate) fn forward(x: &[f32], w: &[f32], bias: Option<&[f32]>, [n, k, m]: [usize; 3], y: &mut [f32]) {
    assert!(x.len() == n * k && w.len() == m * k && y.len() == n * m, "{n} x {k} times {m} x {k}");
    with_scratch(n * m, |transposed| {
        transposed.par_chunks_mut(PIECE * n).zip(w.par_chunks(PIECE * k)).each(&|(y, w)| {
            gemm(y, Mat::new(w, w.len() / k, k), Mat::new(x, n, k).t(), Output::Overwrite);
        });
        transpose(transposed, m, n, y);
    });
    if let Some(bias) = bias {
        y.chunks_exact_mut(m).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    }
}

/// Writes the gradient of `w`: `gy^T x`.
pub(crate) fn grad_w(x: &[f32], gy: &[f32], [n, k, m]: [usize; 3], gw: &mut [f32]) {
    assert!(x.len() == n * k && gy.len() == n * m && gw.len() == m * k, "{n} x {k} times {m} x {k}");
    with_scratch(n * m, |transposed| {
        transpose(gy, n, m, transposed);
        gw.par_chunks_mut(PIECE * k).zip(transposed.par_chunks(PIECE * n)).each(&|(gw, gy)| {
            gemm(gw, Mat::new(gy, gy.len() / n, n), Mat::new(x, n, k), Output::Overwrite);
        });
    });
}

/// Writes the gradient of `x`, `(n, k)`.
pub(crate) fn grad_x(gy: &[f32], w: &[f32], sizes @ [n, k, _]: [usize; 3], gx: &mut [f32]) {
    with_scratch(n * k, |transposed| {
        grad_x_transposed(gy, w, sizes, transposed);
        transpose(transposed, k, n, gx);
    });
}

/// Writes the transposed gradient of `x`, `(k, n)`.
pub(crate) fn grad_x_transposed(gy: &[f32], w: &[f32], [n, k, m]: [usize; 3], gx: &mut [f32]) {
    assert!(gy.len() == n * m && w.len() == m * k && gx.len() == n * k, "{n} x {k} times {m} x {k}");
    let pieces = gx.par_chunks_mut(16 * PIECE * n).enumerate();
    pieces.each(&|(i, gx)| {
        let w = Mat::columns(w, m, k, i * 16 * PIECE, gx.len() / n);
        gemm(gx, w.t(), Mat::new(gy, n, m).t(), Output::Overwrite);
    });
}

/// Transposes `x: (rows, columns)` to `y: (columns, rows)`.
fn transpose(x: &[f32], rows: usize, columns: usize, y: &mut [f32]) {
    for (column, y) in y.chunks_exact_mut(rows.max(1)).enumerate() {
        for (row, y) in y.iter_mut().enumerate() {
            *y = x[row * columns + column];
        }
    }
}
