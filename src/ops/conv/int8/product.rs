//! Products of rows with a block of a filter.

use super::{Affine, Int8Weight};
#[cfg(target_arch = "x86_64")]
use crate::vectors;

/// Most sums of a tile.
pub(super) const MOST_SUMS: usize = 12 * 32;
/// Sums of a tile, rounded to f32: [`Tile::WIDTH`] outputs of a row, then those of the next row.
pub(super) type Sums = [f32; MOST_SUMS];

/// An element of a row.
pub(super) trait Column: bytemuck::Pod + Into<i32> + Send + Sync {
    /// The column of zero, which is also what each column has too much.
    fn zero(of: Affine) -> Self;
    /// Writes the columns of bytes.
    fn of_bytes(of: Affine, bytes: &[u8], columns: &mut [Self]);
    /// Writes the column of a quantised number.
    fn of_steps(of: Affine, steps: i32) -> Self;
}

/// Steps from zero.
impl Column for i16 {
    #[inline(always)]
    fn zero(_: Affine) -> Self {
        0
    }

    #[inline(always)]
    fn of_bytes(of: Affine, bytes: &[u8], columns: &mut [Self]) {
        let bytes = &bytes[..columns.len()];
        for i in 0..columns.len() {
            columns[i] = i16::from(bytes[i]) - i16::from(of.zero);
        }
    }

    #[inline(always)]
    fn of_steps(_: Affine, steps: i32) -> Self {
        steps as Self
    }
}

/// Bytes. What a sum has too much depends on the filter alone, so it is subtracted before ([`Packed::starts`]).
impl Column for u8 {
    #[inline(always)]
    fn zero(of: Affine) -> Self {
        of.zero
    }

    #[inline(always)]
    fn of_bytes(_: Affine, bytes: &[u8], columns: &mut [Self]) {
        columns.copy_from_slice(&bytes[..columns.len()]);
    }

    #[inline(always)]
    fn of_steps(of: Affine, steps: i32) -> Self {
        (steps + i32::from(of.zero)) as Self
    }
}

/// A product of a few rows with a block of a filter, in registers.
pub(super) trait Tile: Copy + Send + Sync {
    /// An element of a row.
    type Column: Column;
    /// Rows that are multiplied together.
    const ROWS: usize;
    /// Output channels of a block of a filter.
    const WIDTH: usize;
    /// Columns that an instruction multiplies and adds up.
    const STEP: usize;

    /// Writes the sums of up to [`Self::ROWS`] rows of `k` columns with a block of a filter,
    /// `(k / STEP, WIDTH, STEP)`, from `starts` on, one for each output.
    fn multiply(self, rows: &[Self::Column], k: usize, filter: &[i8], starts: &[i32], sums: &mut Sums);
}

/// Checks the lengths of a product and returns the number of its rows.
fn num_rows<T: Tile>(_: T, rows: &[T::Column], k: usize, filter: &[i8], starts: &[i32]) -> usize {
    let num = rows.len() / k;
    assert!(k.is_multiple_of(T::STEP) && rows.len() == num * k && num <= T::ROWS, "rows of {k} columns");
    assert!(filter.len() == k * T::WIDTH && starts.len() == T::WIDTH, "a filter of {k} columns");
    num
}

/// Instructions for products of dense filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// AVX-512 VNNI: four bytes at a time.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// AVX2: two columns of 16 bits at a time.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// As AVX2, by ordinary instructions.
    Pairs,
    /// As VNNI, by ordinary instructions.
    #[cfg(test)]
    Quads,
}

impl Kind {
    /// The fastest that this machine has and this process may use.
    pub fn of_machine() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if vectors::has_vnni() {
                return Self::Vnni;
            }
            if vectors::has_avx2() {
                return Self::Avx2;
            }
        }
        Self::Pairs
    }
}

