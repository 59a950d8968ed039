//! Exact search: the rows of a matrix that have the highest dot products with a query.
//!
//! The rows are read once, panel by panel, whatever the number of queries. Rows of 16 bits are widened in the cache; of
//! 8 bits ([`Int8Rows`]) they are multiplied as integers.

mod best;
mod float;
mod int8;

use candle_core::{Result, bail};
use half::f16;

use best::Best;
pub use best::Hit;
pub use int8::{Int8Rows, Quantised, ROWS, block_len};

use crate::parallel;

/// Bytes of a panel, which stays in a core's second-level cache.
const PANEL_BYTES: usize = 256 * 1024;
/// Parts of the rows for each thread: enough that none waits long for the last.
const PARTS_PER_THREAD: usize = 4;

/// Rows to search.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// `(n, dim)`, row-major.
    F32(&'a [f32]),
    /// `(n, dim)`, row-major.
    F16(&'a [f16]),
    /// Quantised.
    Int8(Int8Rows<'a>),
}

impl Rows<'_> {
    /// Number of rows.
    fn len(&self, dim: usize) -> usize {
        match self {
            Self::F32(rows) => rows.len() / dim,
            Self::F16(rows) => rows.len() / dim,
            Self::Int8(rows) => rows.num_rows,
        }
    }

    fn check(&self, dim: usize) -> Result<()> {
        let is_whole = match self {
            Self::F32(rows) => rows.len().is_multiple_of(dim),
            Self::F16(rows) => rows.len().is_multiple_of(dim),
            Self::Int8(rows) => rows.is_whole(dim),
        };
        if !is_whole {
            bail!("search: expected whole rows of {dim} elements");
        }
        Ok(())
    }

    /// Rows of a panel, a multiple of a block's.
    fn panel(&self, dim: usize) -> usize {
        let bytes = match self {
            // Rows of 16 bits are widened.
            Self::F32(_) | Self::F16(_) => 4 * dim,
            Self::Int8(_) => dim,
        };
        (PANEL_BYTES / bytes).next_multiple_of(int8::ROWS).max(int8::ROWS)
    }
}

/// Returns the dot product of two embeddings, accumulated in f64: their cosine if both have length 1.
///
/// # Panics
/// When the numbers of elements differ: embeddings of different networks cannot be compared.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "embeddings of different networks");
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Returns, for each query, the `num` rows with the highest dot products, the highest first; fewer if there are fewer
/// rows. Of rows with the same product the first come first. The product of a quantised row is that of the quantised
/// query with it.
///
/// - `queries`: `(m, dim)`, row-major
///
/// # Errors
/// When `dim` is 0, or the queries or the rows are no whole number of `dim` elements.
pub fn search(rows: Rows, queries: &[f32], dim: usize, num: usize) -> Result<Vec<Vec<Hit>>> {
    if dim == 0 || !queries.len().is_multiple_of(dim) {
        bail!("search: expected queries of {dim} elements, found {} elements in total", queries.len());
    }
    rows.check(dim)?;
    let (num_rows, num_queries, panel) = (rows.len(dim), queries.len() / dim, rows.panel(dim));
    let num = num.min(num_rows);
    if num == 0 || num_queries == 0 {
        return Ok(vec![Vec::new(); num_queries]);
    }
    let quantised = matches!(rows, Rows::Int8(_)).then(|| Quantised::of_queries(queries, dim));
    let panels = num_rows.div_ceil(panel);
    let parts = panels.min(PARTS_PER_THREAD * rayon::current_num_threads());
    let of_part = |part: usize| {
        let mut best = vec![Best::new(num); num_queries];
        let mut scratch = float::Scratch::default();
        for i in panels * part / parts..panels * (part + 1) / parts {
            let range = i * panel..((i + 1) * panel).min(num_rows);
            match (rows, &quantised) {
                (Rows::F32(rows), _) => {
                    let rows = &rows[range.start * dim..range.end * dim];
                    float::panel(rows, queries, dim, range.start, &mut scratch.products, &mut best);
                }
                (Rows::F16(rows), _) => {
                    let rows = &rows[range.start * dim..range.end * dim];
                    let float::Scratch { wide, products } = &mut scratch;
                    float::widen(rows, wide);
                    float::panel(wide, queries, dim, range.start, products, &mut best);
                }
                (Rows::Int8(rows), quantised) => {
                    let quantised = quantised.as_ref().expect("queries of such rows are quantised");
                    rows.panel(range, quantised, &mut best);
                }
            }
        }
        best
    };
    let mut parts = parallel::map(parts, of_part).into_iter();
    let mut best = parts.next().expect("there is a row");
    for part in parts {
        best.iter_mut().zip(part).for_each(|(best, other)| best.merge(other));
    }
    Ok(best.into_iter().map(Best::into_hits).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from -1 to 1.
    fn numbers(seed: f64, len: usize) -> Vec<f32> {
        (0..len)
            .map(|i| (((i as f64 + seed) * 0.618_034 + (i as f64 * 0.01).sin()).fract() * 2.0 - 1.0) as f32)
            .collect()
    }

    /// All products in f64, sorted.
    fn expected(rows: &[f32], query: &[f32], num: usize) -> Vec<(usize, f64)> {
        let mut all: Vec<(usize, f64)> =
            rows.chunks_exact(query.len()).map(|row| dot(row, query)).enumerate().collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate(num);
        all
    }

    #[test]
    fn the_rows_with_the_highest_products_are_found() {
        // One row, part of a block, several panels; lengths that are no whole vectors.
        for (n, dim, num) in [(1, 5, 3), (37, 30, 4), (9_001, 64, 7), (700, 512, 1), (16, 4, 20)] {
            let rows = numbers(0.2, n * dim);
            let half: Vec<f16> = rows.iter().map(|v| f16::from_f32(*v)).collect();
            let quantised = Quantised::of_rows(&rows, dim);
            for m in [1, 3, 8, 21] {
                let queries = numbers(5.0, m * dim);
                let all = [Rows::F32(&rows), Rows::F16(&half), Rows::Int8(quantised.rows())];
                for (kind, tolerance) in all.into_iter().zip([1e-5, 2e-3, 2e-2]) {
                    let found = search(kind, &queries, dim, num).unwrap();
                    assert_eq!(found.len(), m);
                    for (query, hits) in queries.chunks_exact(dim).zip(found) {
                        let expected = expected(&rows, query, num);
                        assert_eq!(hits.len(), expected.len());
                        let tolerance = tolerance * (dim as f64).sqrt();
                        for (hit, (_, score)) in hits.iter().zip(&expected) {
                            assert!((f64::from(hit.score) - score).abs() < tolerance, "{hit:?} {score} {n} {m}");
                        }
                        assert!(hits.windows(2).all(|pair| pair[0].score >= pair[1].score));
                        let mut seen: Vec<usize> = hits.iter().map(|hit| hit.row).collect();
                        seen.sort_unstable();
                        seen.dedup();
                        assert_eq!(seen.len(), hits.len());
                        for hit in &hits {
                            let row = &rows[hit.row * dim..][..dim];
                            let of_row = dot(row, query);
                            assert!((f64::from(hit.score) - of_row).abs() < tolerance, "{hit:?} {of_row}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn equal_rows_come_in_order_whatever_the_number_of_threads() {
        let rows = numbers(0.7, 64).repeat(3_000);
        let query = numbers(0.7, 64);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for kind in [Rows::F32(&rows), Rows::Int8(Quantised::of_rows(&rows, 64).rows())] {
                let found = pool.install(|| search(kind, &query, 64, 5)).unwrap();
                assert_eq!(found[0].iter().map(|hit| hit.row).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
            }
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let rows = [0.0; 12];
        let error = |rows: Rows, queries: &[f32], dim| search(rows, queries, dim, 1).unwrap_err().to_string();
        assert!(error(Rows::F32(&rows), &[0.0; 4], 0).contains("queries of 0 elements"));
        assert!(error(Rows::F32(&rows), &[0.0; 4], 5).contains("found 4 elements in total"));
        assert!(error(Rows::F32(&rows), &[0.0; 5], 5).contains("whole rows of 5 elements"));
        let short = Int8Rows { blocks: &[0; 64], scales: &[1.0; 16], num_rows: 17 };
        assert!(error(Rows::Int8(short), &[0.0; 4], 4).contains("whole rows of 4 elements"));
        assert!(search(Rows::F32(&[]), &[0.0; 4], 4, 3).unwrap()[0].is_empty());
        assert!(search(Rows::F32(&rows), &[], 4, 3).unwrap().is_empty());
    }
}
