//! Draws a white surgical mask on an aligned 112x112 crop with the library.
//!
//! ```text
//! cargo run --release --example mask -- face.jpg masked.png
//! ```

use std::path::Path;

use anyhow::{Context, Result};
use maskinv::data::mask::{MaskColour, MaskConfig, MaskKind, Masker};
use maskinv::data::{ALIGNED_LANDMARKS, read_image};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (input, output) = args.next().zip(args.next()).context("usage: mask FACE MASKED")?;
    let mut image = read_image(Path::new(&input))?;
    let masker = Masker::new(&MaskConfig {
        kinds: vec![MaskKind::Surgical],
        colours: vec![MaskColour::White],
        ..MaskConfig::default()
    })?;
    masker.apply(&mut image, &ALIGNED_LANDMARKS, &mut ChaCha8Rng::seed_from_u64(0))?;
    image.save(&output).context(output)
}
