//! Perspective warp of a template, as in OpenCV's `warpPerspective` with bilinear interpolation and constant border 0.

use image::RgbaImage;

use super::homography::Homography;
use crate::error::{Error, Result};

/// Steps per pixel to which positions are rounded, as in OpenCV 4 (`INTER_TAB_SIZE`).
const STEPS: i32 = 32;
const STEPS_PER_PIXEL: f64 = STEPS as f64;
/// Positions this far from the origin, in those steps, are outside every template that fits in memory.
const FAR: f64 = 2e9;

/// A warped template: the rectangle of the destination that it can reach, and its values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Warped {
    /// The first column and row of the destination that is covered, in pixels.
    pub origin: [u32; 2],
    /// Columns and rows covered, in pixels.
    pub size: [u32; 2],
    /// Red, green, blue, alpha of every covered pixel, row by row, in `[0, 255]`, not rounded.
    pub pixels: Vec<[f32; 4]>,
}

impl Warped {
    /// Returns the value at column `x` and row `y` of the destination; 0 outside the covered part.
    pub fn get(&self, x: u32, y: u32) -> [f32; 4] {
        let (column, row) = (x.wrapping_sub(self.origin[0]), y.wrapping_sub(self.origin[1]));
        if column >= self.size[0] || row >= self.size[1] {
            return [0.0; 4];
        }
        self.pixels[row as usize * self.size[0] as usize + column as usize]
    }
}

/// Warps the template by `map` (template to destination) onto a destination of `size = [width, height]` pixels.
///
/// The value at `(x, y)` is the template's at `map^-1 (x, y)`, rounded to 1/32 pixel and interpolated between four
/// neighbours; pixels outside the template count as `[0, 0, 0, 0]`. On 8-bit images OpenCV 4.8 returns this value
/// rounded (within 1 of 255).
///
/// # Errors
/// When `map` cannot be inverted.
pub fn warp_perspective(template: &RgbaImage, map: &Homography, size: [u32; 2]) -> Result<Warped> {
    let mut warped = Warped::default();
    warped.fill(template, map, size)?;
    Ok(warped)
}

impl Warped {
    /// Sets this to the result of [`warp_perspective`], reusing its memory.
    pub(super) fn fill(&mut self, template: &RgbaImage, map: &Homography, size: [u32; 2]) -> Result<()> {
        let back = map.invert()?.0;
        let [first, last] = reach(template, map, size);
        self.origin = first;
        self.size = [last[0] - first[0], last[1] - first[1]];
        self.pixels.resize(self.size[0] as usize * self.size[1] as usize, [0.0; 4]);
        crate::vectors::arch().dispatch(Warp { template: Template::new(template), back, warped: self });
        Ok(())
    }
}

/// Per-pixel work of [`warp_perspective`]. It uses the machine's widest vector instructions; the result is the same
/// with any of them.
struct Warp<'a> {
    template: Template<'a>,
    back: [[f64; 3]; 3],
    warped: &'a mut Warped,
}

/// Pixels whose positions are computed together.
const LANES: usize = 64;

impl pulp::NullaryFnOnce for Warp<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { template, back, warped: Warped { origin, size, pixels } } = self;
        let rows = pixels.chunks_exact_mut((size[0] as usize).max(1));
        for (row, y) in rows.zip(origin[1]..) {
            let y = f64::from(y);
            let down = [back[0][1] * y, back[1][1] * y, back[2][1] * y];
            for (run, first) in row.chunks_mut(LANES).zip((origin[0]..).step_by(LANES)) {
                let (mut u, mut v) = ([0i32; LANES], [0i32; LANES]);
                // A separate loop without branches, so that vector instructions handle several pixels at once.
                for i in 0..LANES {
                    let x = f64::from(first as i32 + i as i32);
                    let w = STEPS_PER_PIXEL / (back[2][0] * x + down[2] + back[2][2]);
                    u[i] = nearest((back[0][0] * x + down[0] + back[0][2]) * w);
                    v[i] = nearest((back[1][0] * x + down[1] + back[1][2]) * w);
                }
                // Another loop, so that many reads wait for memory at once: a template is larger than the inner caches.
                let mut squares = [[[0u8; 4]; 4]; LANES];
                for i in 0..run.len() {
                    squares[i] = template.square(u[i].div_euclid(STEPS), v[i].div_euclid(STEPS));
                }
                for i in 0..run.len() {
                    run[i] = bilinear(&squares[i], u[i].rem_euclid(STEPS), v[i].rem_euclid(STEPS));
                }
            }
        }
    }
}

