//! Max pooling and nearest upsampling of images `(n, h, w, c)`, with their backward passes. Each element's sum runs in
//! one fixed order, so it does not depend on the number of threads.

use std::ops::Range;

use candle_core::{Result, bail};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::channels::{Repeated, Seen, see, see_lanes};
use super::lanes::{load, store};
use super::simd::{dispatch, for_lanes};
use crate::parallel::Each;

/// The square windows of pooling. Padding never is the largest value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Length of a side, in pixels.
    pub size: usize,
    /// Distance of neighbouring windows, in pixels.
    pub stride: usize,
    /// Pixels added on each side of the image, at most half a window.
    pub padding: usize,
}

impl Window {
    /// Returns the shape of the result for images `(n, h, w, c)`; sides are rounded down.
    ///
    /// # Errors
    /// When a window is larger than the padded image, consists of padding only, or the stride is 0.
    pub fn output_shape(&self, [n, h, w, c]: [usize; 4]) -> Result<[usize; 4]> {
        let Self { size, stride, padding } = *self;
        let is_valid = stride > 0 && size > 0 && padding <= size / 2;
        let before_last = |pixels: usize| pixels.checked_add(padding)?.checked_add(padding)?.checked_sub(size);
        let side = |pixels: usize| before_last(pixels).filter(|_| is_valid).map(|before| before / stride + 1);
        match [side(h), side(w)] {
            [Some(ho), Some(wo)] => Ok([n, ho, wo, c]),
            _ => bail!("pooling of {h}x{w} pixels by windows of size {size}, stride {stride} and padding {padding}"),
        }
    }

    /// The pixels of window `i` along a side.
    fn pixels(&self, i: usize, side: usize) -> Range<usize> {
        let start = i * self.stride;
        start.saturating_sub(self.padding)..(start + self.size - self.padding).min(side)
    }
}

/// Rows of pixels in memory.
#[derive(Clone, Copy)]
struct Image<'a> {
    x: &'a [f32],
    constants: &'a Repeated,
    shape: [usize; 3],
}

impl Image<'_> {
    /// The largest of a window's vectors of channels from `at` on: the value, and the number of its pixel, counted from
    /// 0 along the rows; of equal ones it is the first, and a NaN is larger than everything.
    ///
    /// # Safety
    /// The window is in the image, and the vector in the channels.
    #[inline(always)]
    unsafe fn largest_lanes<S: Simd>(&self, simd: S, [rows, columns]: &[Range<usize>; 2], at: usize) -> [S::f32s; 2] {
        let [_, w, c] = self.shape;
        let (mut best, mut number) = (simd.splat_f32s(f32::NEG_INFINITY), simd.splat_f32s(0.0));
        let mut i = 0.0;
        for row in rows.clone() {
            for column in columns.clone() {
                // SAFETY: by the contract.
                let x = unsafe { see_lanes(simd, load::<S>(self.x, (row * w + column) * c + at), self.constants, at) };
                let is_number = simd.equal_f32s(x, x);
                let is_above = simd.greater_than_f32s(x, best);
                let pick = |new, old| simd.select_f32s(is_number, simd.select_f32s(is_above, new, old), new);
                (best, number) = (pick(x, best), pick(simd.splat_f32s(i), number));
                i += 1.0;
            }
        }
        [best, number]
    }

    /// [`Self::largest_lanes`] for one channel.
    #[inline(always)]
    fn largest(&self, [rows, columns]: &[Range<usize>; 2], channel: usize) -> [f32; 2] {
        let [_, w, c] = self.shape;
        let (mut best, mut number, mut i) = (f32::NEG_INFINITY, 0.0, 0.0);
        for row in rows.clone() {
            for column in columns.clone() {
                let x = see(self.x[(row * w + column) * c + channel], self.constants, channel);
                if x > best || x.is_nan() {
                    (best, number) = (x, i);
                }
                i += 1.0;
            }
        }
        [best, number]
    }
}

/// Writes the largest value of each window of `x`, `(n, h, w, c)`, to `y`; a NaN is larger than everything.
pub(crate) fn max_pool(x: Seen, window: Window, shape: [usize; 4], y: &mut [f32]) -> Result<()> {
    let [n, h, w, c] = shape;
    let [_, ho, wo, _] = window.output_shape(shape)?;
    assert!(x.x.len() == n * h * w * c && y.len() == n * ho * wo * c, "{} values", x.x.len());
    let constants = Repeated::new(x.constants, c);
    y.par_chunks_mut(wo * c).enumerate().each(&|(row, y)| {
        let image = Image { x: &x.x[row / ho * h * w * c..][..h * w * c], constants: &constants, shape: [h, w, c] };
        dispatch(MaxRow { image, window, row: row % ho, y });
    });
    Ok(())
}

