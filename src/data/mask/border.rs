//! The black border of a crop that reaches beyond its photo.

use image::{Rgb, RgbImage};

/// Largest value of a channel in a border, with some noise of compression.
const BLACK: u8 = 8;
/// Least share of an image's pixels that counts as a border: less may be dark hair or a dark background.
const MIN_SHARE: f32 = 0.02;

/// Which pixels lie outside the photo: those in black runs from the image's edges inwards, along their row and along
/// their column. A photo is convex, so both hold outside of it, but seldom in a dark background within it.
#[derive(Debug)]
pub(super) struct Border {
    /// For each row, the columns of the photo; for each column, its rows.
    of_row: Vec<[u32; 2]>,
    of_column: Vec<[u32; 2]>,
}

impl Border {
    /// Finds the border of an image, if it has one.
    pub fn find(image: &RgbImage) -> Option<Self> {
        let (width, height) = image.dimensions();
        let is_black = |x: u32, y: u32| {
            let Rgb(pixel) = *image.get_pixel(x, y);
            pixel.iter().all(|value| *value <= BLACK)
        };
        if width == 0 || height == 0 {
            return None;
        }
        let min = MIN_SHARE * width as f32 * height as f32;
        let of_row: Vec<_> = (0..height).map(|y| inside(width, |x| is_black(x, y))).collect();
        // Fewer are both in a row's and in a column's run.
        let num_in_rows: u32 = of_row.iter().map(|[first, end]| width - (end - first)).sum();
        if (num_in_rows as f32) < min {
            return None;
        }
        let of_column: Vec<_> = (0..width).map(|x| inside(height, |y| is_black(x, y))).collect();
        let border = Self { of_row, of_column };
        let num = (0..height).flat_map(|y| (0..width).map(move |x| [x, y])).filter(|at| border.has(*at)).count();
        (num as f32 >= min).then_some(border)
    }

    /// Whether a pixel lies outside the photo.
    pub fn has(&self, [x, y]: [u32; 2]) -> bool {
        let is_outside = |[first, end]: [u32; 2], at: u32| at < first || at >= end;
        is_outside(self.of_row[y as usize], x) && is_outside(self.of_column[x as usize], y)
    }
}

/// Returns the first pixel of a line that is not black, and the one after the last; an empty range if all are.
fn inside(len: u32, is_black: impl Fn(u32) -> bool) -> [u32; 2] {
    let first = (0..len).find(|i| !is_black(*i)).unwrap_or(len);
    let end = (first..len).rev().find(|i| !is_black(*i)).map_or(first, |i| i + 1);
    [first, end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tilted_photo_on_black_has_a_border_and_a_dark_photo_has_none() {
        let is_inside = |x: u32, y: u32| {
            let (x, y) = (x as f32 - 56.0, y as f32 - 56.0);
            (0.95 * x + 0.3 * y).abs() < 35.0 && (0.95 * y - 0.3 * x).abs() < 50.0
        };
        let tilted = RgbImage::from_fn(112, 112, |x, y| Rgb(if is_inside(x, y) { [120, 90, 4] } else { [3, 0, 5] }));
        let border = Border::find(&tilted).unwrap();
        assert!((0..112).all(|y| (0..112).all(|x| border.has([x, y]) != is_inside(x, y))));
        let hair = RgbImage::from_fn(112, 112, |x, y| if y < 2 && x > 30 { Rgb([0; 3]) } else { Rgb([60, 50, 40]) });
        assert!(Border::find(&hair).is_none());
        let dark = RgbImage::from_fn(112, 112, |x, y| Rgb([9 + (x % 5) as u8, (y % 4) as u8, 0]));
        assert!(Border::find(&dark).is_none());
        assert!(Border::find(&RgbImage::new(0, 0)).is_none());
    }
}
