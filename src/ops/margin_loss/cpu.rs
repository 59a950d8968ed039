//! Passes over blocks of class centres. Blocks are divided into parts that run in parallel. The sums of the parts are
//! joined in order, and the number of parts depends on the number of classes only, so no result depends on the number
//! of threads.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::kernel::{BLOCK, ROWS, Real, STRIP, add_grad_embedding, grad_kernel, product};
use super::softmax::{Gradient, RowSum};
use crate::ops::lanes;
use crate::ops::normalize::EPS;
use crate::parallel::Each;
use crate::vectors;

/// Largest number of parts that blocks are divided into: each part has its own gradient of the embeddings.
const MAX_PARTS: usize = 32;

#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub n: usize,
    pub d: usize,
    pub k: usize,
}

impl Dims {
    /// Number of rows of cosines; rows from `n` on are padding.
    fn rows(self) -> usize {
        self.n.max(1).next_multiple_of(ROWS)
    }

    /// Distance between the rows of transposed matrices.
    fn stride(self) -> usize {
        self.n.max(1).next_multiple_of(STRIP)
    }

    /// Number of elements of an embedding, padded with zeros.
    fn depth(self) -> usize {
        self.d.next_multiple_of(ROWS)
    }

    fn blocks(self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    /// Number of elements of the cosines `(blocks, rows, BLOCK)`, not clamped, and of the inverse norms
    /// `(blocks, BLOCK)`.
    pub fn saved(self) -> usize {
        self.blocks() * (self.rows() + 1) * BLOCK
    }

    fn blocks_per_part(self) -> usize {
        self.blocks().div_ceil(MAX_PARTS)
    }
}

/// Normalised embeddings.
struct Embedding<T> {
    /// `(n, depth)`.
    rows: Vec<T>,
    /// `(depth, stride)`.
    transposed: Vec<T>,
    norms: Vec<f64>,
}

impl<T: Real> Embedding<T> {
    fn new(e: &[T], dims: Dims) -> Self {
        let (depth, stride) = (dims.depth(), dims.stride());
        let (mut rows, mut transposed) = (vec![T::zero(); dims.n * depth], vec![T::zero(); depth * stride]);
        let mut norms = Vec::with_capacity(dims.n);
        for (n, e) in e.chunks_exact(dims.d).enumerate() {
            let norm = (e.iter().map(|e| e.to_f64() * e.to_f64()).sum::<f64>() + EPS).sqrt();
            for (i, e) in e.iter().enumerate() {
                let e = T::from_f64(e.to_f64() / norm);
                rows[n * depth + i] = e;
                transposed[i * stride + n] = e;
            }
            norms.push(norm);
        }
        Self { rows, transposed, norms }
    }
}

/// Writes the cosines and the inverse norms of the centres, which the backward pass needs, to `saved`, of
/// [`Dims::saved`] elements; returns each row's sum over all classes but the target.
pub(super) fn forward<T: Real>(
    e: &[T],
    w: &[T],
    dims: Dims,
    labels: &[i64],
    scale: f64,
    saved: &mut [T],
) -> Vec<RowSum<T>> {
    let e = Embedding::new(e, dims);
    let block_len = dims.rows() * BLOCK;
    let (cosine, inv_norm) = saved.split_at_mut(dims.blocks() * block_len);
    let per_part = dims.blocks_per_part();
    let parts: Vec<Vec<RowSum<T>>> = cosine
        .par_chunks_mut(per_part * block_len)
        .zip(inv_norm.par_chunks_mut(per_part * BLOCK))
        .enumerate()
        .map(|(part, (cosine, inv_norm))| {
            let (first, scale) = (part * per_part, T::from_f64(scale));
            T::with_scratch(dims.depth() * BLOCK, |panel| {
                vectors::arch().dispatch(Forward { e: &e, w, dims, labels, scale, first, cosine, inv_norm, panel })
            })
        })
        .collect();
    let mut sums = vec![RowSum::default(); dims.n];
    for part in &parts {
        sums.iter_mut().zip(part).for_each(|(sum, part)| sum.join(part));
    }
    sums
}

struct Forward<'a, T> {
    e: &'a Embedding<T>,
    w: &'a [T],
    dims: Dims,
    labels: &'a [i64],
    scale: T,
    first: usize,
    cosine: &'a mut [T],
    inv_norm: &'a mut [T],
    panel: &'a mut [T],
}

