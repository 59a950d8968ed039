//! Augmentations that imitate capture conditions: misalignment, a tight frame, low resolution, lighting, blur, noise
//! and compression; and random cropping and erasing.

use std::ops::Range;

use image::codecs::jpeg::JpegEncoder;
use image::imageops::{self, FilterType};
use image::{ImageFormat, Rgb, RgbImage};
use rand::{Rng, RngCore};
use rand_chacha::ChaCha8Rng;

use super::AugmentConfig;
use super::bilinear::bilinear;
use crate::error::{Error, Result};

/// Largest rotation of a misaligned face, in radians.
const MAX_TURN_RAD: f32 = 0.12;
/// Largest relative change in size of a misaligned face.
const MAX_SCALING: f32 = 0.1;
/// Largest shift of a misaligned face, as a share of the side.
const MAX_SHIFT: f32 = 0.05;
/// Largest rotation of a frame relative to the face, in radians.
const MAX_FRAME_TURN_RAD: f32 = 0.35;
/// Largest shares of the side that a frame cuts off at left and right, top, bottom.
const FRAME: [f32; 3] = [0.3, 0.3, 0.15];
/// Share of the area that a random crop keeps, and its ratio of height to width.
const CROP_AREA: Range<f32> = 0.6..1.0;
const CROP_RATIO: Range<f32> = 0.75..1.333;
/// Share of the area that is erased, and its ratio of height to width.
const ERASED_AREA: Range<f32> = 0.02..0.2;
const ERASED_RATIO: Range<f32> = 0.333..3.0;
/// Standard deviation of a blur out of focus, and length of one by motion, as shares of the side.
const FOCUS_BLUR: Range<f32> = 0.004..0.014;
const MOTION_BLUR: Range<f32> = 0.02..0.07;
/// Standard deviation of noise, in grey levels.
const NOISE: Range<f32> = 2.0..12.0;
/// Quality of JPEG compression.
const JPEG_QUALITY: Range<u8> = 30..80;
/// Smallest side that a face is scaled down to, as a share of the original.
const MIN_RESOLUTION: f32 = 0.2;

/// Applies each augmentation to `image` with its probability in `config`.
///
/// # Errors
/// When the image cannot be compressed.
pub(super) fn apply(image: &mut RgbImage, config: &AugmentConfig, rng: &mut ChaCha8Rng) -> Result<()> {
    if rng.random_bool(config.misalign) {
        *image = misaligned(image, rng);
    }
    if rng.random_bool(config.frame) {
        frame(image, rng);
    }
    if rng.random_bool(config.low_resolution) {
        let (width, height) = image.dimensions();
        let share = rng.random_range(MIN_RESOLUTION..0.7);
        let scaled = |side: u32| ((side as f32 * share) as u32).max(1);
        let small = imageops::resize(image, scaled(width), scaled(height), FilterType::Triangle);
        *image = imageops::resize(&small, width, height, FilterType::CatmullRom);
    }
    if rng.random_bool(config.light) {
        light(image, rng);
    }
    if rng.random_bool(config.crop) {
        let [width, height] = part(image, CROP_AREA, CROP_RATIO, rng);
        let [x, y] = place(image, [width, height], rng);
        let part = imageops::crop_imm(image, x, y, width, height).to_image();
        *image = imageops::resize(&part, image.width(), image.height(), FilterType::Triangle);
    }
    if rng.random_bool(config.erase) {
        let size = part(image, ERASED_AREA, ERASED_RATIO, rng);
        let [left, top] = place(image, size, rng);
        for y in top..top + size[1] {
            for x in left..left + size[0] {
                image.put_pixel(x, y, Rgb(rng.random()));
            }
        }
    }
    // What a camera does, in its order.
    if rng.random_bool(config.blur) {
        *image = blurred(image, rng);
    }
    if rng.random_bool(config.noise) {
        add_noise(image, rng);
    }
    if rng.random_bool(config.jpeg) {
        *image = compressed(image, rng.random_range(JPEG_QUALITY))?;
    }
    Ok(())
}

/// Random width and height of a rectangle: its share of the area is uniform in `area`, its ratio of height to width
/// log-uniform in `ratio`.
fn part(image: &RgbImage, area: Range<f32>, ratio: Range<f32>, rng: &mut ChaCha8Rng) -> [u32; 2] {
    let (width, height) = image.dimensions();
    let area = rng.random_range(area) * width as f32 * height as f32;
    let ratio = rng.random_range(ratio.start.ln()..ratio.end.ln()).exp();
    let size = [(area / ratio).sqrt(), (area * ratio).sqrt()];
    [(size[0].round() as u32).clamp(1, width), (size[1].round() as u32).clamp(1, height)]
}

