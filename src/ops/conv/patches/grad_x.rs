//! Gradient of the input, one class of its pixels at a time.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gather::{Patches, with_rows};
use super::{Pixels, Place, convolve_pixels, multiply, pack_columns, packed_len};
use crate::ops::conv::Dims;
use crate::ops::conv::kernel::product::width;
use crate::ops::conv::kernel::{Epilogue, Prologue};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::vectorize;
use crate::parallel::Each;

/// Writes the gradient of the input, passed through `epilogue`, to `gx`.
pub(in crate::ops::conv) fn grad_x(gy: &[f32], w: &[f32], d: Dims, arch: Arch, epilogue: Epilogue, gx: &mut [f32]) {
    assert!(epilogue.fits(d.c, gx.len()) && gx.len() == d.n * d.h * d.w * d.c, "a gradient of {}", gx.len());
    let s = d.stride;
    for class in 0..s * s {
        let [a, b] = [class / s, class % s];
        // Tap (ky, kx) reaches pixel (y, x) from output ((y + padding - ky) / stride, ..), if that is an integer.
        let offset = |at: usize, k: usize| {
            let distance = (at + d.padding) as isize - k as isize;
            (distance % s as isize == 0).then_some(distance / s as isize)
        };
        let seen = |tap: &usize| Some([offset(a, tap / d.kw)?, offset(b, tap % d.kw)?]);
        let taps: Vec<usize> = (0..d.kh * d.kw).filter(|tap| seen(tap).is_some()).collect();
        let grid = [d.h.saturating_sub(a).div_ceil(s), d.w.saturating_sub(b).div_ceil(s)];
        if grid.contains(&0) {
            continue;
        }
        let columns = taps.len() * d.co;
        with_scratch(packed_len(columns, d.c, arch), |filter| {
            let at = |i, tap: usize, o: usize| w[(o * d.c + i) * d.kh * d.kw + taps[tap]];
            pack_columns([taps.len(), d.co], d.c, at, arch, filter);
            let offsets = taps.iter().filter_map(seen).collect();
            let (size, prologue) = ([d.n, d.ho, d.wo, d.co], Prologue::default());
            let patches = Patches { x: gy, prologue, size, grid, step: 1, taps: offsets, run: 1 };
            arch.dispatch(GradX { patches, filter, d, class: [a, b], epilogue, gx });
        });
    }
}

/// Gradient of the pixels of one class.
struct GradX<'a> {
    patches: Patches<'a>,
    filter: &'a [f32],
    d: Dims,
    class: [usize; 2],
    epilogue: Epilogue<'a>,
    gx: &'a mut [f32],
}

impl WithSimd for GradX<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { patches, filter, d, class, epilogue, gx } = self;
        let [grid_rows, grid_cols] = patches.grid;
        let blocks = d.c.div_ceil(width::<S>());
        // Some rows of places at a time; each is `stride` rows of pixels.
        let per_piece = (patches.piece() / grid_cols).clamp(1, grid_rows);
        let piece_rows = per_piece * d.stride;
        let pieces: Vec<_> = gx
            .chunks_mut(d.h * d.w * d.c)
            .enumerate()
            .flat_map(|(image, gx)| {
                let rows = gx.chunks_mut(piece_rows * d.w * d.c).enumerate();
                rows.map(move |(i, gx)| (image, i * per_piece, gx))
            })
            .collect();
        pieces.into_par_iter().each(&|(image, row, gx)| {
            let count = per_piece.min(grid_rows.saturating_sub(row)) * grid_cols;
            if count == 0 {
                return;
            }
            let first_pixel = (image * d.h + row * d.stride) * d.w;
            if d.stride == 1 && !patches.taps.is_empty() {
                // With one class, its places are the pixels.
                return convolve_pixels(simd, (&patches, filter), epilogue, first_pixel, d.c, gx);
            }
            let pixels = Pixels::Class { stride: d.stride, class, grid_cols, width: d.w };
            with_rows(&patches, blocks * width::<S>(), count, |rows, buffer, m| {
                patches.gather(simd, (image * grid_rows + row) * grid_cols, count, rows, buffer);
                for (block, m) in m.chunks_exact_mut(rows * width::<S>()).enumerate() {
                    if patches.taps.is_empty() {
                        // No output depends on these pixels.
                        m.fill(0.0);
                    } else {
                        multiply(simd, (filter, patches.columns()), block, count, rows, buffer, m);
                    }
                    vectorize(simd, Place { m, block, epilogue, co: d.c, pixels, count, first: first_pixel, y: gx });
                }
            });
        });
    }
}
