//! Times the evaluation metrics: `cargo bench --bench metrics [-- IMPOSTORS]`, by default on 10,000,000 impostor
//! scores. `benches/peers/metrics.py` compares it with the ten-fold evaluation of the published Python code.

use std::time::Instant;

use anyhow::Result;
use maskinv::eval::{BootstrapConfig, Embeddings, FMR_TARGETS, Scores, Searches, fold_accuracy, fold_tar_at_far};
use maskinv::machine::peak_bytes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn main() -> Result<()> {
    let number = std::env::args().skip(1).find_map(|a| a.parse::<usize>().ok());
    let (impostors, mut rng) = (number.unwrap_or(10_000_000), ChaCha8Rng::seed_from_u64(0));

    // The LFW protocol: ten folds of 300 genuine and 300 impostor pairs.
    let is_same: Vec<bool> = (0..6000).map(|i| i / 300 % 2 == 0).collect();
    let distances: Vec<f64> = is_same
        .iter()
        .map(|&same| if same { rng.random_range(0.2..1.6) } else { rng.random_range(1.2..2.4) })
        .collect();
    let (mut rounds, began) = (0, Instant::now());
    while began.elapsed().as_secs_f64() < 1.0 {
        let accuracy = fold_accuracy(&distances, &is_same, 10)?;
        let tar = fold_tar_at_far(&distances, &is_same, 10, 1e-3)?;
        assert!(accuracy.mean > 0.5 && tar.tar_mean > 0.0);
        rounds += 1;
    }
    println!(
        "ten folds of 600 pairs, accuracy and TAR: {:.3} ms",
        1e3 * began.elapsed().as_secs_f64() / f64::from(rounds)
    );

    // Identification with the sizes of IJB-C: all probes against one gallery.
    let embeddings = |num: usize, rng: &mut ChaCha8Rng| {
        Embeddings::new((0..512 * num).map(|_| rng.random_range(-0.07..0.07)).collect(), 512)
    };
    let (probes, gallery) = (embeddings(19_593, &mut rng)?, embeddings(1_772, &mut rng)?);
    let people: Vec<u32> = (0..19_593).map(|i| i % 3_531).collect();
    let known: Vec<u32> = (0..1_772).collect();
    let began = Instant::now();
    let searches = Searches::run(&probes, &people, &gallery, &known)?;
    let found = searches.figures(&BootstrapConfig { replicates: 0, ..BootstrapConfig::default() })?;
    println!("19593 searches among 1772 people, all figures: {:.0} ms", 1e3 * began.elapsed().as_secs_f64());
    assert!(found.num_mated + found.num_nonmated == 19_593 && found.at_fpir[2].tpir.is_some());

    let scores = |num: usize, middle: f64, rng: &mut ChaCha8Rng| -> Vec<f64> {
        (0..num).map(|_| middle + rng.random_range(-0.3..0.3) + rng.random_range(-0.3..0.3)).collect()
    };
    let (genuine, impostor) = (scores(impostors / 100, 0.5, &mut rng), scores(impostors, 0.0, &mut rng));
    let before = peak_bytes().map(|bytes| bytes >> 20);
    let began = Instant::now();
    let scores = Scores::new(genuine, impostor)?;
    let metrics = scores.metrics();
    let rates: Vec<f64> = FMR_TARGETS.into_iter().filter_map(|f| scores.fnmr_at_fmr(f).ok()).collect();
    println!("{impostors} impostor scores, all figures: {:.2} s", began.elapsed().as_secs_f64());
    println!("EER {:.6}, AUC {:.6}, FNMR at FMR 1e-1 to 1e-6 {rates:?}", metrics.eer, metrics.auc);
    if let (Some(before), Some(after)) = (before, peak_bytes().map(|bytes| bytes >> 20)) {
        println!("{before} MB at most with the scores in memory, {after} MB at most in all");
    }
    Ok(())
}
