//! Bilinear sampling of images.

use image::{Rgb, RgbImage};

/// Returns the colour of `image` at `(x, y)`, interpolated between four pixels; black outside.
pub(super) fn bilinear(image: &RgbImage, x: f32, y: f32) -> Rgb<u8> {
    let (left, top) = (x.floor(), y.floor());
    let (fx, fy) = (x - left, y - top);
    // The casts saturate: a point may lie far outside.
    let at = |start: f32, offset: i64| u32::try_from((start as i64).saturating_add(offset));
    let mut sum = [0f32; 3];
    let corners = [(0, 0, (1.0 - fx) * (1.0 - fy)), (1, 0, fx * (1.0 - fy)), (0, 1, (1.0 - fx) * fy), (1, 1, fx * fy)];
    for (dx, dy, weight) in corners {
        let (Ok(column), Ok(row)) = (at(left, dx), at(top, dy)) else { continue };
        if let Some(pixel) = image.get_pixel_checked(column, row) {
            sum.iter_mut().zip(pixel.0).for_each(|(sum, v)| *sum += weight * f32::from(v));
        }
    }
    Rgb(sum.map(|v| v.round() as u8))
}
