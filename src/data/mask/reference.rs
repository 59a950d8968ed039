//! The published masking, reproduced: one RGBA template warped by a homography, with the published colour arithmetic.
//!
//! The published code reads the template's four channels as cyan, magenta, yellow and black, converts them to RGB by
//! `255 - (channel + alpha)`, and adds a random colour. Where the template is opaque that is `colour - channel`, which
//! is mostly negative. The blend `(alpha * mask + (255 - alpha) * image) / 255` is truncated toward zero and stored in
//! eight bits, modulo 256.
//!
//! Only two of these facts are documented: the template is read as CMYK, and negative values wrap. The formula was
//! derived from the fact that the colour (75, 20, 120) without shift gives a mean of about (98, 43, 143) on the mask.
//! This arithmetic gives (97.98, 42.98, 142.98) on the mask's opaque pixels. The inverted template (`255 - channel +
//! colour`) would give one less, and a product of `1 - channel / 255` and `1 - alpha / 255` would not be negative.
//!
//! The template is not part of this crate: its licence is CC BY-NC 4.0.

use std::cell::RefCell;
use std::path::Path;

use image::{RgbImage, RgbaImage};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::homography::Homography;
use super::warp::{Warped, fit, low_byte, warp_perspective};
use crate::data::decode::read_image_file;
use crate::data::{ALIGNED_LANDMARKS, Landmarks};
use crate::error::{Error, Result};

/// The five landmarks on the published 1627 x 1085 template, in pixels.
pub const TEMPLATE_LANDMARKS: Landmarks =
    [[557.0, 64.0], [1009.0, 64.0], [678.0, 464.0], [548.0, 614.0], [991.0, 664.0]];

/// The landmarks that the published code uses for every 112x112 crop: those of the 96-pixel-wide alignment template, so
/// that its masks sit 8 px left of [`crate::data::ALIGNED_LANDMARKS`].
pub const REFERENCE_LANDMARKS: Landmarks =
    [[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366], [33.5493, 92.3655], [62.7299, 92.2041]];

thread_local! {
    /// Warped template, reused because training warps it for every other image.
    static WARPED: RefCell<Warped> = RefCell::default();
}

/// Shift and colour of one use of the template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReferenceDraw {
    /// Added to the template's landmarks, in template pixels, x and y.
    pub shift: [i32; 2],
    /// Added to red, green and blue.
    pub colour: [u8; 3],
}

impl ReferenceDraw {
    /// Returns a draw for training: shift in `[-10, 9] x [-40, 39]`, colour in `[0, 149]^3`.
    pub fn training(rng: &mut ChaCha8Rng) -> Self {
        Self { shift: [rng.random_range(-10..10), rng.random_range(-40..40)], ..Self::evaluation(rng) }
    }

    /// Returns a draw for evaluation: no shift, colour in `[0, 149]^3`.
    pub fn evaluation(rng: &mut ChaCha8Rng) -> Self {
        Self { shift: [0, 0], colour: std::array::from_fn(|_| rng.random_range(0..150)) }
    }
}

/// A template with its landmarks.
#[derive(Clone, Debug)]
pub struct ReferenceMasker {
    /// The part of the template that is not transparent, with a border of one transparent pixel.
    template: RgbaImage,
    points: [[f64; 2]; 5],
}

impl ReferenceMasker {
    /// Reads a template from an RGBA image file, with `points` as in [`ReferenceMasker::new`].
    ///
    /// # Errors
    /// When the file cannot be read or decoded or has no alpha channel, and as [`ReferenceMasker::new`].
    pub fn open(path: &Path, points: &Landmarks) -> Result<Self> {
        let bytes = read_image_file(path)?;
        let image_error = |what: String| Error::Image { path: path.to_owned(), what };
        let decoded = image::load_from_memory(&bytes).map_err(|e| image_error(e.to_string()))?;
        if !decoded.color().has_alpha() {
            return Err(image_error(format!("expected a template with an alpha channel, found {:?}", decoded.color())));
        }
        Self::new(&decoded.into_rgba8(), points).map_err(|error| match error {
            Error::Config(what) => image_error(what),
            other => other,
        })
    }

    /// Returns a masker for a template with these five landmarks, in the template's pixels.
    ///
    /// # Errors
    /// When the template is transparent everywhere, or the points are not finite or lie on one line.
    pub fn new(template: &RgbaImage, points: &Landmarks) -> Result<Self> {
        if points.iter().flatten().any(|v| !v.is_finite()) {
            return Err(Error::Config(format!("template_points: must be finite, found {points:?}")));
        }
        let (mut first, mut last) = ([u32::MAX; 2], [0; 2]);
        for (x, y, pixel) in template.enumerate_pixels() {
            if pixel.0[3] > 0 {
                first = [first[0].min(x), first[1].min(y)];
                last = [last[0].max(x), last[1].max(y)];
            }
        }
        if first[0] > last[0] {
            return Err(Error::Config("the template is transparent everywhere".into()));
        }
        let first = first.map(|v| v.saturating_sub(1));
        let size = [
            last[0].saturating_add(2).min(template.width()) - first[0],
            last[1].saturating_add(2).min(template.height()) - first[1],
        ];
        let template = image::imageops::crop_imm(template, first[0], first[1], size[0], size[1]).to_image();
        let points = points.map(|p| [f64::from(p[0]) - f64::from(first[0]), f64::from(p[1]) - f64::from(first[1])]);
        // Any face shows whether these points determine a map.
        Homography::fit(&points, &ALIGNED_LANDMARKS.map(|p| p.map(f64::from)))?;
        Ok(Self { template, points })
    }

