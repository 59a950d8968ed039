//! Products with rows of floats.

use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::{Simd, WithSimd};

use super::best::Best;
use crate::ops::gemm::{Mat, Output, gemm};
use crate::ops::lanes::load;
use crate::ops::simd::dispatch;

/// Rows whose products are computed together.
const ROWS: usize = 4;
/// Most queries for which each row is multiplied as it is; the product of more packs the rows first.
const FEW: usize = 4;

/// Memory of a thread.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub wide: Vec<f32>,
    pub products: Vec<f32>,
}

/// Writes the values of `rows` to `wide`.
pub(super) fn widen(rows: &[f16], wide: &mut Vec<f32>) {
    wide.resize(rows.len(), 0.0);
    rows.convert_to_f32_slice(wide);
}

/// Offers the rows of a panel to the best of each query; `first` is the index of the first row.
pub(super) fn panel(
    rows: &[f32],
    queries: &[f32],
    dim: usize,
    first: usize,
    products: &mut Vec<f32>,
    best: &mut [Best],
) {
    let (n, m) = (rows.len() / dim, queries.len() / dim);
    products.resize(n * m, 0.0);
    match m {
        1 => dispatch(Products::<1> { rows, queries, dim, products }),
        2 => dispatch(Products::<2> { rows, queries, dim, products }),
        3 => dispatch(Products::<3> { rows, queries, dim, products }),
        FEW => dispatch(Products::<FEW> { rows, queries, dim, products }),
        _ => gemm(products, Mat::new(queries, m, dim), Mat::new(rows, n, dim).t(), Output::Overwrite),
    }
    for (best, products) in best.iter_mut().zip(products.chunks_exact(n)) {
        best.offer(products, first);
    }
}

/// Writes the products of `M` queries with all rows to `products: (M, n)`.
struct Products<'a, const M: usize> {
    rows: &'a [f32],
    queries: &'a [f32],
    dim: usize,
    products: &'a mut [f32],
}

impl<const M: usize> WithSimd for Products<'_, M> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { rows, queries, dim, products } = self;
        let n = rows.len() / dim;
        let mut at = 0;
        while at + ROWS <= n {
            of_rows::<S, M, ROWS>(simd, &rows[at * dim..][..ROWS * dim], queries, dim, at, n, products);
            at += ROWS;
        }
        for at in at..n {
            of_rows::<S, M, 1>(simd, &rows[at * dim..][..dim], queries, dim, at, n, products);
        }
    }
}

#[inline(always)]
fn of_rows<S: Simd, const M: usize, const R: usize>(
    simd: S,
    rows: &[f32],
    queries: &[f32],
    dim: usize,
    at: usize,
    n: usize,
    products: &mut [f32],
) {
    assert!(rows.len() == R * dim && queries.len() == M * dim && products.len() == M * n && at + R <= n);
    let mut sums = [[simd.splat_f32s(0.0); R]; M];
    let whole = dim / S::F32_LANES * S::F32_LANES;
    let mut i = 0;
    while i < whole {
        // SAFETY: the vectors end within rows of `dim` elements.
        let row: [S::f32s; R] = std::array::from_fn(|r| unsafe { load::<S>(rows, r * dim + i) });
        for (m, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let query = unsafe { load::<S>(queries, m * dim + i) };
            for (sum, row) in sums.iter_mut().zip(row) {
                *sum = simd.mul_add_e_f32s(query, row, *sum);
            }
        }
        i += S::F32_LANES;
    }
    for (m, sums) in sums.into_iter().enumerate() {
        for (r, sum) in sums.into_iter().enumerate() {
            let rest = (whole..dim).map(|i| queries[m * dim + i] * rows[r * dim + i]).sum::<f32>();
            products[m * n + at + r] = simd.reduce_sum_f32s(sum) + rest;
        }
    }
}
