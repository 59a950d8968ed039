//! Draws a contact sheet of procedural faces: one row per person, with four photos and the first photo in four masks.
//!
//! ```text
//! cargo run --release --example faces -- faces.png
//! ```

use anyhow::{Context, Result};
use image::{RgbImage, imageops};
use maskinv::data::mask::{MaskConfig, Masker};
use maskinv::data::{Dataset, FACE_SIZE, ProceduralConfig, ProceduralFaces};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const PEOPLE: usize = 8;
const PHOTOS: usize = 4;

fn main() -> Result<()> {
    let output = std::env::args().nth(1).context("usage: faces OUT.png")?;
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
