//! Times the margin loss of a training step, forward and backward: `cargo bench --bench margin -- [N] [K] [d] [ROUNDS]`
//! prints the median time in milliseconds and the peak memory for `N` embeddings of length `d` and `K` classes; without
//! `K`, for 1,000 to 1,000,000 classes.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use maskinv::losses::{MarginConfig, MarginHead};
use maskinv::machine::peak_bytes;
use maskinv::ops::margin_loss::{Rows, margin_loss_with_gradients};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |i: usize, default: usize| args.get(i).map_or(Ok(default), |n| n.parse()).context("expected a number");
    let (n, d, rounds) = (number(0, 64)?, number(2, 512)?, number(3, 7)?);
    let classes = if args.len() > 1 { vec![number(1, 0)?] } else { vec![1_000, 10_000, 100_000, 1_000_000] };
    maskinv::workers::pool(0).build_global()?;
    println!("N {n}, d {d}, {} threads", rayon::current_num_threads());
    println!("{:>10} {:>12} {:>12}", "K", "ms", "peak MB");
    for k in classes {
        let median = time(n, d, k, rounds)?;
        println!(
            "{k:10} {median:12.2} {:>12}",
            peak_bytes().map(|bytes| bytes >> 20).map_or("?".into(), |mb| mb.to_string())
        );
    }
    Ok(())
}

/// Returns the median time in milliseconds, without the first, warm-up round.
fn time(n: usize, d: usize, k: usize, rounds: usize) -> Result<f64> {
    let e: Vec<f32> = Tensor::randn(0f32, 1.0, n * d, &Device::Cpu)?.to_vec1()?;
    let config = MarginConfig::default();
    let head = MarginHead::new(&config, d, k, &Device::Cpu, 0)?;
    let centres: Vec<f32> = head.params().state()?["kernel"].flatten_all()?.to_vec1()?;
    drop(head);
    let mut gradient = vec![0.0; centres.len()];
    let labels: Vec<i64> = (0..n).map(|i| (i * 7919 % k) as i64).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut times = Vec::new();
    for _ in 0..=rounds {
        let began = Instant::now();
        let margins = config.draw(n, &mut rng);
        let rows = Rows { labels: &labels, margins: &margins };
        margin_loss_with_gradients(&e, &centres, rows, config.op(), 1.0, &mut gradient)?;
        times.push(1e3 * began.elapsed().as_secs_f64());
    }
    times.remove(0);
    times.sort_by(f64::total_cmp);
    times.get(rounds / 2).copied().context("expected at least one round")
}