impl<T: Real> WithSimd for Forward<'_, T> {
    type Output = Vec<RowSum<T>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let Self { e, w, dims, labels, scale, first, cosine, inv_norm, panel } = self;
        let mut sums = vec![RowSum::default(); dims.n];
        let blocks = cosine.chunks_exact_mut(dims.rows() * BLOCK).zip(inv_norm.as_chunks_mut::<BLOCK>().0);
        for (i, (cosine, inv_norm)) in blocks.enumerate() {
            let column = (first + i) * BLOCK;
            let valid = BLOCK.min(dims.k - column);
            pack(w, dims, column, panel);
            inverse_norms(panel, dims.depth(), inv_norm);
            product(simd, dims.depth(), (&e.transposed, dims.stride()), panel, cosine);
            for (row, cosine) in cosine.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate().take(dims.n) {
                for j in 0..BLOCK {
                    cosine[j] *= inv_norm[j];
                }
                let target = usize::try_from(labels[row]).ok().and_then(|label| label.checked_sub(column));
                sums[row].add(cosine, valid, target.filter(|&t| t < valid), scale);
            }
        }
        sums
    }
}

/// Rows of the centres, or of their gradient, from the prefetch of one to its copy: each is on another page, where the
/// hardware's prefetching ends.
const AHEAD: usize = 8;

/// Prefetches the elements of a block from `at` on, as far as there are any.
#[inline(always)]
fn prefetch<T>(x: &[T], at: usize) {
    let of_line = 64 / size_of::<T>();
    if let Some(block) = x.get(at..at + BLOCK) {
        block.iter().step_by(of_line).for_each(|first| lanes::prefetch(first));
    }
}

/// Copies the centres from `column` on to a panel, padded with zeros after the last centre and at the end of each.
#[inline(always)]
fn pack<T: Real>(w: &[T], dims: Dims, column: usize, panel: &mut [T]) {
    let depth = dims.depth();
    for i in 0..depth {
        prefetch(w, (i + AHEAD) * dims.k + column);
        let row = if i < dims.d { &w[i * dims.k + column..(i + 1) * dims.k] } else { &[] };
        for strip in 0..BLOCK / STRIP {
            let panel = &mut panel[(strip * depth + i) * STRIP..][..STRIP];
            match row.get(strip * STRIP..(strip + 1) * STRIP) {
                Some(row) => panel.copy_from_slice(row),
                None => {
                    let row = row.get(strip * STRIP..).unwrap_or_default();
                    panel[..row.len()].copy_from_slice(row);
                    panel[row.len()..].fill(T::zero());
                }
            }
        }
    }
}

/// Writes the inverse norms of a panel's columns.
#[inline(always)]
fn inverse_norms<T: Real>(panel: &[T], depth: usize, inv_norm: &mut [T; BLOCK]) {
    /// Rows whose squares are added in `T` before their sum is added in f64.
    const RUN: usize = 64;
    for (strip, inv_norm) in panel.chunks_exact(depth * STRIP).zip(inv_norm.as_chunks_mut::<STRIP>().0) {
        let mut total = [EPS; STRIP];
        for rows in strip.chunks(RUN * STRIP) {
            let mut squares = [T::zero(); STRIP];
            for row in rows.as_chunks::<STRIP>().0 {
                for j in 0..STRIP {
                    squares[j] += row[j] * row[j];
                }
            }
            total.iter_mut().zip(squares).for_each(|(t, s)| *t += s.to_f64());
        }
        inv_norm.iter_mut().zip(total).for_each(|(inv, t)| *inv = T::from_f64(1.0 / t.sqrt()));
    }
}

/// Writes the gradient of the kernel to `gw: (d, k)` and returns that of the embeddings `(n, d)`.
pub(super) fn backward<T: Real>(
    e: &[T],
    w: &[T],
    dims: Dims,
    saved: &[T],
    rows: &[Gradient<T>],
    gw: &mut [T],
) -> Vec<T> {
    let e = Embedding::new(e, dims);
    let per_part = dims.blocks_per_part();
    let mut parts: Vec<Vec<&mut [T]>> =
        (0..dims.blocks().div_ceil(per_part)).map(|_| Vec::with_capacity(dims.d)).collect();
    for row in gw.chunks_mut(dims.k) {
        parts.iter_mut().zip(row.chunks_mut(per_part * BLOCK)).for_each(|(part, row)| part.push(row));
    }
    let (depth, stride) = (dims.depth(), dims.stride());
    let (cosine, inv_norm) = saved.split_at(dims.blocks() * dims.rows() * BLOCK);
    let partial: Vec<Vec<T>> = parts
        .into_par_iter()
        .enumerate()
        .map(|(part, gw)| {
            T::with_scratch((depth + dims.n + stride) * BLOCK, |memory| {
                let first = part * per_part;
                vectors::arch().dispatch(Backward { e: &e, w, dims, cosine, inv_norm, rows, first, gw, memory })
            })
        })
        .collect();
    grad_embedding(&e, dims, &partial)
}

