//! Perspective warp of a template, as OpenCV's `warpPerspective` with bilinear interpolation and constant border 0
//! does.

use image::RgbaImage;

use super::homography::Homography;
use crate::error::{Error, Result};

/// Positions are rounded to this part of a pixel, as OpenCV 4 does (`INTER_TAB_SIZE`).
const STEPS_PER_PIXEL: f64 = 32.0;

/// A warped template: the rows and columns of the destination that it can reach, and their values.
#[derive(Clone, Debug, PartialEq)]
pub struct Warped {
    /// The first column and row of the destination that is covered, in pixels.
    pub origin: [u32; 2],
    /// Columns and rows covered, in pixels.
    pub size: [u32; 2],
    /// Red, green, blue, alpha of every covered pixel, row by row, in `[0, 255]`, not rounded.
    pub pixels: Vec<[f32; 4]>,
}

impl Warped {
    /// The value at column `x` and row `y` of the destination: 0 outside the covered part.
    pub fn get(&self, x: u32, y: u32) -> [f32; 4] {
        let (column, row) = (x.wrapping_sub(self.origin[0]), y.wrapping_sub(self.origin[1]));
        if column >= self.size[0] || row >= self.size[1] {
            return [0.0; 4];
        }
        self.pixels[row as usize * self.size[0] as usize + column as usize]
    }
}

/// The template moved by `map` (template to destination) onto a destination of `size = [width, height]` pixels.
///
/// The value at `(x, y)` is the template's at `map^-1 (x, y)`, whose coordinates are rounded to 1/32 pixel,
/// interpolated between four neighbours; pixels outside the template count as `[0, 0, 0, 0]`. OpenCV 4.8's result on
/// 8-bit images is this, rounded (within 1 of 255).
///
/// # Errors
/// When `map` cannot be inverted.
pub fn warp_perspective(template: &RgbaImage, map: &Homography, size: [u32; 2]) -> Result<Warped> {
    let back = map.invert()?.0;
    let [first, last] = reach(template, map, size);
    let mut pixels = Vec::with_capacity((last[0] - first[0]) as usize * (last[1] - first[1]) as usize);
    for y in first[1]..last[1] {
        for x in first[0]..last[0] {
            let (x, y) = (f64::from(x), f64::from(y));
            let w = STEPS_PER_PIXEL / (back[2][0] * x + back[2][1] * y + back[2][2]);
            let u = (back[0][0] * x + back[0][1] * y + back[0][2]) * w;
            let v = (back[1][0] * x + back[1][1] * y + back[1][2]) * w;
            pixels.push(bilinear(template, u.round_ties_even(), v.round_ties_even()));
        }
    }
    Ok(Warped { origin: first, size: [last[0] - first[0], last[1] - first[1]], pixels })
}

/// Fits the map that takes `source` to `destination`, naming the landmarks when it fails.
pub(super) fn fit(source: &[[f64; 2]], destination: &[[f64; 2]]) -> Result<Homography> {
    Homography::fit(source, destination).map_err(|error| match error {
        Error::Config(what) => super::frame::bad_landmarks(what),
        other => other,
    })
}

/// First and one past the last `[column, row]` of the destination that the template can reach.
fn reach(template: &RgbaImage, map: &Homography, size: [u32; 2]) -> [[u32; 2]; 2] {
    let (width, height) = (f64::from(template.width()), f64::from(template.height()));
    let corners = [[-1.0, -1.0], [width, -1.0], [-1.0, height], [width, height]];
    // A template that crosses the horizon reaches the destination anywhere.
    if corners.iter().any(|&p| map.weight(p) < 1e-6) {
        return [[0, 0], size];
    }
    let corners = corners.map(|p| map.apply(p));
    let mut range = [[0, 0], size];
    for axis in 0..2 {
        let least = corners.iter().fold(f64::INFINITY, |m, p| m.min(p[axis]));
        let most = corners.iter().fold(f64::NEG_INFINITY, |m, p| m.max(p[axis]));
        // The cast saturates; one pixel is added because positions are rounded.
        range[0][axis] = ((least - 1.0).max(0.0) as u32).min(size[axis]);
        range[1][axis] = ((most + 2.0).max(0.0) as u32).clamp(range[0][axis], size[axis]);
    }
    range
}

/// The template at `(u, v)`, in steps of 1/32 pixel.
fn bilinear(template: &RgbaImage, u: f64, v: f64) -> [f32; 4] {
    let (width, height) = (f64::from(template.width()), f64::from(template.height()));
    let (left, top) = ((u / STEPS_PER_PIXEL).floor(), (v / STEPS_PER_PIXEL).floor());
    // Written so that NaN is outside.
    if !(left >= -1.0 && left < width && top >= -1.0 && top < height) {
        return [0.0; 4];
    }
    let (fx, fy) = ((u / STEPS_PER_PIXEL - left) as f32, (v / STEPS_PER_PIXEL - top) as f32);
    let (left, top) = (left as i64, top as i64);
    let mut y = [0.0; 4];
    for (dx, dy, weight) in
        [(0, 0, (1.0 - fx) * (1.0 - fy)), (1, 0, fx * (1.0 - fy)), (0, 1, (1.0 - fx) * fy), (1, 1, fx * fy)]
    {
        let (Ok(column), Ok(row)) = (u32::try_from(left + dx), u32::try_from(top + dy)) else { continue };
        if let Some(pixel) = template.get_pixel_checked(column, row) {
            for (sum, &value) in y.iter_mut().zip(&pixel.0) {
                *sum += weight * f32::from(value);
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_by_half_a_pixel_averages_and_the_border_is_zero() {
        let template = RgbaImage::from_fn(4, 2, |x, _| image::Rgba([x as u8 * 40, 0, 0, 255]));
        let map = Homography([[1.0, 0.0, 2.5], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]);
        let y = warp_perspective(&template, &map, [9, 5]).unwrap();
        assert_eq!(y.get(4, 1), [60.0, 0.0, 0.0, 255.0]);
        assert_eq!(y.get(2, 1), [0.0, 0.0, 0.0, 127.5]);
        assert_eq!(y.get(6, 2), [60.0, 0.0, 0.0, 127.5]);
        for (x, row) in [(0, 1), (7, 1), (4, 0), (4, 3), (100, 100)] {
            assert_eq!(y.get(x, row), [0.0; 4]);
        }
    }
}
