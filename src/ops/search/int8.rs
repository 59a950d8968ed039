//! Products with rows of 8-bit integers.

use std::ops::Range;

use super::best::Best;
#[cfg(target_arch = "x86_64")]
use crate::vectors;

/// Rows of a block. Its elements are interleaved by fours, so that an instruction multiplies four elements of each row
/// and adds them up.
pub const ROWS: usize = 16;
/// Elements of a row that are together in a block.
const FOUR: usize = 4;
/// Queries that are multiplied together.
const TILE: usize = 8;
/// Largest quantised value: the smallest is its negative, so that two products fit into 16 bits.
const LARGEST: f32 = 127.0;

/// Rows quantised to 8-bit integers from -127 to 127, each with a scale of its own.
#[derive(Clone, Copy, Debug)]
pub struct Int8Rows<'a> {
    /// Blocks of 16 rows, each of [`block_len`] values: elements 0 to 3 of the 16 rows, then elements 4 to 7, and so on,
    /// with zeros where there are no more rows or elements.
    pub blocks: &'a [i8],
    /// What the values of each row are multiplied by.
    pub scales: &'a [f32],
    /// Number of rows.
    pub num_rows: usize,
}

/// Number of values of a block of 16 rows of `dim` elements.
pub fn block_len(dim: usize) -> usize {
    ROWS * dim.next_multiple_of(FOUR)
}

impl Int8Rows<'_> {
    pub(super) fn is_whole(&self, dim: usize) -> bool {
        let blocks = self.num_rows.div_ceil(ROWS).checked_mul(block_len(dim));
        self.scales.len() == self.num_rows && blocks == Some(self.blocks.len())
    }

    /// Offers the rows of a range, which starts with a block, to the best of each query.
    pub(super) fn panel(&self, range: Range<usize>, queries: &Quantised, best: &mut [Best]) {
        let len = queries.len;
        let blocks = &self.blocks[range.start / ROWS * ROWS * len..range.end.div_ceil(ROWS) * ROWS * len];
        let mut sums = [[0; ROWS]; TILE];
        let (tiles, scales) = (queries.values.chunks(TILE * len), queries.scales.chunks(TILE));
        for ((tile, of_queries), best) in tiles.zip(scales).zip(best.chunks_mut(TILE)) {
            for (block, first) in blocks.chunks_exact(ROWS * len).zip(range.clone().step_by(ROWS)) {
                products(block, tile, len, &mut sums);
                let of_rows = &self.scales[first..range.end.min(first + ROWS)];
                for ((sums, scale), best) in sums.iter().zip(of_queries).zip(best.iter_mut()) {
                    let mut scores = [0.0; ROWS];
                    for ((score, sum), of_row) in scores.iter_mut().zip(sums).zip(of_rows) {
                        *score = *sum as f32 * (scale * of_row);
                    }
                    best.offer(&scores[..of_rows.len()], first);
                }
            }
        }
    }
}

/// Vectors quantised like [`Int8Rows`], in memory of their own.
#[derive(Clone, Debug)]
pub struct Quantised {
    values: Vec<i8>,
    scales: Vec<f32>,
    /// Values of a vector, with zeros up to a multiple of four.
    len: usize,
}

impl Quantised {
    /// Quantises rows `(n, dim)` and puts them into blocks.
    pub fn of_rows(rows: &[f32], dim: usize) -> Self {
        let (num_rows, len) = (rows.len() / dim, dim.next_multiple_of(FOUR));
        let mut values = vec![0; num_rows.div_ceil(ROWS) * ROWS * len];
        let mut row_values = vec![0; len];
        let mut scales = Vec::with_capacity(num_rows);
        for (i, row) in rows.chunks_exact(dim).enumerate() {
            scales.push(quantise(row, &mut row_values));
            let block = &mut values[i / ROWS * ROWS * len..][..ROWS * len];
            for (fours, four) in block.chunks_exact_mut(ROWS * FOUR).zip(row_values.chunks_exact(FOUR)) {
                fours[i % ROWS * FOUR..][..FOUR].copy_from_slice(four);
            }
        }
        Self { values, scales, len }
    }

    /// Quantises queries `(m, dim)`, which stay row-major.
    pub(super) fn of_queries(queries: &[f32], dim: usize) -> Self {
        let len = dim.next_multiple_of(FOUR);
        let mut values = vec![0; queries.len() / dim * len];
        let pairs = values.chunks_exact_mut(len).zip(queries.chunks_exact(dim));
        let scales = pairs.map(|(values, query)| quantise(query, values)).collect();
        Self { values, scales, len }
    }