/// Returns the value between four pixels, `fx` right of and `fy` below the first, in steps of 1/32 pixel.
#[inline(always)]
fn bilinear(square: &[[u8; 4]; 4], fx: i32, fy: i32) -> [f32; 4] {
    let weights = [(STEPS - fx) * (STEPS - fy), fx * (STEPS - fy), (STEPS - fx) * fy, fx * fy];
    let mut sums = [0; 4];
    for corner in 0..4 {
        for channel in 0..4 {
            sums[channel] += weights[corner] * i32::from(square[corner][channel]);
        }
    }
    let mut y = [0.0; 4];
    for channel in 0..4 {
        // Exact: a sum below 2^18 over a power of two.
        y[channel] = sums[channel] as f32 * (1.0 / (STEPS * STEPS) as f32);
    }
    y
}

/// Rounds to the nearest integer, ties to even. Distant values and NaN end up far outside. Without SSE 4.1
/// `round_ties_even` is a slow call; this is not.
#[inline(always)]
fn nearest(x: f64) -> i32 {
    // 1.5 * 2^52: the sum has no bits below one.
    const WHOLE: f64 = 6_755_399_441_055_744.0;
    // NaN fails the comparison and becomes a position far outside.
    let x = if x.abs() < FAR { x } else { -FAR };
    ((x + WHOLE) - WHOLE) as i32
}

/// Returns `x` truncated to an integer, modulo 256, for `x` within 2^22 of 0. A cast to an integer has no vector
/// instruction, because it saturates.
#[inline(always)]
pub(super) fn low_byte(x: f32) -> u8 {
    // 1.5 * 2^23: the sum has no bits below one, and those of `x` are its lowest ones.
    const WHOLE: f32 = 12_582_912.0;
    let size = x.abs();
    let nearest = (size + WHOLE) - WHOLE;
    let below = if nearest > size { nearest - 1.0 } else { nearest };
    (below.copysign(x) + WHOLE).to_bits() as u8
}

/// Fits the map that takes `source` to `destination`; its errors name the landmarks.
pub(super) fn fit(source: &[[f64; 2]], destination: &[[f64; 2]]) -> Result<Homography> {
    Homography::fit(source, destination).map_err(|error| match error {
        Error::Config(what) => super::frame::bad_landmarks(what),
        other => other,
    })
}

/// Returns the first and one past the last `[column, row]` of the destination that the template can reach.
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

/// A template with its pixels as one slice.
struct Template<'a> {
    pixels: &'a [[u8; 4]],
    width: i32,
    height: i32,
}

impl<'a> Template<'a> {
    fn new(image: &'a RgbaImage) -> Self {
        let (pixels, _) = image.as_raw().as_chunks();
        // Larger templates would not fit in memory.
        let side = |side: u32| i32::try_from(side).unwrap_or(i32::MAX);
        Self { pixels, width: side(image.width()), height: side(image.height()) }
    }

    /// Returns the pixels at column `left` and the next, of row `top` and the next; zeros outside.
    #[inline(always)]
    fn square(&self, left: i32, top: i32) -> [[u8; 4]; 4] {
        // One comparison checks both ends: as unsigned, a negative number is large.
        if (left as u32) < (self.width - 1) as u32 && (top as u32) < (self.height - 1) as u32 {
            let at = top as usize * self.width as usize + left as usize;
            let (upper, lower) = (&self.pixels[at..at + 2], &self.pixels[at + self.width as usize..][..2]);
            return [upper[0], upper[1], lower[0], lower[1]];
        }
        if left < -1 || left >= self.width || top < -1 || top >= self.height {
            return [[0; 4]; 4];
        }
        let (upper, lower) = (self.neighbours(left, top), self.neighbours(left, top + 1));
        [upper[0], upper[1], lower[0], lower[1]]
    }

    /// Returns the pixels at column `left` and the next of row `y`; zeros outside.
    #[cold]
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

    #[test]
    fn the_low_byte_is_that_of_the_truncated_number() {
        for i in -300_000..300_000 {
            let x = i as f32 * 0.37;
            assert_eq!(low_byte(x), x as i32 as u8, "{x}");
        }
        assert_eq!((low_byte(-0.9), low_byte(254.999), low_byte(-1.0), low_byte(2.5)), (0, 254, 255, 2));
    }
}