struct Backward<'a, T> {
    e: &'a Embedding<T>,
    w: &'a [T],
    dims: Dims,
    cosine: &'a [T],
    inv_norm: &'a [T],
    rows: &'a [Gradient<T>],
    first: usize,
    gw: Vec<&'a mut [T]>,
    memory: &'a mut [T],
}

impl<T: Real> WithSimd for Backward<'_, T> {
    /// This part's gradient of the normalised embeddings, `(depth, stride)`.
    type Output = Vec<T>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Vec<T> {
        let Self { e, w, dims, cosine, inv_norm, rows, first, mut gw, memory } = self;
        let (depth, stride, block_len) = (dims.depth(), dims.stride(), dims.rows() * BLOCK);
        let mut ge = vec![T::zero(); depth * stride];
        let (panel, memory) = memory.split_at_mut(depth * BLOCK);
        let (g, transposed) = memory.split_at_mut(dims.n * BLOCK);
        transposed.fill(T::zero());
        for i in 0..gw[0].len().div_ceil(BLOCK) {
            let block = first + i;
            let column = block * BLOCK;
            let valid = BLOCK.min(dims.k - column);
            pack(w, dims, column, panel);
            let cosine = &cosine[block * block_len..][..block_len];
            let inv_norm = &inv_norm.as_chunks::<BLOCK>().0[block];
            let mut t = [T::zero(); BLOCK];
            let of_rows = cosine.as_chunks::<BLOCK>().0.iter().zip(rows);
            for (n, (cosine, row)) in of_rows.enumerate() {
                let mut of_row = [T::zero(); BLOCK];
                row.of_cosines(cosine, valid, column, &mut of_row);
                for j in 0..BLOCK {
                    t[j] += of_row[j] * cosine[j];
                    of_row[j] *= inv_norm[j];
                    transposed[j * stride + n] = of_row[j];
                }
                for (strip, of_row) in of_row.as_chunks::<STRIP>().0.iter().enumerate() {
                    g[(strip * dims.n + n) * STRIP..][..STRIP].copy_from_slice(of_row);
                }
            }
            // The normalisation removes the part of the gradient along the centre.
            t.iter_mut().zip(inv_norm).for_each(|(t, inv)| *t *= *inv * *inv);
            add_grad_embedding(simd, depth, panel, transposed, &mut ge);
            grad_kernel(simd, depth, (&e.transposed, stride), (g, &t), panel, |row, y| {
                if let Some(later) = gw.get(row + AHEAD) {
                    prefetch(later, i * BLOCK);
                }
                if let Some(gw) = gw.get_mut(row) {
                    gw[i * BLOCK..][..valid].copy_from_slice(&y[..valid]);
                }
            });
        }
        ge
    }
}

/// Adds up the parts and passes the gradient through the normalisation.
fn grad_embedding<T: Real>(e: &Embedding<T>, dims: Dims, partial: &[Vec<T>]) -> Vec<T> {
    let (depth, stride) = (dims.depth(), dims.stride());
    let mut ge = vec![T::zero(); dims.n * dims.d];
    ge.par_chunks_mut(dims.d).enumerate().each(&|(n, ge)| {
        let sum = |i: usize| partial.iter().map(|part| part[i * stride + n].to_f64()).sum::<f64>();
        let sums: Vec<f64> = (0..dims.d).map(sum).collect();
        let e_hat = &e.rows[n * depth..][..dims.d];
        let along: f64 = sums.iter().zip(e_hat).map(|(g, e)| g * e.to_f64()).sum();
        for ((ge, g), e_hat) in ge.iter_mut().zip(sums).zip(e_hat) {
            *ge = T::from_f64((g - e_hat.to_f64() * along) / e.norms[n]);
        }
    });
    ge
}