    /// The rows.
    pub fn rows(&self) -> Int8Rows<'_> {
        Int8Rows { blocks: &self.values, scales: &self.scales, num_rows: self.scales.len() }
    }
}

/// Quantises a vector to `values` and returns its scale.
fn quantise(vector: &[f32], values: &mut [i8]) -> f32 {
    let largest = vector.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    // Of a vector of zeros any scale will do.
    let factor = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    for (quantised, value) in values.iter_mut().zip(vector) {
        *quantised = (value * factor).round() as i8;
    }
    largest / LARGEST
}

/// Writes the products of the rows of a block with up to [`TILE`] queries of `len` values to `sums`.
fn products(block: &[i8], queries: &[i8], len: usize, sums: &mut [[i32; ROWS]; TILE]) {
    assert!(block.len() == ROWS * len && len.is_multiple_of(FOUR), "a block of {} values", block.len());
    assert!(queries.len().is_multiple_of(len) && queries.len() <= TILE * len, "{} values of queries", queries.len());
    #[cfg(target_arch = "x86_64")]
    {
        if vectors::has_vnni() {
            // SAFETY: the instructions are there, and the lengths were checked.
            unsafe { x86::vnni_tile(block, queries, len, sums) };
            return;
        }
        if vectors::has_avx2() {
            // SAFETY: as above.
            unsafe { x86::avx2_tile(block, queries, len, sums) };
            return;
        }
    }
    portable(block, queries, len, sums);
}

