//! Compares two aligned 112x112 crops with the library and decides whether they show the same person.
//!
//! ```text
//! cargo run --release --example verify -- model.safetensors a.jpg b.jpg 0.3
//! cargo run --release --example verify -- w600k-mbf a.jpg b.jpg 0.3
//! ```
//!
//! The threshold is the lowest cosine that counts as a match. The right one depends on the model, the costs of false
//! matches and false non-matches, and the faces: measure error rates with `maskinv evaluate` on faces like yours.
//! Without a threshold only the score is printed.

use std::path::Path;

use anyhow::{Context, Result};
use maskinv::data::read_face;
use maskinv::eval::{EmbedConfig, dot, embed};
use maskinv::models::open_model;
use maskinv::weights::Hub;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, a, b, threshold @ ..] = args.as_slice() else {
        anyhow::bail!("usage: verify MODEL IMAGE IMAGE [THRESHOLD]")
    };
    let loaded = open_model(model, None, &Hub::default(), &mut |_, _| ())?;
    loaded.notes.iter().for_each(|note| eprintln!("{note}"));
    let images = [a, b];
    let image = |i: usize| read_face(Path::new(images[i]));
    let embeddings = embed(&loaded.model, images.len(), image, EmbedConfig::default(), |_| {})?;
    let score = dot(&embeddings[0], &embeddings[1]);
    println!("cosine {score:.4}");
    if let Some(threshold) = threshold.first() {
        let threshold: f64 = threshold.parse().context("THRESHOLD: expected a number from -1 to 1")?;
        println!("{}", if score >= threshold { "the same person" } else { "different people" });
    }
    Ok(())
}
