//! Downloads a model from the Hugging Face hub, or loads it from the cache, and prints its network and preprocessing.
//!
//! ```text
//! cargo run --release --example download -- w600k-mbf
//! cargo run --release --example download -- hf://owner/repo@revision/model.safetensors
//! ```
//!
//! The access token `HF_TOKEN`, needed for gated models, is sent if it is set. The argument may also be a path.

use anyhow::{Context, Result};
use maskinv::models::open_model;
use maskinv::weights::{Hub, HubConfig};

fn main() -> Result<()> {
    let name = std::env::args().nth(1).context("usage: download MODEL")?;
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
    let hub = Hub::new(HubConfig { token, ..HubConfig::default() });
    let loaded = open_model(&name, None, &hub, &mut |done, total| eprint!("\r{done} of {total} bytes"))?;
    println!("{}: {}", loaded.file, loaded.model.config().arch.title());
    println!("input: {}", loaded.model.preprocessing());
    loaded.notes.iter().for_each(|note| println!("note: {note}"));
    Ok(())
}