/// Writes a row of the result.
struct MaxRow<'a> {
    image: Image<'a>,
    window: Window,
    row: usize,
    y: &'a mut [f32],
}

impl WithSimd for MaxRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { image, window, row, y } = self;
        let [h, w, c] = image.shape;
        assert!(image.x.len() == h * w * c && image.constants.period() >= c, "{} values", image.x.len());
        let rows = window.pixels(row, h);
        for (column, y) in y.chunks_exact_mut(c).enumerate() {
            let pixels = [rows.clone(), window.pixels(column, w)];
            for_lanes!(
                c,
                S,
                |at| {
                    // SAFETY: the window's pixels end with the image's, the vector with the channels.
                    unsafe { store::<S>(y, at, image.largest_lanes(simd, &pixels, at)[0]) };
                },
                |i| {
                    y[i] = image.largest(&pixels, i)[0];
                }
            );
        }
    }
}

/// Writes the gradient of max pooling's input `x`, `(n, h, w, c)`, plus `other`, to `gx`. The first of a window's largest
/// values gets the gradient of its result.
pub(crate) fn max_pool_backward(
    x: Seen,
    window: Window,
    shape: [usize; 4],
    gy: &[f32],
    other: Option<&[f32]>,
    gx: &mut [f32],
) -> Result<()> {
    let [_, h, w, c] = shape;
    let [n, ho, wo, _] = window.output_shape(shape)?;
    assert!(x.x.len() == n * h * w * c && gx.len() == x.x.len() && gy.len() == n * ho * wo * c, "{} values", gy.len());
    match other {
        Some(other) => gx.copy_from_slice(other),
        None => gx.fill(0.0),
    }
    let constants = Repeated::new(x.constants, c);
    let images = x.x.par_chunks(h * w * c).zip(gy.par_chunks(ho * wo * c));
    gx.par_chunks_mut(h * w * c).zip(images).each(&|(gx, (x, gy))| {
        let image = Image { x, constants: &constants, shape: [h, w, c] };
        dispatch(MaxGrad { image, window, columns: wo, gy, gx });
    });
    Ok(())
}

/// Adds the gradient of an image.
struct MaxGrad<'a> {
    image: Image<'a>,
    window: Window,
    /// Windows of a row.
    columns: usize,
    gy: &'a [f32],
    gx: &'a mut [f32],
}

impl WithSimd for MaxGrad<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { image, window, columns, gy, gx } = self;
        let [h, w, c] = image.shape;
        assert!(image.x.len() == h * w * c && gx.len() == h * w * c, "{} values", gx.len());
        assert!(image.constants.period() >= c, "constants of {c} channels");
        let zero = simd.splat_f32s(0.0);
        for (i, gy) in gy.chunks_exact(c).enumerate() {
            let pixels = [window.pixels(i / columns, h), window.pixels(i % columns, w)];
            let [rows, of_row] = pixels.clone();
            for_lanes!(
                c,
                S,
                |at| {
                    // SAFETY: the window's pixels end with the image's, the vector with the channels.
                    unsafe {
                        let [_, largest] = image.largest_lanes(simd, &pixels, at);
                        let gy = load::<S>(gy, at);
                        let mut number = 0.0;
                        for row in rows.clone() {
                            for column in of_row.clone() {
                                let place = (row * w + column) * c + at;
                                let is_largest = simd.equal_f32s(largest, simd.splat_f32s(number));
                                let added = simd.select_f32s(is_largest, gy, zero);
                                let sum = simd.add_f32s(load::<S>(gx, place), added);
                                store::<S>(gx, place, sum);
                                number += 1.0;
                            }
                        }
                    }
                },
                |channel| {
                    let [_, largest] = image.largest(&pixels, channel);
                    let (row, column) = (largest as usize / of_row.len(), largest as usize % of_row.len());
                    gx[((rows.start + row) * w + of_row.start + column) * c + channel] += gy[channel];
                }
            );
        }
    }
}

/// Writes each pixel of `x`, `(n, h, w, c)`, to a square of `factor` by `factor` pixels of `y`.
pub(crate) fn upsample(x: Seen, factor: usize, [n, h, w, c]: [usize; 4], y: &mut [f32]) {
    assert!(x.x.len() == n * h * w * c && y.len() == x.x.len() * factor * factor, "{} values", y.len());
    let constants = Repeated::new(x.constants, c);
    let of_row = w * factor * c;
    y.par_chunks_mut(factor * of_row).zip(x.x.par_chunks(w * c)).each(&|(y, x)| {
        let (first, rest) = y.split_at_mut(of_row);
        dispatch(WidenRow { x, constants: &constants, factor, c, y: first });
        rest.chunks_exact_mut(of_row).for_each(|row| row.copy_from_slice(first));
    });
}

