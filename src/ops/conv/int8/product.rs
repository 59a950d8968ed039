//! Products of rows of 16-bit steps with a block of a filter.

use super::Int8Weight;
#[cfg(target_arch = "x86_64")]
use crate::vectors::{Vectors, are_allowed};

/// Output channels of a block of a filter.
pub(super) const WIDTH: usize = 16;
/// Rows that are multiplied together.
pub(super) const ROWS: usize = 6;

/// Packs a dense filter `(co, c, kh, kw)` to `(blocks of outputs, pairs of columns, WIDTH, 2)`, with zeros where there
/// are no more outputs or columns. Columns are taps and their channels.
pub(super) fn pack(weight: &Int8Weight) -> Vec<i16> {
    let [co, c, kh, kw] = weight.shape();
    let (taps, columns) = (kh * kw, kh * kw * c);
    let pairs = columns.div_ceil(2);
    let mut packed = vec![0; co.next_multiple_of(WIDTH) * pairs * 2];
    for output in 0..co {
        for column in 0..columns {
            let value = weight.values()[(output * c + column % c) * taps + column / c];
            let at = ((output / WIDTH * pairs + column / 2) * WIDTH + output % WIDTH) * 2 + column % 2;
            packed[at] = i16::from(value);
        }
    }
    packed
}

/// The instructions for products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tile {
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Tile {
    /// The fastest that this machine has and this process may use.
    pub fn of_machine() -> Self {
        #[cfg(target_arch = "x86_64")]
        if are_allowed(Vectors::Avx2) && is_x86_feature_detected!("avx2") {
            return Self::Avx2;
        }
        Self::Portable
    }

    /// Writes the products of [`ROWS`] rows, `(ROWS, k)`, with a block of a filter, `(k / 2, WIDTH, 2)`.
    pub fn multiply(self, rows: &[i16], filter: &[i16], sums: &mut [[i32; WIDTH]; ROWS]) {
        let k = rows.len() / ROWS;
        assert!(rows.len() == ROWS * k && k.is_multiple_of(2) && filter.len() == k * WIDTH, "rows of {k} columns");
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the machine has the instructions, and the lengths were checked.
            Self::Avx2 => unsafe { x86::multiply(rows, filter, sums) },
            Self::Portable => {
                for (row, sums) in rows.chunks_exact(k.max(1)).zip(sums) {
                    *sums = [0; WIDTH];
                    for (row, filter) in row.as_chunks::<2>().0.iter().zip(filter.chunks_exact(2 * WIDTH)) {
                        for (sum, of_filter) in sums.iter_mut().zip(filter.as_chunks::<2>().0) {
                            let product = |i: usize| i32::from(row[i]) * i32::from(of_filter[i]);
                            *sum += product(0) + product(1);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{ROWS, WIDTH};

    /// # Safety
    /// `rows` is `(ROWS, k)` for an even `k`, and `filter` has `k * WIDTH` values.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn multiply(rows: &[i16], filter: &[i16], sums: &mut [[i32; WIDTH]; ROWS]) {
        let k = rows.len() / ROWS;
        let mut totals = [[_mm256_setzero_si256(); 2]; ROWS];
        let (mut filter, mut at) = (filter.as_ptr(), rows.as_ptr());
        for _ in 0..k / 2 {
            // SAFETY: the pair of columns is in each of the rows, and its two vectors of outputs are in the filter.
            unsafe {
                let of_filter = [_mm256_loadu_si256(filter.cast()), _mm256_loadu_si256(filter.add(WIDTH).cast())];
                for (r, total) in totals.iter_mut().enumerate() {
                    let pair = _mm256_set1_epi32(at.add(r * k).cast::<i32>().read_unaligned());
                    total[0] = _mm256_add_epi32(total[0], _mm256_madd_epi16(pair, of_filter[0]));
                    total[1] = _mm256_add_epi32(total[1], _mm256_madd_epi16(pair, of_filter[1]));
                }
                filter = filter.add(2 * WIDTH);
                at = at.add(2);
            }
        }
        for (total, sums) in totals.into_iter().zip(sums) {
            // SAFETY: 16 sums of 32 bits are two vectors.
            unsafe {
                _mm256_storeu_si256(sums.as_mut_ptr().cast(), total[0]);
                _mm256_storeu_si256(sums.as_mut_ptr().add(WIDTH / 2).cast(), total[1]);
            }
        }
    }
}