/// Random left and top of a rectangle of this size.
fn place(image: &RgbImage, size: [u32; 2], rng: &mut ChaCha8Rng) -> [u32; 2] {
    [rng.random_range(0..=image.width() - size[0]), rng.random_range(0..=image.height() - size[1])]
}

/// The image rotated, scaled and shifted a little, black outside the original.
fn misaligned(image: &RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
    let (width, height) = image.dimensions();
    let centre = [width as f32 / 2.0, height as f32 / 2.0];
    let (sin, cos) = rng.random_range(-MAX_TURN_RAD..MAX_TURN_RAD).sin_cos();
    let scale = 1.0 + rng.random_range(-MAX_SCALING..MAX_SCALING);
    let shift = [width, height].map(|side| side as f32 * rng.random_range(-MAX_SHIFT..MAX_SHIFT));
    RgbImage::from_fn(width, height, |x, y| {
        let (x, y) = ((x as f32 - centre[0] - shift[0]) / scale, (y as f32 - centre[1] - shift[1]) / scale);
        bilinear(image, cos * x + sin * y + centre[0], cos * y - sin * x + centre[1])
    })
}

/// Blackens everything outside a rectangle that is rotated relative to the face, as in tight crops that were aligned
/// afterwards.
fn frame(image: &mut RgbImage, rng: &mut ChaCha8Rng) {
    let (width, height) = (image.width() as f32, image.height() as f32);
    let (sin, cos) = rng.random_range(-MAX_FRAME_TURN_RAD..MAX_FRAME_TURN_RAD).sin_cos();
    let [side, top, bottom] = FRAME;
    let left = width * rng.random_range(-0.1..side);
    let right = width * (1.0 - rng.random_range(-0.1..side));
    let (top, bottom) = (height * rng.random_range(-0.1..top), height * (1.0 - rng.random_range(-0.1..bottom)));
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        let (x, y) = (x as f32 - width / 2.0, y as f32 - height / 2.0);
        let (u, v) = (cos * x + sin * y + width / 2.0, cos * y - sin * x + height / 2.0);
        if !(left..right).contains(&u) || !(top..bottom).contains(&v) {
            *pixel = Rgb([0; 3]);
        }
    }
}

/// Changes brightness, contrast and tint at random.
fn light(image: &mut RgbImage, rng: &mut ChaCha8Rng) {
    let contrast = rng.random_range(0.6..1.3);
    let brightness = rng.random_range(-50.0..50.0);
    let gain: [f32; 3] = std::array::from_fn(|_| contrast * rng.random_range(0.85..1.15));
    for pixel in image.pixels_mut() {
        for (value, gain) in pixel.0.iter_mut().zip(gain) {
            // The cast saturates.
            *value = ((f32::from(*value) - 127.5) * gain + 127.5 + brightness).round() as u8;
        }
    }
}

/// The image out of focus, or blurred by motion along a line.
fn blurred(image: &RgbImage, rng: &mut ChaCha8Rng) -> RgbImage {
    let side = image.width().max(image.height()) as f32;
    if rng.random_bool(0.5) {
        return imageops::blur(image, side * rng.random_range(FOCUS_BLUR));
    }
    let length = side * rng.random_range(MOTION_BLUR);
    let (sin, cos) = rng.random_range(0.0..std::f32::consts::PI).sin_cos();
    let num = length.ceil().max(2.0) as usize;
    let (right, bottom) = (image.width() as f32 - 1.0, image.height() as f32 - 1.0);
    RgbImage::from_fn(image.width(), image.height(), |x, y| {
        let mut sum = [0.0; 3];
        for i in 0..num {
            let along = length * (i as f32 / (num - 1) as f32 - 0.5);
            let (x, y) = (x as f32 + along * cos, y as f32 + along * sin);
            let Rgb(pixel) = bilinear(image, x.clamp(0.0, right), y.clamp(0.0, bottom));
            sum.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += f32::from(value));
        }
        Rgb(sum.map(|sum| (sum / num as f32).round() as u8))
    })
}

/// Adds noise that is nearly normal: a sum of three uniform values.
fn add_noise(image: &mut RgbImage, rng: &mut ChaCha8Rng) {
    let strength = rng.random_range(NOISE);
    let mut bytes = vec![0; 3 * image.as_raw().len()];
    rng.fill_bytes(&mut bytes);
    let (triples, _) = bytes.as_chunks::<3>();
    for (value, triple) in image.iter_mut().zip(triples) {
        // A sum of three bytes has a mean of 382.5 and a standard deviation of 128.
        let unit = (triple.iter().map(|byte| f32::from(*byte)).sum::<f32>() - 382.5) / 128.0;
        // The cast saturates.
        *value = (f32::from(*value) + strength * unit).round() as u8;
    }
}

