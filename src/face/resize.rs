//! Photos at another size.

use image::RgbImage;
use rayon::prelude::*;

use crate::parallel::Each;

/// Returns the photo at another size, `[width, height]`, by bilinear sampling, whose grid has its points in the middle of
/// the pixels as OpenCV's has. A photo more than twice as large is first made half as large by means of squares, so that
/// no pixel is passed over.
pub(super) fn resize(photo: &RgbImage, [width, height]: [usize; 2]) -> RgbImage {
    let mut halved = None;
    loop {
        let from = halved.as_ref().unwrap_or(photo);
        if (from.width() as usize) <= 2 * width || (from.height() as usize) <= 2 * height {
            return sampled(from, [width, height]);
        }
        halved = Some(half(from));
    }
}

/// Means of squares of two by two pixels.
fn half(photo: &RgbImage) -> RgbImage {
    let (width, height) = (photo.width() as usize / 2, photo.height() as usize / 2);
    let row_len = 3 * photo.width() as usize;
    let mut values = vec![0; 3 * width * height];
    values.par_chunks_mut(3 * width.max(1)).enumerate().each(&|(y, out)| {
        let rows = &photo.as_raw()[2 * y * row_len..];
        let (above, below) = (&rows[..row_len], &rows[row_len..2 * row_len]);
        for (x, pixel) in out.chunks_exact_mut(3).enumerate() {
            for (c, value) in pixel.iter_mut().enumerate() {
                let at = |row: &[u8], i: usize| u16::from(row[6 * x + 3 * i + c]);
                *value = ((at(above, 0) + at(above, 1) + at(below, 0) + at(below, 1) + 2) / 4) as u8;
            }
        }
    });
    RgbImage::from_raw(width as u32, height as u32, values).expect("three values a pixel")
}

fn sampled(photo: &RgbImage, [width, height]: [usize; 2]) -> RgbImage {
    let columns = places(photo.width(), width);
    let rows = places(photo.height(), height);
    let row_len = 3 * photo.width() as usize;
    let mut values = vec![0; 3 * width * height];
    values.par_chunks_mut(3 * width).enumerate().each(&|(y, out)| {
        let (above, below, v) = rows[y];
        let row = |y: u32| &photo.as_raw()[y as usize * row_len..][..row_len];
        // The row between two, then the pixels between two of it.
        let (above, below) = (row(above), row(below));
        let between: Vec<f32> =
            above.iter().zip(below).map(|(&a, &b)| f32::from(a) * (1.0 - v) + f32::from(b) * v).collect();
        for (pixel, &(left, right, u)) in out.chunks_exact_mut(3).zip(&columns) {
            let at = |x: u32| &between[3 * x as usize..][..3];
            for (value, (a, b)) in pixel.iter_mut().zip(at(left).iter().zip(at(right))) {
                // The sum is positive: half more, cut off, rounds.
                *value = (a * (1.0 - u) + b * u + 0.5) as u8;
            }
        }
    });
    RgbImage::from_raw(width as u32, height as u32, values).expect("three values a pixel")
}

/// For each of `to` pixels the two of `from` that it lies between, and its share of the second.
fn places(from: u32, to: usize) -> Vec<(u32, u32, f32)> {
    let step = from as f32 / to as f32;
    let place = |i: usize| {
        let at = ((i as f32 + 0.5) * step - 0.5).clamp(0.0, (from - 1) as f32);
        let first = at as u32;
        (first, (first + 1).min(from - 1), at - first as f32)
    };
    (0..to).map(place).collect()
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    /// A slope along both sides.
    fn slope(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([(2 * x) as u8, (3 * y) as u8, 7]))
    }

    #[test]
    fn slopes_stay_slopes() {
        for [width, height] in [[50, 40], [25, 20], [12, 10], [100, 80]] {
            let found = resize(&slope(50, 40), [width, height]);
            let step = 50.0 / width as f32;
            for (x, y, pixel) in found.enumerate_pixels() {
                let at = |i: u32, last: f32| ((i as f32 + 0.5) * step - 0.5).clamp(0.0, last);
                let expected = [2.0 * at(x, 49.0), 3.0 * at(y, 39.0), 7.0];
                for c in 0..3 {
                    // The last columns and rows of a photo with an odd half are left out.
                    assert!((f32::from(pixel[c]) - expected[c]).abs() <= 5.0, "{width}x{height} {x},{y}: {pixel:?}");
                }
            }
        }
    }

    #[test]
    fn the_same_size_is_the_same_photo_and_a_line_stays_one() {
        let photo = slope(31, 17);
        assert_eq!(resize(&photo, [31, 17]), photo);
        assert_eq!(resize(&slope(50_000, 1), [640, 1]).dimensions(), (640, 1));
        assert_eq!(resize(&slope(1, 1), [64, 64]).get_pixel(63, 63), &Rgb([0, 0, 7]));
    }
}
