//! Perspective warp of a template, as OpenCV's `warpPerspective` with bilinear interpolation and constant border 0
//! does.

use image::RgbaImage;

use super::homography::Homography;
use crate::error::{Error, Result};

/// Positions are rounded to this part of a pixel, as OpenCV 4 does (`INTER_TAB_SIZE`).
const STEPS: i32 = 32;
const STEPS_PER_PIXEL: f64 = STEPS as f64;
/// Positions this far from the origin, in those steps, are outside every template that memory holds.
const FAR: f64 = 2e9;

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
    let template = Template::new(template);
    let pixels = pulp::Arch::new().dispatch(Warp { template, back, first, last });
    Ok(Warped { origin: first, size: [last[0] - first[0], last[1] - first[1]], pixels })
}

/// The work of [`warp_perspective`], with the machine's widest vector instructions; the result is the same with all.
struct Warp<'a> {
    template: Template<'a>,
    back: [[f64; 3]; 3],
    first: [u32; 2],
    last: [u32; 2],
}

impl pulp::NullaryFnOnce for Warp<'_> {
    type Output = Vec<[f32; 4]>;

    #[inline(always)]
    fn call(self) -> Self::Output {
        let Self { template, back, first, last } = self;
        let width = (last[0] - first[0]) as usize;
        let mut pixels = Vec::with_capacity(width * (last[1] - first[1]) as usize);
        let mut places = vec![[0i32; 2]; width];
        for y in first[1]..last[1] {
            let down = back.map(|row| row[1] * f64::from(y));
            // A loop of its own: it has no branches, so that several pixels go at once.
            for (place, x) in places.iter_mut().zip(first[0] as i32..) {
                let x = f64::from(x);
                let w = STEPS_PER_PIXEL / (back[2][0] * x + down[2] + back[2][2]);
                let u = (back[0][0] * x + down[0] + back[0][2]) * w;
                let v = (back[1][0] * x + down[1] + back[1][2]) * w;
                *place = [nearest(u), nearest(v)];
            }
            // No iterator: what the compiler does not inline here is compiled without the machine's vectors.
            for &[u, v] in &places {
                pixels.push(template.bilinear(u, v));
            }
        }
        pixels
    }
}

/// The next whole number, the even one of two; far ones and what is none are far outside. Where SSE 4.1 cannot be assumed
/// `round_ties_even` is a slow call; this is not.
#[inline(always)]
fn nearest(x: f64) -> i32 {
    // 1.5 * 2^52: the sum has no bits below one.
    const WHOLE: f64 = 6_755_399_441_055_744.0;
    // The cast saturates; NaN is 0, and was clamped to be outside.
    let x = if x.abs() < FAR { x } else { -FAR };
    ((x + WHOLE) - WHOLE) as i32
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

/// A template whose pixels lie one behind the other.
struct Template<'a> {
    pixels: &'a [[u8; 4]],
    width: i32,
    height: i32,
}

impl<'a> Template<'a> {
    fn new(image: &'a RgbaImage) -> Self {
        let (pixels, _) = image.as_raw().as_chunks();
        // Larger ones would not fit the memory.
        let side = |side: u32| i32::try_from(side).unwrap_or(i32::MAX);
        Self { pixels, width: side(image.width()), height: side(image.height()) }
    }

    /// The value at `(u, v)`, in steps of 1/32 pixel.
    #[inline(always)]
    fn bilinear(&self, u: i32, v: i32) -> [f32; 4] {
        let (left, top) = (u.div_euclid(STEPS), v.div_euclid(STEPS));
        if left < -1 || left >= self.width || top < -1 || top >= self.height {
            return [0.0; 4];
        }
        let share = |steps: i32| steps.rem_euclid(STEPS) as f32 / STEPS as f32;
        let (fx, fy) = (share(u), share(v));
        let weights = [(1.0 - fx) * (1.0 - fy), fx * (1.0 - fy), (1.0 - fx) * fy, fx * fy];
        let [[a, b], [c, d]] = [top, top + 1].map(|y| self.neighbours(left, y));
        let mut y = [0.0; 4];
        for (corner, weight) in [a, b, c, d].into_iter().zip(weights) {
            for (sum, value) in y.iter_mut().zip(corner) {
                *sum += weight * f32::from(value);
            }
        }
        y
    }

    /// The pixels at column `left` and the next of row `y`; zeros outside.
    #[inline(always)]
    fn neighbours(&self, left: i32, y: i32) -> [[u8; 4]; 2] {
        if y < 0 || y >= self.height {
            return [[0; 4]; 2];
        }
        let row = &self.pixels[y as usize * self.width as usize..][..self.width as usize];
        match usize::try_from(left) {
            Ok(left) => [row[left], row.get(left + 1).copied().unwrap_or_default()],
            Err(_) => [[0; 4], row[0]],
        }
    }
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
