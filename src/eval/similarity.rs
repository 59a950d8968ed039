//! Dot products of all rows of two sets of embeddings, block by block, so that they are never all in memory.

use candle_core::{Device, Tensor};

use super::embed::Embeddings;
use crate::error::{Error, Result};

/// Number of dot products per block, about 8 MB.
const BLOCK: usize = 1 << 21;

/// Calls `each(i, products)` for every row `i` of `a` in order, with its dot products with all rows of `b`, in f32.
///
/// # Errors
/// When the embeddings have different lengths, a block cannot be allocated, or `each` fails.
pub(super) fn for_each_row(
    a: &Embeddings,
    b: &Embeddings,
    mut each: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    if a.dim() != b.dim() {
        let what = format!("expected embeddings of equal length, found {} and {} elements", a.dim(), b.dim());
        return Err(Error::Evaluation(what));
    }
    if a.is_empty() || b.is_empty() {
        return Ok(());
    }
    let b_columns = Tensor::from_slice(b.values(), (b.len(), b.dim()), &Device::Cpu)?.t()?;
    let rows_per_block = (BLOCK / b.len()).max(1);
    for first in (0..a.len()).step_by(rows_per_block) {
        let rows = rows_per_block.min(a.len() - first);
        let block = &a.values()[first * a.dim()..][..rows * a.dim()];
        let products = Tensor::from_slice(block, (rows, a.dim()), &Device::Cpu)?.matmul(&b_columns)?;
        let products = products.flatten_all()?.to_vec1::<f32>()?;
        for (row, products) in products.chunks_exact(b.len()).enumerate() {
            each(first + row, products)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::dot;

    #[test]
    fn every_product_comes_once_and_in_order() {
        let of = |n: usize| Embeddings::new((0..3 * n).map(|i| (i as f32 * 0.7).sin()).collect(), 3).unwrap();
        // Rows longer than a block, and blocks of several rows.
        for (n, m) in [(3, BLOCK + 5), (1000, 4000), (7, 1)] {
            let (a, b) = (of(n), of(m));
            let mut next = 0;
            for_each_row(&a, &b, |i, products| {
                assert_eq!((i, products.len()), (next, m));
                next += 1;
                for j in [0, m / 2, m - 1] {
                    assert!((f64::from(products[j]) - dot(&a[i], &b[j])).abs() < 1e-6);
                }
                Ok(())
            })
            .unwrap();
            assert_eq!(next, n);
        }
        let other = Embeddings::new(vec![1.0; 8], 4).unwrap();
        assert!(for_each_row(&of(2), &other, |_, _| Ok(())).unwrap_err().to_string().contains("3 and 4 elements"));
    }
}
