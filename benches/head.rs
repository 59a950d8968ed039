//! Measures a training step by the number of people: `cargo bench --bench head -- [CLASSES] [RATE] [N] [ROUNDS]` trains
//! a network of next to no size with a margin loss over `CLASSES` classes, of which a share `RATE` is sampled, on `N`
//! images, and prints the median time in milliseconds and the peak memory. A rank of `R` that train on `C` classes does
//! the work of `C / R` classes, with the images of all ranks.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::Device;
use maskinv::data::Batch;
use maskinv::losses::{MarginConfig, MarginHead};
use maskinv::machine::peak_bytes;
use maskinv::models::{Arch, Model, ModelConfig};
use maskinv::preprocessing::Pixels;
use maskinv::train::{StepConfig, Trainer};

const INPUT_SIZE: usize = 32;

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |i: usize, default: usize| args.get(i).map_or(Ok(default), |n| n.parse()).context("expected a number");
    let (classes, n, rounds) = (number(0, 100_000)?, number(2, 64)?, number(3, 5)?);
    let sample_rate = args.get(1).map_or(Ok(1.0), |rate| rate.parse()).context("expected a rate")?;
    maskinv::workers::pool(0).build_global()?;

    let model = ModelConfig { arch: Arch::Mbf, input_size: INPUT_SIZE, width: 0.125, ..ModelConfig::default() };
    let student = Model::new(&model, &Device::Cpu, 0)?;
    let margin = MarginConfig { sample_rate, ..MarginConfig::default() };
    margin.validate()?;
    let head = MarginHead::new(&margin, model.embedding_size, classes, &Device::Cpu, 0)?;
    let config = StepConfig::default();
    let mut trainer = Trainer::new(student, head, None, &config)?;

    let values = (0..n * 3 * INPUT_SIZE * INPUT_SIZE).map(|i| (i * 7919 % 251) as u8).collect();
    let pixels = Pixels { values, num_images: n, size: INPUT_SIZE };
    let batch = Batch {
        teacher: pixels.clone(),
        student: pixels,
        covered: vec![0.0; n],
        mirrored: vec![None; n],
        labels: (0..n).map(|i| (i * 7919 % classes) as i64).collect(),
        images: (0..n as u32).collect(),
    };
    let mut times = Vec::new();
    for step in 0..=rounds {
        let batch = batch.clone();
        let began = Instant::now();
        trainer.step(batch, step as u64, 1e-3)?;
        times.push(1e3 * began.elapsed().as_secs_f64());
    }
    // The first is a warm-up.
    times.remove(0);
    times.sort_by(f64::total_cmp);
    let median = times.get(rounds / 2).context("expected at least one round")?;
    let peak = peak_bytes().map_or("?".to_owned(), |bytes| format!("{:.1}", bytes as f64 / 1e9));
    println!(
        "{classes} classes, rate {sample_rate}, {n} images, {} threads: {median:.0} ms a step, {peak} GB",
        rayon::current_num_threads()
    );
    Ok(())
}
