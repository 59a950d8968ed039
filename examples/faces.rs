//! Draws a contact sheet of procedural faces: one row per person, with four photos and the first photo in four masks;
//! or, with `--photo`, one photo of six people of different sizes, some with a mask.
//!
//! ```text
//! cargo run --release --example faces -- faces.png
//! cargo run --release --example faces -- photo.png --photo
//! ```

use anyhow::{Context, Result};
use image::{Rgb, RgbImage, imageops};
use maskinv::data::mask::{MaskConfig, Masker};
use maskinv::data::{Dataset, FACE_SIZE, ProceduralConfig, ProceduralFaces};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const PEOPLE: usize = 8;
const PHOTOS: usize = 4;

/// Size of the photo in pixels.
const PHOTO: [u32; 2] = [720, 400];
/// Centre of each face in the photo, in pixels, its size as a factor of a crop's, and its rotation in radians.
const PLACES: [([f32; 2], f32, f32); 6] = [
    ([110.0, 210.0], 1.5, 0.1),
    ([265.0, 120.0], 0.9, -0.15),
    ([385.0, 235.0], 1.8, -0.05),
    ([520.0, 110.0], 0.8, 0.2),
    ([620.0, 240.0], 1.3, 0.0),
    ([255.0, 320.0], 1.0, 0.12),
];

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let output = args.next().filter(|arg| arg != "--help").context("usage: faces OUT.png [--photo]")?;
    if args.next().as_deref() == Some("--photo") {
        return photo()?.save(&output).context(output);
    }
    let config = ProceduralConfig { num_identities: PEOPLE, images_per_identity: PHOTOS, ..Default::default() };
    let faces = ProceduralFaces::new(config)?;
    let masker = Masker::new(&MaskConfig::default())?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut sheet = RgbImage::new(2 * PHOTOS as u32 * FACE_SIZE, PEOPLE as u32 * FACE_SIZE);
    let at = |cell: usize| i64::from(FACE_SIZE) * cell as i64;
    for row in 0..PEOPLE {
        for column in 0..PHOTOS {
            let clean = faces.get(row * PHOTOS + column)?;
            imageops::replace(&mut sheet, &clean.image, at(column), at(row));
            let mut masked = faces.get(row * PHOTOS)?;
            masker.apply(&mut masked.image, &masked.landmarks, &mut rng)?;
            imageops::replace(&mut sheet, &masked.image, at(PHOTOS + column), at(row));
        }
    }
    sheet.save(&output).context(output)
}

/// Draws people beside each other, without the edges of their crops.
fn photo() -> Result<RgbImage> {
    let faces = ProceduralFaces::new(ProceduralConfig { num_identities: PLACES.len(), ..Default::default() })?;
    let masker = Masker::new(&MaskConfig::default())?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let [width, height] = PHOTO;
    let mut photo = RgbImage::from_fn(width, height, |x, y| Rgb([(150 + y / 8) as u8, (160 + x / 20) as u8, 190]));
    let per_person = faces.len() / PLACES.len();
    for (person, (centre, scale, turn)) in PLACES.into_iter().enumerate() {
        let mut face = faces.get(person * per_person)?;
        if person % 3 == 2 {
            masker.apply(&mut face.image, &face.landmarks, &mut rng)?;
        }
        let (sin, cos) = turn.sin_cos();
        for (x, y, pixel) in photo.enumerate_pixels_mut() {
            let (dx, dy) = ((x as f32 - centre[0]) / scale, (y as f32 - centre[1]) / scale);
            let (u, v) = (cos * dx + sin * dy + 56.0, cos * dy - sin * dx + 62.0);
            // Whole within an oval, and nothing beyond it.
            let share = (6.0 * (1.0 - ((u - 56.0) / 52.0).hypot((v - 60.0) / 60.0))).clamp(0.0, 1.0);
            if let Some(drawn) = imageops::interpolate_bilinear(&face.image, u, v).filter(|_| share > 0.0) {
                for (value, drawn) in pixel.0.iter_mut().zip(drawn.0) {
                    *value = (f32::from(*value) * (1.0 - share) + f32::from(drawn) * share).round() as u8;
                }
            }
        }
    }
    Ok(photo)
}
