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
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
    let config = HubConfig { token, ..HubConfig::default() };
    let path = Hub::new(config).resolve(&reference, &mut |done, total| eprint!("\r{done} of {total} bytes"))?;
    let loaded = load_model(&path, reference.entry().map(|entry| &entry.preprocessing))?;
    println!("{}: {}", path.display(), loaded.model.config().arch.title());
    println!("input: {}", loaded.model.preprocessing());
    loaded.notes.iter().for_each(|note| println!("note: {note}"));
    Ok(())
}