/// Writes each pixel of a row `factor` times.
struct WidenRow<'a> {
    x: &'a [f32],
    constants: &'a Repeated,
    factor: usize,
    c: usize,
    y: &'a mut [f32],
}

impl WithSimd for WidenRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, constants, factor, c, y } = self;
        assert!(y.len() == x.len() * factor && constants.period() >= c, "{} values", y.len());
        for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(factor * c)) {
            for_lanes!(
                c,
                S,
                |at| {
                    // SAFETY: the vector is in the pixel and the constants.
                    unsafe {
                        let value = see_lanes(simd, load::<S>(x, at), constants, at);
                        for copy in 0..factor {
                            store::<S>(y, copy * c + at, value);
                        }
                    }
                },
                |i| {
                    for copy in 0..factor {
                        y[copy * c + i] = see(x[i], constants, i);
                    }
                }
            );
        }
    }
}

/// Writes the gradient of upsampling's input, `(n, h, w, c)`, plus `other`, to `gx`.
pub(crate) fn upsample_backward(
    gy: &[f32],
    factor: usize,
    [n, h, w, c]: [usize; 4],
    other: Option<&[f32]>,
    gx: &mut [f32],
) {
    assert!(gx.len() == n * h * w * c && gy.len() == gx.len() * factor * factor, "{} values", gy.len());
    assert!(other.is_none_or(|other| other.len() == gx.len()), "{} values", gx.len());
    gx.par_chunks_mut(w * c).enumerate().each(&|(row, gx)| {
        let of_row = w * c;
        match other {
            Some(other) => gx.copy_from_slice(&other[row * of_row..][..of_row]),
            None => gx.fill(0.0),
        }
        let squares = &gy[row * of_row * factor * factor..][..of_row * factor * factor];
        dispatch(AddSquares { gy: squares, factor, c, gx });
    });
}

/// Adds the squares of `factor` rows to their pixels.
struct AddSquares<'a> {
    gy: &'a [f32],
    factor: usize,
    c: usize,
    gx: &'a mut [f32],
}

impl WithSimd for AddSquares<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { gy, factor, c, gx } = self;
        let of_row = factor * gx.len();
        assert_eq!(gy.len(), factor * of_row);
        for (pixel, gx) in gx.chunks_exact_mut(c).enumerate() {
            for row in 0..factor {
                let gy = &gy[row * of_row + pixel * factor * c..][..factor * c];
                for_lanes!(
                    c,
                    S,
                    |at| {
                        // SAFETY: the vectors are in the pixels.
                        unsafe {
                            let mut sum = load::<S>(gx, at);
                            for copy in 0..factor {
                                sum = simd.add_f32s(sum, load::<S>(gy, copy * c + at));
                            }
                            store::<S>(gx, at, sum);
                        }
                    },
                    |i| {
                        for copy in 0..factor {
                            gx[i] += gy[copy * c + i];
                        }
                    }
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_stays_nan_and_a_window_of_the_least_values_has_a_result() -> Result<()> {
        let (window, shape) = (Window { size: 2, stride: 2, padding: 0 }, [1, 2, 4, 20]);
        let mut x = vec![f32::NEG_INFINITY; 2 * 4 * 20];
        x[5] = f32::NAN;
        let mut y = vec![0.0; 40];
        max_pool(Seen { x: &x, constants: None }, window, shape, &mut y)?;
        for (i, y) in y.iter().enumerate() {
            assert!(if i == 5 { y.is_nan() } else { *y == f32::NEG_INFINITY }, "{i}: {y}");
        }
        Ok(())
    }

    #[test]
    fn windows_that_do_not_fit_are_an_error() {
        for ([size, stride, padding], [h, w]) in
            [([2, 0, 0], [4, 4]), ([0, 1, 0], [4, 4]), ([3, 1, 2], [4, 4]), ([5, 1, 0], [9, 4]), ([3, 1, 1], [9, 0])]
        {
            let window = Window { size, stride, padding };
            let error = window.output_shape([1, h, w, 8]).expect_err("an error").to_string();
            assert!(error.contains(&format!("{h}x{w} pixels by windows of size {size}")), "{error}");
        }
        for (size, padding) in [(usize::MAX, usize::MAX / 2), (2, usize::MAX)] {
            assert!(Window { size, stride: 1, padding }.output_shape([1, 4, 4, 1]).is_err());
        }
    }
}
