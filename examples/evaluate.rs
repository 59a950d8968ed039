//! Loads a checkpoint and evaluates it on unseen procedural faces, clean and masked, with the library.
//!
//! ```text
//! cargo run --release --example train -- --arm teacher --out runs/teacher
//! cargo run --release --example evaluate -- runs/teacher/teacher
//! ```

use anyhow::{Context, Result};
use maskinv::data::DataConfig;
use maskinv::eval::{EvalConfig, Setting, evaluate, table};
use maskinv::models::open_model;
use maskinv::weights::Hub;

fn main() -> Result<()> {
    let name = std::env::args().nth(1).context("usage: evaluate MODEL")?;
    let model = open_model(&name, None, &Hub::default(), &mut |_, _| ())?.model;
    let test = DataConfig::default().open_test()?;
    let evaluation = evaluate(&model, &test, &EvalConfig::default(), |_, _| {})?;
    println!("{}\n\n{}", test.description, table(&[(&name, &evaluation)]));
    let masked = &evaluation.get(Setting::UM).context("the test set has masked pairs")?.metrics;
    println!("\n{} genuine and {} impostor pairs", masked.num_genuine, masked.num_impostor);
    Ok(())
}
