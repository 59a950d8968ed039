//! Times the margin loss forward and backward: `cargo bench --bench margin -- [N] [K] [d] [ROUNDS]` prints the median in
//! milliseconds and the peak memory; without `K`, for 1k to 1M classes.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor, Var};
use maskinv::losses::{MarginConfig, MarginKind};

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |i: usize, default: usize| args.get(i).map_or(Ok(default), |n| n.parse()).context("expected a number");
    let (n, d, rounds) = (number(0, 64)?, number(2, 512)?, number(3, 7)?);
    let classes = if args.len() > 1 { vec![number(1, 0)?] } else { vec![1_000, 10_000, 100_000, 1_000_000] };
    println!("N {n}, d {d}, {} threads", rayon::current_num_threads());
    println!("{:>10} {:>12} {:>12} {:>12}", "K", "forward ms", "both ms", "peak MB");
    for k in classes {
        let [forward, both] = times(n, d, k, rounds)?;
        println!("{k:10} {forward:12.2} {both:12.2} {:>12}", peak_mb().map_or("?".into(), |mb| mb.to_string()));
    }
    Ok(())
}

/// Medians of forward, and of forward and backward, in milliseconds.
fn times(n: usize, d: usize, k: usize, rounds: usize) -> Result<[f64; 2]> {
    let e = Var::randn(0f32, 1.0, (n, d), &Device::Cpu)?;
    let w = Var::from_tensor(&Tensor::randn(0f32, 0.01, (d, k), &Device::Cpu)?)?;
    let config = MarginConfig { kind: MarginKind::ArcFace, ..MarginConfig::default() };
    let labels: Vec<i64> = (0..n).map(|i| (i * 7919 % k) as i64).collect();
    let margins = vec![config.mean(); n];
    let (mut forward, mut both) = (Vec::new(), Vec::new());
    for _ in 0..=rounds {
        let began = Instant::now();
        let loss = config.loss(&e, &w, &labels, &margins)?;
        forward.push(1e3 * began.elapsed().as_secs_f64());
        let grads = loss.backward()?;
        both.push(1e3 * began.elapsed().as_secs_f64());
        drop(grads);
    }
    // The first is not counted.
    let median = |mut times: Vec<f64>| {
        times.remove(0);
        times.sort_by(f64::total_cmp);
        times.get(rounds / 2).copied().unwrap_or(f64::NAN)
    };
    Ok([median(forward), median(both)])
}

/// The most memory that this process has held, where the system says.
fn peak_mb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? / 1024)
}
