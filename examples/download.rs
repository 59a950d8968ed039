//! Downloads a model from the Hugging Face hub, or takes it from the cache, and shows what it is, through the library.
//!
//! ```text
//! cargo run --release --example download -- w600k-mbf
//! cargo run --release --example download -- hf://owner/repo@revision/model.safetensors
//! ```
//!
//! `HF_TOKEN` is sent for gated models. A path works too.

use anyhow::{Context, Result};
use maskinv::models::load_model;
use maskinv::weights::{Hub, HubConfig, ModelRef};

fn main() -> Result<()> {
    let name = std::env::args().nth(1).context("usage: download MODEL")?;
    let reference = ModelRef::parse(&name)?;
    let config = HubConfig { token: std::env::var("HF_TOKEN").ok(), ..HubConfig::default() };
    let path = Hub::new(config).resolve(&reference, &mut |done, total| eprint!("\r{done} of {total} bytes"))?;
    let preprocessing = match &reference {
        ModelRef::Named(entry) => Some(&entry.preprocessing),
        _ => None,
    };
    let loaded = load_model(&path, preprocessing)?;
    println!("{}: {}", path.display(), loaded.model.config().arch.title());
    println!("input: {}", loaded.model.preprocessing());
    loaded.notes.iter().for_each(|note| println!("note: {note}"));
    Ok(())
}