    /// Puts the template on `image`; the five landmarks, in pixels, are first truncated to integers.
    ///
    /// # Errors
    /// When the landmarks are not finite or lie on one line; the image is then unchanged.
    pub fn apply(&self, image: &mut RgbImage, landmarks: &Landmarks, draw: ReferenceDraw) -> Result<()> {
        let map = self.map(landmarks, draw.shift)?;
        WARPED.with_borrow_mut(|warped| {
            warped.fill(&self.template, &map, [image.width(), image.height()])?;
            crate::vectors::arch().dispatch(Blend { image, warped, colour: draw.colour.map(f32::from) });
            Ok(())
        })
    }

    /// Warps the template onto a destination of `size = [width, height]` pixels with these landmarks (truncated to
    /// integers); its own landmarks are moved by `shift` template pixels.
    ///
    /// # Errors
    /// When the landmarks are not finite or lie on one line.
    #[doc(hidden)]
    pub fn warp(&self, size: [u32; 2], landmarks: &Landmarks, shift: [i32; 2]) -> Result<Warped> {
        warp_perspective(&self.template, &self.map(landmarks, shift)?, size)
    }

    fn map(&self, landmarks: &Landmarks, shift: [i32; 2]) -> Result<Homography> {
        let source = self.points.map(|p| [p[0] + f64::from(shift[0]), p[1] + f64::from(shift[1])]);
        let destination = landmarks.map(|p| p.map(|v| f64::from(v.trunc())));
        fit(&source, &destination)
    }
}

/// The published colour arithmetic (see the module).
struct Blend<'a> {
    image: &'a mut RgbImage,
    warped: &'a Warped,
    colour: [f32; 3],
}

impl pulp::NullaryFnOnce for Blend<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { image, warped, colour } = self;
        let (width, height) = (warped.size[0] as usize, warped.size[1] as usize);
        let row_bytes = 3 * image.width() as usize;
        let start = warped.origin[1] as usize * row_bytes + 3 * warped.origin[0] as usize;
        let bytes: &mut [u8] = image;
        for y in 0..height {
            let (row, _) = bytes[start + y * row_bytes..][..3 * width].as_chunks_mut::<3>();
            let mask = &warped.pixels[y * width..][..width];
            for x in 0..width {
                let alpha = mask[x][3];
                for c in 0..3 {
                    let drawn = 255.0 - (mask[x][c] + alpha) + colour[c];
                    let blend = (alpha * drawn + (255.0 - alpha) * f32::from(row[x][c])) / 255.0;
                    // Modulo 256; where the template is transparent the pixel is unchanged.
                    row[x][c] = low_byte(blend);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use image::Rgba;
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn draws_stay_in_the_published_ranges_and_reach_their_ends() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let draws: Vec<_> = (0..4000).map(|_| ReferenceDraw::training(&mut rng)).collect();
        let range = |f: fn(&ReferenceDraw) -> i32| (draws.iter().map(f).min(), draws.iter().map(f).max());
        assert_eq!(range(|d| d.shift[0]), (Some(-10), Some(9)));
        assert_eq!(range(|d| d.shift[1]), (Some(-40), Some(39)));
        assert_eq!(range(|d| i32::from(d.colour[2])), (Some(0), Some(149)));
        assert_eq!(ReferenceDraw::evaluation(&mut rng).shift, [0, 0]);
    }

    #[test]
    fn an_opaque_pixel_becomes_the_colour_minus_the_template_modulo_256() {
        let template = RgbaImage::from_pixel(1627, 1085, Rgba([233, 140, 20, 255]));
        let masker = ReferenceMasker::new(&template, &TEMPLATE_LANDMARKS).unwrap();
        let mut image = RgbImage::from_pixel(112, 112, image::Rgb([9, 9, 9]));
        masker.apply(&mut image, &ALIGNED_LANDMARKS, ReferenceDraw { shift: [0, 0], colour: [75, 20, 120] }).unwrap();
        assert_eq!(image.get_pixel(56, 80).0, [98, 136, 100]);
    }

    #[test]
    fn a_transparent_template_and_points_on_one_spot_are_errors() {
        let error = ReferenceMasker::new(&RgbaImage::new(8, 8), &TEMPLATE_LANDMARKS).unwrap_err();
        assert!(error.to_string().contains("transparent"), "{error}");
        let opaque = RgbaImage::from_pixel(8, 8, Rgba([255; 4]));
        let error = ReferenceMasker::new(&opaque, &[[4.0; 2]; 5]).unwrap_err();
        assert!(error.to_string().contains("source points"), "{error}");
    }
}