/// The image after JPEG compression.
fn compressed(image: &RgbImage, quality: u8) -> Result<RgbImage> {
    let wrong = |error: image::ImageError| Error::Training(format!("augment.jpeg: {error}"));
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, quality).encode_image(image).map_err(wrong)?;
    Ok(image::load_from_memory_with_format(&bytes, ImageFormat::Jpeg).map_err(wrong)?.into_rgb8())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn only(set: fn(&mut AugmentConfig)) -> AugmentConfig {
        let mut config = AugmentConfig::default();
        set(&mut config);
        config
    }

    #[test]
    fn each_condition_changes_what_it_says_and_the_seed_decides() {
        let original = RgbImage::from_fn(112, 112, |x, y| Rgb([60 + x as u8, 60 + y as u8, 120]));
        let applied = |config: &AugmentConfig, seed: u64| {
            let mut image = original.clone();
            apply(&mut image, config, &mut ChaCha8Rng::seed_from_u64(seed)).unwrap();
            image
        };
        assert_eq!(applied(&AugmentConfig::default(), 0), original, "none by default");
        let black = |image: &RgbImage| image.pixels().filter(|p| p.0 == [0; 3]).count();
        let framed = only(|c| c.frame = 1.0);
        for seed in 0..50 {
            let image = applied(&framed, seed);
            assert!(black(&image) < 112 * 112 * 7 / 10, "seed {seed}: {} black", black(&image));
            let kept = image.pixels().zip(original.pixels()).filter(|(a, b)| a == b).count();
            assert_eq!(kept + black(&image), 112 * 112, "what is not black is as it was");
            assert_eq!(image, applied(&framed, seed));
        }
        assert!((0..50).any(|seed| black(&applied(&framed, seed)) > 2000));
        let moved = applied(&only(|c| c.misalign = 1.0), 3);
        assert!(moved != original && moved.get_pixel(56, 56).0[0].abs_diff(116) < 12);
        let coarse = applied(&only(|c| c.low_resolution = 1.0), 3);
        assert!(coarse != original && coarse.get_pixel(56, 56).0[0].abs_diff(116) < 8);
        assert_ne!(applied(&only(|c| c.light = 1.0), 3), original);
        // Blur flattens a fine texture, noise and compression roughen a gradient; none changes the mean.
        let texture = RgbImage::from_fn(112, 112, |x, y| Rgb([if (x ^ y) & 1 == 0 { 90 } else { 150 }; 3]));
        let spread = |image: &RgbImage| {
            let values: Vec<f64> = image.iter().map(|v| f64::from(*v)).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (mean, (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt())
        };
        let flat = RgbImage::from_pixel(112, 112, Rgb([120; 3]));
        for seed in 0..20 {
            let with = |image: &RgbImage, config: &AugmentConfig| {
                let mut image = image.clone();
                apply(&mut image, config, &mut ChaCha8Rng::seed_from_u64(seed)).unwrap();
                spread(&image)
            };
            let (mean, deviation) = with(&texture, &only(|c| c.blur = 1.0));
            assert!((mean - 120.0).abs() < 2.0 && deviation < 28.0, "seed {seed}: {mean}, {deviation}");
            let (mean, deviation) = with(&flat, &only(|c| c.noise = 1.0));
            assert!((mean - 120.0).abs() < 0.3 && (1.9..12.5).contains(&deviation), "seed {seed}: {deviation}");
            let (mean, deviation) = with(&texture, &only(|c| c.jpeg = 1.0));
            assert!((mean - 120.0).abs() < 3.0 && deviation != 30.0, "seed {seed}: {mean}, {deviation}");
        }
        let (erased, cropped) = (only(|c| c.erase = 1.0), only(|c| c.crop = 1.0));
        for seed in 0..50 {
            let image = applied(&erased, seed);
            let changed = image.pixels().zip(original.pixels()).filter(|(a, b)| a != b).count();
            assert!((200..2700).contains(&changed), "seed {seed}: {changed}");
            let image = applied(&cropped, seed);
            // A stretched part of a gradient has a smaller range in the same direction.
            let across = i32::from(image.get_pixel(111, 56).0[0]) - i32::from(image.get_pixel(0, 56).0[0]);
            assert!((60..=111).contains(&across), "seed {seed}: {across}");
        }
    }
}
