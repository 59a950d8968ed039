//! Convolution with one group as matrix products over tiles of gathered patches.
//!
//! A tile of output pixels gathers its patches into a `(pixels, KH * KW * C)` matrix that stays in the cache; the
//! weight is unfolded once per call to `(KH * KW * C, C_out)`. Worker threads take tiles. Sums over tiles go through a
//! number of accumulators that depends on the sizes only, so the result does not depend on the number of threads.

use candle_core::WithDType;
use rayon::prelude::*;

use super::Dims;
use crate::ops::gemm::{Mat, Output, gemm};

/// Elements of a tile of patches that is read once: about half of an L2 cache.
const TILE_ELEMENTS: usize = 64 * 1024;
/// Elements of a tile of patches in the weight gradient, where long tiles save passes over the accumulator.
const GRAD_W_TILE_ELEMENTS: usize = 512 * 1024;
/// Limits of the weight gradient's accumulators: elements of all together, and their number.
const GRAD_W_SUM_ELEMENTS: usize = 8 << 20;
const GRAD_W_MAX_SUMS: usize = 16;

pub(super) fn forward<T: WithDType>(x: &[T], w: &[T], d: Dims, y: &mut [T]) {
    correlate(x, &unfold_weight(w, d), d, y);
}

/// Writes the correlation of `x` with an unfolded weight `(KH * KW * C, C_out)` to `y`.
fn correlate<T: WithDType>(x: &[T], w: &[T], d: Dims, y: &mut [T]) {
    let tile = tile_pixels(d, TILE_ELEMENTS);
    let w = Mat::new(w, d.patch(), d.co);
    y.par_chunks_mut(tile * d.co).enumerate().for_each_init(Vec::new, |buffer, (i, y)| {
        let pixels = y.len() / d.co;
        gemm(y, patches(x, i * tile, pixels, d, buffer), w, Output::Overwrite);
    });
}

pub(super) fn grad_x<T: WithDType>(gy: &[T], w: &[T], d: Dims, gx: &mut [T]) {
    // With stride 1 the gradient is itself a correlation, of `gy` with the flipped weight: no scattered sums.
    if d.stride == 1 && d.padding < d.kh && d.padding < d.kw && d.kh == d.kw {
        let back = Dims { h: d.ho, w: d.wo, c: d.co, ho: d.h, wo: d.w, co: d.c, padding: d.kh - 1 - d.padding, ..d };
        return correlate(gy, &unfold_flipped_weight(w, d), back, gx);
    }
    let w = unfold_weight(w, d);
    let w = Mat::new(&w, d.patch(), d.co);
    let tile = tile_pixels(d, TILE_ELEMENTS);
    gx.fill(T::zero());
    let images = gx.par_chunks_mut(d.h * d.w * d.c).zip(gy.par_chunks(d.ho * d.wo * d.co));
    images.for_each_init(Vec::new, |buffer, (gx, gy)| {
        for (i, gy) in gy.chunks(tile * d.co).enumerate() {
            let pixels = gy.len() / d.co;
            buffer.resize(pixels * d.patch(), T::zero());
            gemm(buffer, Mat::new(gy, pixels, d.co), w.t(), Output::Overwrite);
            for (p, patch) in buffer.chunks_exact(d.patch()).enumerate() {
                scatter_patch(gx, i * tile + p, patch, d);
            }
        }
    });
}

pub(super) fn grad_w<T: WithDType>(x: &[T], gy: &[T], d: Dims, gw: &mut [T]) {
    let tile = tile_pixels(d, GRAD_W_TILE_ELEMENTS);
    let tiles = d.pixels().div_ceil(tile);
    let size = d.patch() * d.co;
    let sums = (GRAD_W_SUM_ELEMENTS / size.max(1)).clamp(2, GRAD_W_MAX_SUMS).min(tiles.max(1));
    let per_sum = tiles.div_ceil(sums).max(1) * tile;
    let mut partial = vec![T::zero(); sums * size];
    partial.par_chunks_mut(size).enumerate().for_each_init(Vec::new, |buffer, (i, sum)| {
        let (first, last) = (i * per_sum, ((i + 1) * per_sum).min(d.pixels()));
        for start in (first..last).step_by(tile) {
            let pixels = tile.min(last - start);
            let gy = Mat::new(&gy[start * d.co..], pixels, d.co);
            gemm(sum, patches(x, start, pixels, d, buffer).t(), gy, Output::Accumulate);
        }
    });
    let (sum, rest) = partial.split_at_mut(size);
    for other in rest.chunks_exact(size) {
        sum.iter_mut().zip(other).for_each(|(a, &b)| *a += b);
    }
    fold_weight(sum, d, gw);
}

