//! `maskinv train --dry-run`: time and memory that a training will need.

use std::time::Duration;

use anyhow::Result;
use indicatif::HumanDuration;

use super::progress::Progress;
use super::{print, print_json};
use crate::machine::peak_bytes;
use crate::train::{Event, Experiment, MemoryEstimate, Rehearsal};

/// Number of measured steps per arm.
const NUM_STEPS: usize = 10;

/// Runs a few steps of every arm and prints the expected training time and memory.
pub(super) fn run(experiment: &Experiment, quiet: bool, json: bool) -> Result<()> {
    let mut progress = Progress::of(quiet);
    let mut rehearsals = Vec::new();
    for &arm in experiment.config().train.arms.iter().filter(|arm| arm.is_trained()) {
        let on = &mut |event: Event| {
            if let Event::Notice(_) | Event::Embedded { .. } = event {
                progress.show(event);
            }
        };
        rehearsals.push(experiment.rehearse(arm, NUM_STEPS, on)?);
    }
    let total_s: f64 = rehearsals.iter().map(|r| r.step_s * r.num_steps as f64).sum();
    let peak = peak_bytes();
    if json {
        return print_json(
            &serde_json::json!({ "arms": rehearsals, "training_s": total_s, "peak_resident_bytes": peak }),
        );
    }
    let splits = experiment.splits();
    let (train, test) = (&splits.train, &splits.test);
    if let Some(found) = &splits.found {
        print(found)?;
    }
    print(&format!("train: {} images of {} identities", train.len(), train.num_identities()))?;
    if let Some(watch) = &splits.watch {
        print(&format!("watch: {}, {} pairs", watch.description, watch.pairs.len()))?;
    }
    print(&format!("test: {}, {} pairs, all images decodable\n", test.description, test.pairs.len()))?;
    print("arm      steps     ms/step  waiting for data  training")?;
    for Rehearsal { arm, num_steps, step_s, wait_share, .. } in &rehearsals {
        let ms = 1e3 * step_s;
        let time = duration(step_s * *num_steps as f64);
        print(&format!("{:8} {num_steps:<9} {ms:<8.0} {:>14.0} %  {time}", arm.name(), 100.0 * wait_share))?;
    }
    print(&format!("all        {:35}{}, without evaluations\n", "", duration(total_s)))?;
    for rehearsal in &rehearsals {
        if let [first, ..] = &rehearsal.without_gradient[..] {
            let num = rehearsal.without_gradient.len();
            print(&format!(
                "{}: {num} parameters received no gradient in the first step: {first} ...",
                rehearsal.arm.name()
            ))?;
        }
    }
    if let Some(largest) = rehearsals.iter().max_by_key(|r| r.memory.total()) {
        print(&format!("estimated memory of {}:\n{}", largest.arm.name(), memory(&largest.memory)))?;
    }
    if let Some(peak) = peak {
        print(&format!("measured peak memory of the whole process, including data: {}", megabytes(peak)))?;
    }
    Ok(())
}

fn memory(memory: &MemoryEstimate) -> String {
    let MemoryEstimate { weights, gradients, optimizer, head, teacher, targets, activations, images } = memory;
    let rows = [
        ("weights and statistics", Some(*weights)),
        ("gradients", Some(*gradients)),
        ("optimiser", Some(*optimizer)),
        ("class centres + grad + opt", Some(*head)),
        ("teacher", Some(*teacher)),
        ("kept embeddings of it", Some(*targets)),
        ("activations", *activations),
        ("prefetched batches", Some(*images)),
        ("total", Some(memory.total())),
    ];
    let row = |(name, bytes): &(&str, Option<usize>)| {
        format!("  {name:26} {:>10}", bytes.map_or("unknown".to_owned(), megabytes))
    };
    rows.iter().map(row).collect::<Vec<_>>().join("\n")
}

fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 * 1e-6)
}

fn duration(seconds: f64) -> String {
    HumanDuration(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)).to_string()
}
