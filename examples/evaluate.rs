//! Loads a checkpoint and measures it on unseen procedural faces, clean and masked, through the library.
//!
//! ```text
//! cargo run --release --example train -- --arm teacher --out runs/teacher
//! cargo run --release --example evaluate -- runs/teacher/teacher
//! ```

use std::path::Path;

use anyhow::{Context, Result};
use maskinv::data::DataConfig;
use maskinv::eval::{EvalConfig, Setting, evaluate, table};
use maskinv::models::load_model;

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: evaluate CHECKPOINT")?;
    let model = load_model(Path::new(&path), None)?.model;
    let test = DataConfig::default().open_test()?;
    let evaluation = evaluate(&model, &test, &EvalConfig::default(), |_, _| {})?;
    println!("{}\n\n{}", test.description, table(&[(&path, &evaluation)]));
    let masked = &evaluation.get(Setting::UM).metrics;
    println!("\n{} genuine and {} impostor pairs", masked.num_genuine, masked.num_impostor);
    Ok(())
}
