//! Inference throughput by batch size and number of threads: `cargo bench --bench growth -- [ARCH ...]` prints images
//! per second, the median over interleaved rounds.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use maskinv::models::{Arch, Inference, Model, ModelConfig};
use maskinv::workers;
use rayon::ThreadPool;

const BATCHES: [usize; 4] = [1, 4, 16, 64];
const ROUNDS: usize = 5;

/// A combination of network, batch size and threads: one cell of the table.
struct Work {
    threads: usize,
    batch: usize,
    network: Inference,
    images: Tensor,
    times: Vec<f64>,
}

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let mut names: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if names.is_empty() {
        names = vec!["r18".into(), "r100".into(), "mbf".into()];
    }
    let most = std::thread::available_parallelism()?.get();
    let pools = (1..=most.min(2)).map(|threads| Ok((threads, workers::pool(threads).build()?)));
    let pools: Vec<(usize, ThreadPool)> = pools.collect::<Result<_>>()?;
    print!("{:>6} {:>8}", "", "threads");
    BATCHES.iter().for_each(|batch| print!(" {:>9}", format!("batch {batch}")));
    println!("   images/s");
    for name in names {
        let arch =
            Arch::ALL.into_iter().find(|arch| arch.name() == name).with_context(|| format!("no network {name}"))?;
        let mut works = Vec::new();
        for (threads, _) in &pools {
            for batch in BATCHES {
                let model = Model::new(&ModelConfig { arch, ..ModelConfig::default() }, &Device::Cpu, 0)?;
                let images = Tensor::rand(-1f32, 1.0, (batch, 3, 112, 112), &Device::Cpu)?;
                let network = model.into_inference(batch)?;
                works.push(Work { threads: *threads, batch, network, images, times: Vec::new() });
            }
        }
        for _ in 0..=ROUNDS {
            for work in &mut works {
                let (_, pool) = &pools[work.threads - 1];
                let began = Instant::now();
                pool.install(|| work.network.run(&work.images))?;
                work.times.push(began.elapsed().as_secs_f64());
            }
        }
        for (threads, _) in &pools {
            print!("{name:>6} {threads:>8}");
            for work in works.iter_mut().filter(|work| work.threads == *threads) {
                // The first round is a warm-up.
                work.times.remove(0);
                work.times.sort_by(f64::total_cmp);
                print!(" {:9.1}", work.batch as f64 / work.times[ROUNDS / 2]);
            }
            println!();
        }
    }
    Ok(())
}
