//! Dense convolution of 8-bit integers: products of gathered patches.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::finish::{Element, Finish};
#[cfg(target_arch = "x86_64")]
use super::product::{Avx2, Vnni};
use super::product::{Column, Kind, MOST_SUMS, Packed, Portable, Tile};
use super::{Affine, Dims, Input, Int8Weight, PIECE_ELEMENTS, Source};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::dispatch;
use crate::parallel::Each;

/// Calls `$f` with the tile of a kind and these arguments.
macro_rules! with_tile {
    ($kind:expr, $f:path, $($args:expr),*) => {
        match $kind {
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni => $f(Vnni, $($args),*),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => $f(Avx2, $($args),*),
            Kind::Pairs => $f(Portable::<i16, 2>::NEW, $($args),*),
            #[cfg(test)]
            Kind::Quads => $f(Portable::<u8, 4>::NEW, $($args),*),
        }
    };
}

/// Packs a filter.
pub(super) fn packed(kind: Kind, weight: &Int8Weight, input: Affine) -> Packed {
    with_tile!(kind, Packed::new, weight, input)
}

/// A convolution of some input.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub packed: &'a Packed,
    pub input: Affine,
    pub x: Source<'a>,
    pub d: Dims,
    pub finish: Finish<'a>,
}

/// Computes the result in pieces of whole pixels.
pub(super) fn fill<T: Element>(kind: Kind, job: Job, y: &mut [T]) {
    with_tile!(kind, fill_with, job, y);
}

fn fill_with<L: Tile, T: Element>(tile: L, job: Job, y: &mut [T]) {
    let Job { packed, input, x, d, finish } = job;
    let k = packed.k;
    let least = d.pixels().div_ceil(2 * rayon::current_num_threads());
    let piece = (PIECE_ELEMENTS / k).clamp(4 * L::ROWS, 128).min(least).next_multiple_of(L::ROWS);
    y.par_chunks_mut(piece * d.co).enumerate().each(&|(i, y)| {
        let (first, num) = (i * piece, y.len() / d.co);
        let finish = finish.of_part(first * d.co);
        if let Some(rows) = in_place::<L>(x, d, k) {
            let rows = &rows[first * k..][..num * k];
            return dispatch(Multiply { tile, packed, rows, co: d.co, finish, y });
        }
        with_scratch((num * k * size_of::<L::Column>()).div_ceil(4), |rows| {
            let rows = &mut bytemuck::cast_slice_mut::<f32, L::Column>(rows)[..num * k];
            dispatch(Gather { x, input, d, first, k, rows });
            dispatch(Multiply { tile, packed, rows, co: d.co, finish, y });
        });
    });
}

/// Returns the rows of all pixels where they are the input as it is.
fn in_place<L: Tile>(x: Source<'_>, d: Dims, k: usize) -> Option<&[L::Column]> {
    let is_pixel = d.kh * d.kw == 1 && d.stride == 1 && d.padding == 0 && d.c == k;
    match x.x {
        Input::Bytes(x) if is_pixel => bytemuck::try_cast_slice(x).ok().filter(|_| size_of::<L::Column>() == 1),
        _ => None,
    }
}

/// Writes the products of rows with the filter.
struct Multiply<'a, L: Tile, T> {
    tile: L,
    packed: &'a Packed,
    rows: &'a [L::Column],
    co: usize,
    finish: Finish<'a>,
    y: &'a mut [T],
}

impl<L: Tile, T: Element> WithSimd for Multiply<'_, L, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, packed, rows, co, finish, y } = self;
        let (k, mut sums) = (packed.k, [0.0; MOST_SUMS]);
        let num = rows.len() / k;
        // Plain loops: iterators and closures may be compiled without the machine's vectors.
        for channel in (0..co).step_by(L::WIDTH) {
            let (filter, starts) =
                (&packed.filter[channel * k..][..L::WIDTH * k], &packed.starts[channel..][..L::WIDTH]);
            for first in (0..num).step_by(L::ROWS) {
                let of_tile = L::ROWS.min(num - first);
                tile.multiply(&rows[first * k..][..of_tile * k], k, filter, starts, &mut sums);
                finish.of_part(first * co).tile(simd, &sums, [of_tile, L::WIDTH], [channel, co], &mut y[first * co..]);
            }
        }
    }
}

/// Writes the patches of the pixels from `first` on to `rows`, of `k` columns each.
struct Gather<'a, C> {
    x: Source<'a>,
    input: Affine,
    d: Dims,
    first: usize,
    k: usize,
    rows: &'a mut [C],
}

impl<C: Column> WithSimd for Gather<'_, C> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, input, d, first, k, rows } = self;
        let columns = d.patch();
        for i in 0..rows.len() / k {
            let (row, pixel) = (&mut rows[i * k..][..k], first + i);
            let (image, oy, ox) = (pixel / (d.ho * d.wo), pixel / d.wo % d.ho, pixel % d.wo);
            row[columns..].fill(C::zero(input));
            for tap in 0..d.kh * d.kw {
                let row = &mut row[tap * d.c..][..d.c];
                // Coordinates above or left of the image wrap to values beyond it.
                let y = (oy * d.stride + tap / d.kw).wrapping_sub(d.padding);
                let column = (ox * d.stride + tap % d.kw).wrapping_sub(d.padding);
                if y >= d.h || column >= d.w {
                    row.fill(C::zero(input));
                    continue;
                }
                x.pixel(input, (image * d.h + y) * d.w + column, d.c, row);
            }
        }
    }
}