/// Output pixels per tile: enough for an efficient product, few enough for the cache.
fn tile_pixels(d: Dims, elements: usize) -> usize {
    (elements / d.patch().max(1)).clamp(64, 1024)
}

/// Gathers the patches of `pixels` output pixels from `first` on into the rows of `buffer`; a 1x1 convolution of stride
/// 1 without padding needs no gathering.
fn patches<'a, T: WithDType>(x: &'a [T], first: usize, pixels: usize, d: Dims, buffer: &'a mut Vec<T>) -> Mat<'a, T> {
    if d.kh == 1 && d.kw == 1 && d.stride == 1 && d.padding == 0 {
        return Mat::new(&x[first * d.c..], pixels, d.c);
    }
    buffer.resize(pixels * d.patch(), T::zero());
    for (p, patch) in buffer.chunks_exact_mut(d.patch()).enumerate() {
        gather_patch(x, first + p, patch, d);
    }
    Mat::new(buffer, pixels, d.patch())
}

fn gather_patch<T: WithDType>(x: &[T], pixel: usize, patch: &mut [T], d: Dims) {
    let (image, oy, ox) = (pixel / (d.ho * d.wo), pixel / d.wo % d.ho, pixel % d.wo);
    let (columns, skipped) = column_range(ox, d);
    for (ky, row) in patch.chunks_exact_mut(d.kw * d.c).enumerate() {
        match (oy * d.stride + ky).checked_sub(d.padding).filter(|&y| y < d.h) {
            Some(y) => {
                let inside = skipped * d.c..(skipped + columns.len()) * d.c;
                let start = ((image * d.h + y) * d.w + columns.start) * d.c;
                row[..inside.start].fill(T::zero());
                row[inside.end..].fill(T::zero());
                let len = inside.len();
                row[inside].copy_from_slice(&x[start..start + len]);
            }
            None => row.fill(T::zero()),
        }
    }
}

/// Adds a patch's gradient to one image's; `pixel` counts within the image.
fn scatter_patch<T: WithDType>(gx: &mut [T], pixel: usize, patch: &[T], d: Dims) {
    let (oy, ox) = (pixel / d.wo, pixel % d.wo);
    let (columns, skipped) = column_range(ox, d);
    for (ky, row) in patch.chunks_exact(d.kw * d.c).enumerate() {
        if let Some(y) = (oy * d.stride + ky).checked_sub(d.padding).filter(|&y| y < d.h) {
            let start = (y * d.w + columns.start) * d.c;
            let row = &row[skipped * d.c..(skipped + columns.len()) * d.c];
            gx[start..start + row.len()].iter_mut().zip(row).for_each(|(a, &b)| *a += b);
        }
    }
}

/// Returns the input columns that the patch of output column `ox` covers, and how many kernel columns lie left of the
/// image.
fn column_range(ox: usize, d: Dims) -> (std::ops::Range<usize>, usize) {
    let left = ox * d.stride;
    let start = left.saturating_sub(d.padding).min(d.w);
    let end = (left + d.kw).saturating_sub(d.padding).min(d.w).max(start);
    (start..end, d.padding.saturating_sub(left).min(d.kw))
}

/// Reorders `(C_out, C, KH, KW)` to `(KH, KW, C, C_out)`.
fn unfold_weight<T: WithDType>(w: &[T], d: Dims) -> Vec<T> {
    let mut y = vec![T::zero(); w.len()];
    for (o, w) in w.chunks_exact(d.patch()).enumerate() {
        for (c, w) in w.chunks_exact(d.kh * d.kw).enumerate() {
            for (k, &w) in w.iter().enumerate() {
                y[(k * d.c + c) * d.co + o] = w;
            }
        }
    }
    y
}

/// Reorders `(C_out, C, KH, KW)` to `(KH, KW, C_out, C)`, with both kernel axes reversed.
fn unfold_flipped_weight<T: WithDType>(w: &[T], d: Dims) -> Vec<T> {
    let taps = d.kh * d.kw;
    let mut y = vec![T::zero(); w.len()];
    for (o, w) in w.chunks_exact(d.patch()).enumerate() {
        for (c, w) in w.chunks_exact(taps).enumerate() {
            for (k, &w) in w.iter().enumerate() {
                y[((taps - 1 - k) * d.co + o) * d.c + c] = w;
            }
        }
    }
    y
}

/// Reorders `(KH, KW, C, C_out)` to `(C_out, C, KH, KW)`: undoes [`unfold_weight`].
fn fold_weight<T: WithDType>(w: &[T], d: Dims, y: &mut [T]) {
    for (o, y) in y.chunks_exact_mut(d.patch()).enumerate() {
        for (c, y) in y.chunks_exact_mut(d.kh * d.kw).enumerate() {
            for (k, y) in y.iter_mut().enumerate() {
                *y = w[(k * d.c + c) * d.co + o];
            }
        }
    }
}
