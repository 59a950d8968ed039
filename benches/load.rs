//! Times loading a safetensors file: `cargo bench --bench load -- FILE [ROUNDS]` prints for each round the
//! milliseconds it takes to load named tensors, and to load a network that is ready to run.
//! `benches/peers/load_time.py` compares it with Python.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use maskinv::models::load_model;
use maskinv::weights::read_safetensors;

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let Some(path) = args.first() else {
        println!("usage: cargo bench --bench load -- FILE [ROUNDS]");
        return Ok(());
    };
    let path = Path::new(path);
    let rounds: usize = args.get(1).map_or(Ok(5), |n| n.parse()).context("ROUNDS: expected a number")?;
    for _ in 0..rounds {
        let began = Instant::now();
        let file = read_safetensors(path)?;
        let tensors_ms = 1e3 * began.elapsed().as_secs_f64();
        drop(file);
        let began = Instant::now();
        let loaded = load_model(path, None)?;
        let model_ms = 1e3 * began.elapsed().as_secs_f64();
        drop(loaded);
        println!("tensors {tensors_ms:.1} model {model_ms:.1}");
    }
    Ok(())
}