/// [`products`] without instructions of a certain processor.
fn portable(block: &[i8], queries: &[i8], len: usize, sums: &mut [[i32; ROWS]; TILE]) {
    for (query, sums) in queries.chunks_exact(len).zip(sums) {
        *sums = [0; ROWS];
        for (four, rows) in query.chunks_exact(FOUR).zip(block.chunks_exact(FOUR * ROWS)) {
            for (sum, row) in sums.iter_mut().zip(rows.chunks_exact(FOUR)) {
                *sum += four.iter().zip(row).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum::<i32>();
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{FOUR, ROWS, TILE};

    /// # Safety
    /// `block` has `ROWS * len` values, `queries` at most `TILE * len`, and `len` is a multiple of four.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn vnni_tile(block: &[i8], queries: &[i8], len: usize, sums: &mut [[i32; ROWS]; TILE]) {
        // SAFETY: passed on.
        unsafe {
            match queries.len() / len {
                0 => {}
                1 => vnni::<1>(block, queries, len, sums),
                2 => vnni::<2>(block, queries, len, sums),
                3 => vnni::<3>(block, queries, len, sums),
                4 => vnni::<4>(block, queries, len, sums),
                5 => vnni::<5>(block, queries, len, sums),
                6 => vnni::<6>(block, queries, len, sums),
                7 => vnni::<7>(block, queries, len, sums),
                _ => vnni::<TILE>(block, queries, len, sums),
            }
        }
    }

    /// The instruction multiplies an unsigned by a signed byte: 128 is added to the query's values, and 128 times the
    /// sum of the row's values is subtracted.
    ///
    /// # Safety
    /// As [`vnni_tile`], with `N` queries.
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn vnni<const N: usize>(block: &[i8], queries: &[i8], len: usize, sums: &mut [[i32; ROWS]; TILE]) {
        let (mut of_queries, mut of_rows) = ([_mm512_setzero_si512(); N], _mm512_setzero_si512());
        let high = _mm512_set1_epi8(i8::MIN);
        for at in (0..len).step_by(FOUR) {
            // SAFETY: the vector of four elements of 16 rows is in the block.
            let rows = unsafe { _mm512_loadu_si512(block.as_ptr().add(at * ROWS).cast()) };
            of_rows = _mm512_dpbusd_epi32(of_rows, high, rows);
            for (i, sum) in of_queries.iter_mut().enumerate() {
                // SAFETY: the four elements are in query `i`.
                let four = unsafe { queries.as_ptr().add(i * len + at).cast::<i32>().read_unaligned() };
                let unsigned = _mm512_xor_si512(_mm512_set1_epi32(four), high);
                *sum = _mm512_dpbusd_epi32(*sum, unsigned, rows);
            }
        }
        for (sum, sums) in of_queries.into_iter().zip(sums) {
            // SAFETY: 16 sums of 32 bits are a vector.
            unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), _mm512_sub_epi32(sum, of_rows)) };
        }
    }

    /// # Safety
    /// As [`vnni_tile`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2_tile(block: &[i8], queries: &[i8], len: usize, sums: &mut [[i32; ROWS]; TILE]) {
        for (queries, sums) in queries.chunks(2 * len).zip(sums.chunks_mut(2)) {
            // SAFETY: passed on.
            unsafe {
                match queries.len() / len {
                    1 => avx2::<1>(block, queries, len, sums),
                    _ => avx2::<2>(block, queries, len, sums),
                }
            }
        }
    }

    /// # Safety
    /// As [`vnni_tile`], with `N` queries.
    #[target_feature(enable = "avx2")]
    unsafe fn avx2<const N: usize>(block: &[i8], queries: &[i8], len: usize, sums: &mut [[i32; ROWS]]) {
        const HALF: usize = ROWS / 2;
        let ones = _mm256_set1_epi16(1);
        let mut of_queries = [[_mm256_setzero_si256(); 2]; N];
        for at in (0..len).step_by(FOUR) {
            for half in 0..2 {
                // SAFETY: the vector of four elements of 8 rows is in the block.
                let rows = unsafe { _mm256_loadu_si256(block.as_ptr().add(at * ROWS + half * HALF * FOUR).cast()) };
                for (i, sums) in of_queries.iter_mut().enumerate() {
                    // SAFETY: the four elements are in query `i`.
                    let four = unsafe { queries.as_ptr().add(i * len + at).cast::<i32>().read_unaligned() };
                    let four = _mm256_set1_epi32(four);
                    // The sums of two products are at most 2 * 127^2: they fit into 16 bits.
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(four), _mm256_sign_epi8(rows, four));
                    sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (halves, sums) in of_queries.into_iter().zip(sums) {
            for (half, sums) in halves.into_iter().zip(sums.chunks_exact_mut(HALF)) {
                // SAFETY: 8 sums of 32 bits are a vector.
                unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), half) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_products_of_all_instructions_are_exact() {
        for len in [4, 12, 512] {
            // The largest values of both signs are among them.
            let values = |seed: usize, n: usize| -> Vec<i8> {
                (0..n).map(|i| ((i * 37 + seed * 91 + i / 7 * 13) % 255) as i32 - 127).map(|v| v as i8).collect()
            };
            let mut block = values(1, ROWS * len);
            block[..2 * len].fill(-127);
            for n in 1..=TILE {
                let mut queries = values(n, n * len);
                queries[..len].fill(127);
                let mut expected = [[0; ROWS]; TILE];
                for (i, query) in queries.chunks_exact(len).enumerate() {
                    for (row, expected) in expected[i].iter_mut().enumerate() {
                        let value = |at: usize| block[at / FOUR * FOUR * ROWS + row * FOUR + at % FOUR];
                        *expected = (0..len).map(|at| i32::from(query[at]) * i32::from(value(at))).sum();
                    }
                }
                let check = |name, f: &dyn Fn(&mut [[i32; ROWS]; TILE])| {
                    let mut sums = [[0; ROWS]; TILE];
                    f(&mut sums);
                    assert_eq!(sums[..n], expected[..n], "{name}, {n} queries of {len}");
                };
                check("portable", &|sums| portable(&block, &queries, len, sums));
                check("the processor's", &|sums| products(&block, &queries, len, sums));
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the instructions are there, and the lengths fit.
                    check("AVX2", &|sums| unsafe { x86::avx2_tile(&block, &queries, len, sums) });
                }
            }
        }
    }

    #[test]
    fn quantised_values_are_near_and_zeros_stay() {
        let rows: Vec<f32> = (0..3 * 6).map(|i| if i < 6 { 0.0 } else { (i as f32 * 0.37).sin() * i as f32 }).collect();
        let quantised = Quantised::of_rows(&rows, 6);
        let Int8Rows { blocks, scales, num_rows } = quantised.rows();
        assert_eq!((blocks.len(), scales.len(), num_rows), (block_len(6), 3, 3));
        for (r, row) in rows.chunks_exact(6).enumerate() {
            for (d, value) in row.iter().enumerate() {
                let found = f32::from(blocks[d / FOUR * FOUR * ROWS + r * FOUR + d % FOUR]) * scales[r];
                assert!((found - value).abs() <= 0.5001 * scales[r], "{found} {value}");
            }
        }
        assert_eq!(blocks.iter().filter(|v| **v != 0).count(), 12);
    }
}