/// A dense filter as a tile reads it.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    /// `(blocks of outputs, columns / STEP, WIDTH, STEP)`, with zeros where there are no more outputs or columns.
    /// Columns are taps and their channels.
    pub filter: Vec<i8>,
    /// What the sum of each output starts from.
    pub starts: Vec<i32>,
    /// Columns of a row.
    pub k: usize,
}

impl Packed {
    /// Packs a dense filter `(co, c, kh, kw)`, for input of `input`.
    pub fn new<T: Tile>(_: T, weight: &Int8Weight, input: Affine) -> Self {
        let [co, c, kh, kw] = weight.shape();
        let (taps, columns) = (kh * kw, kh * kw * c);
        let (k, outputs) = (columns.next_multiple_of(T::STEP), co.next_multiple_of(T::WIDTH));
        let (mut filter, mut starts) = (vec![0; outputs * k], vec![0; outputs]);
        for (output, start) in starts.iter_mut().enumerate().take(co) {
            let (block, lane) = (output / T::WIDTH, output % T::WIDTH);
            for column in 0..columns {
                let value = weight.values()[(output * c + column % c) * taps + column / c];
                let at = ((block * (k / T::STEP) + column / T::STEP) * T::WIDTH + lane) * T::STEP + column % T::STEP;
                filter[at] = value;
                *start -= i32::from(value) * T::Column::zero(input).into();
            }
        }
        Self { filter, starts, k }
    }
}

/// Products by ordinary instructions, for rows of `STEP` columns of type `C` at a time.
#[derive(Clone, Copy)]
pub(super) struct Portable<C, const STEP: usize>(std::marker::PhantomData<C>);

impl<C, const STEP: usize> Portable<C, STEP> {
    pub const NEW: Self = Self(std::marker::PhantomData);
}

impl<C: Column, const STEP: usize> Tile for Portable<C, STEP> {
    type Column = C;
    const ROWS: usize = 6;
    const WIDTH: usize = 16;
    const STEP: usize = STEP;

    fn multiply(self, rows: &[C], k: usize, filter: &[i8], starts: &[i32], sums: &mut Sums) {
        num_rows(self, rows, k, filter, starts);
        for (row, sums) in rows.chunks_exact(k).zip(sums.chunks_exact_mut(Self::WIDTH)) {
            let mut totals: [i32; 16] = *starts.first_chunk().expect("a start for each output");
            for (row, filter) in row.as_chunks::<STEP>().0.iter().zip(filter.chunks_exact(STEP * Self::WIDTH)) {
                for (total, of_filter) in totals.iter_mut().zip(filter.as_chunks::<STEP>().0) {
                    let products = row.iter().zip(of_filter).map(|(x, w)| (*x).into() * i32::from(*w));
                    *total += products.sum::<i32>();
                }
            }
            sums.iter_mut().zip(totals).for_each(|(sum, total)| *sum = total as f32);
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Vnni};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Sums, Tile, num_rows};

    /// Calls `$f::<N>` with the number of rows.
    macro_rules! by_rows {
        ($num:expr, $f:ident $args:tt, $($n:literal)*) => {
            match $num {
                $($n => $f::<$n> $args,)*
                _ => {}
            }
        };
    }

    /// Products by AVX2. The machine must have it.
    #[derive(Clone, Copy)]
    pub struct Avx2;

    impl Tile for Avx2 {
        type Column = i16;
        const ROWS: usize = 6;
        const WIDTH: usize = 16;
        const STEP: usize = 2;

        #[inline(always)]
        fn multiply(self, rows: &[i16], k: usize, filter: &[i8], starts: &[i32], sums: &mut Sums) {
            let num = num_rows(self, rows, k, filter, starts);
            // SAFETY: the machine has the instructions, and the lengths were checked.
            unsafe { by_rows!(num, avx2(rows.as_ptr(), k, filter.as_ptr(), starts, sums), 1 2 3 4 5 6) }
        }
    }

