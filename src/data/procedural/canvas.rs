//! The picture while it is painted: for each pixel, its point of the face, reflectance, height and coverage.

use super::camera::Camera;
use super::shape::{Rgb, mix};

/// Side of the picture.
pub(super) const SIDE: usize = 112;

/// One pixel.
#[derive(Clone, Copy, Default)]
pub(super) struct Pixel {
    /// The point of the face that is seen here.
    pub(super) u: f32,
    pub(super) v: f32,
    /// Signed distance to the outline of the head, px, negative inside.
    pub(super) rim: f32,
    /// Height of the surface, px; shading depends on its slope.
    pub(super) height: f32,
    /// Linear reflectance.
    pub(super) albedo: Rgb,
    /// Strength of the highlight.
    pub(super) gloss: f32,
    /// Factor on the light that reaches a crease.
    pub(super) open: f32,
    /// Share of the pixel that is figure rather than background.
    pub(super) figure: f32,
    /// Share of the pixel that is skin, which scatters red light.
    pub(super) skin: f32,
}

impl Pixel {
    /// Lays `color` over the pixel with coverage `alpha`.
    #[inline]
    pub(super) fn lay(&mut self, color: Rgb, alpha: f32) {
        self.albedo = mix(self.albedo, color, alpha);
    }

    /// Darkens a crease by the share `depth`.
    #[inline]
    pub(super) fn crease(&mut self, depth: f32) {
        self.open *= 1.0 - depth;
    }
}

/// The picture and the camera that looks at it.
pub(super) struct Canvas<'a> {
    pub(super) pixels: Vec<Pixel>,
    camera: &'a Camera<'a>,
}

impl<'a> Canvas<'a> {
    /// Returns an empty picture with the point of the face of each pixel.
    pub(super) fn new(camera: &'a Camera<'a>) -> Self {
        let mut pixels = vec![Pixel { open: 1.0, ..Pixel::default() }; SIDE * SIDE];
        for (y, row) in pixels.chunks_exact_mut(SIDE).enumerate() {
            for (x, pixel) in row.iter_mut().enumerate() {
                [pixel.u, pixel.v] = camera.unproject(x as f32, y as f32);
            }
        }
        Self { pixels, camera }
    }

    /// Calls `paint` on every pixel of the picture.
    #[inline]
    pub(super) fn everywhere(&mut self, paint: impl FnMut(&mut Pixel)) {
        self.pixels.iter_mut().for_each(paint);
    }

    /// Calls `paint` on every pixel within `reach` of the point `(u, v)`, and on some around it.
    #[inline]
    pub(super) fn around(&mut self, [u, v]: [f32; 2], reach: [f32; 2], mut paint: impl FnMut(&mut Pixel)) {
        let [x0, y0, x1, y1] = self.camera.bounds([u - reach[0], u + reach[0]], [v - reach[1], v + reach[1]]);
        let (cols, rows) = (span(x0, x1), span(y0, y1));
        for row in self.pixels.chunks_exact_mut(SIDE).take(rows.end).skip(rows.start) {
            row[cols.clone()].iter_mut().for_each(&mut paint);
        }
    }
}

/// Range of the pixels from `low` to `high` that are in the picture.
#[inline]
fn span(low: f32, high: f32) -> std::ops::Range<usize> {
    // The cast saturates: left of the picture is 0.
    let start = (low as usize).min(SIDE);
    start..(high as usize + 2).clamp(start, SIDE)
}