    /// # Safety
    /// `rows` is `(N, k)` for an even `k`, `filter` has `16 k` values, and there are 16 starts.
    #[target_feature(enable = "avx2")]
    unsafe fn avx2<const N: usize>(rows: *const i16, k: usize, filter: *const i8, starts: &[i32], sums: &mut Sums) {
        // SAFETY: there are two vectors of starts.
        let start = unsafe {
            let starts: *const __m256i = starts.as_ptr().cast();
            [_mm256_loadu_si256(starts), _mm256_loadu_si256(starts.add(1))]
        };
        let mut totals = [start; N];
        for pair in 0..k / 2 {
            // SAFETY: the pair of columns is in each of the rows, and its two vectors of outputs are in the filter.
            unsafe {
                let at = filter.add(pair * 32);
                let of_filter = [
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())),
                    _mm256_cvtepi8_epi16(_mm_loadu_si128(at.add(16).cast())),
                ];
                for (r, total) in totals.iter_mut().enumerate() {
                    let pair = _mm256_set1_epi32(rows.add(r * k + 2 * pair).cast::<i32>().read_unaligned());
                    total[0] = _mm256_add_epi32(total[0], _mm256_madd_epi16(pair, of_filter[0]));
                    total[1] = _mm256_add_epi32(total[1], _mm256_madd_epi16(pair, of_filter[1]));
                }
            }
        }
        for (r, total) in totals.into_iter().enumerate() {
            // SAFETY: 16 sums of 32 bits are two vectors.
            unsafe {
                _mm256_storeu_ps(sums.as_mut_ptr().add(16 * r), _mm256_cvtepi32_ps(total[0]));
                _mm256_storeu_ps(sums.as_mut_ptr().add(16 * r + 8), _mm256_cvtepi32_ps(total[1]));
            }
        }
    }

    /// Products by AVX-512 VNNI. The machine must have it.
    #[derive(Clone, Copy)]
    pub struct Vnni;

    impl Tile for Vnni {
        type Column = u8;
        const ROWS: usize = 12;
        const WIDTH: usize = 32;
        const STEP: usize = 4;

        #[inline(always)]
        fn multiply(self, rows: &[u8], k: usize, filter: &[i8], starts: &[i32], sums: &mut Sums) {
            let num = num_rows(self, rows, k, filter, starts);
            // SAFETY: the machine has the instructions, and the lengths were checked.
            unsafe { by_rows!(num, vnni(rows.as_ptr(), k, filter.as_ptr(), starts, sums), 1 2 3 4 5 6 7 8 9 10 11 12) }
        }
    }

    /// # Safety
    /// `rows` is `(N, k)` for a multiple of four `k`, `filter` has `32 k` values, and there are 32 starts.
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn vnni<const N: usize>(rows: *const u8, k: usize, filter: *const i8, starts: &[i32], sums: &mut Sums) {
        // SAFETY: there are two vectors of starts.
        let start = unsafe {
            let starts: *const __m512i = starts.as_ptr().cast();
            [_mm512_loadu_si512(starts), _mm512_loadu_si512(starts.add(1))]
        };
        let mut totals = [start; N];
        for four in 0..k / 4 {
            // SAFETY: the four columns are in each of the rows, and their two vectors of outputs are in the filter.
            unsafe {
                let at = filter.add(four * 128);
                let of_filter = [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())];
                for (r, total) in totals.iter_mut().enumerate() {
                    let bytes = _mm512_set1_epi32(rows.add(r * k + 4 * four).cast::<i32>().read_unaligned());
                    total[0] = _mm512_dpbusd_epi32(total[0], bytes, of_filter[0]);
                    total[1] = _mm512_dpbusd_epi32(total[1], bytes, of_filter[1]);
                }
            }
        }
        for (r, total) in totals.into_iter().enumerate() {
            // SAFETY: 32 sums of 32 bits are two vectors.
            unsafe {
                _mm512_storeu_ps(sums.as_mut_ptr().add(32 * r), _mm512_cvtepi32_ps(total[0]));
                _mm512_storeu_ps(sums.as_mut_ptr().add(32 * r + 16), _mm512_cvtepi32_ps(total[1]));
            }
        }
    }
}
