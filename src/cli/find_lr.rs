//! `maskinv train --find-lr`: the learning-rate range test.

use anyhow::{Context, Result};
use clap::Args;

use super::progress::Progress;
use super::{print, print_json};
use crate::train::{Event, Experiment, LrPoint, LrRange};

/// Number of rows in the printed chart.
const NUM_ROWS: usize = 24;
/// Length of the longest bar, in characters.
const BAR: f64 = 40.0;

/// Flags for the range of learning rates.
#[derive(Args, Debug)]
pub(super) struct LrRangeArgs {
    /// Learning rate of the first step of --find-lr
    #[arg(long, value_name = "X", default_value_t = 1e-5, requires = "find_lr")]
    lr_from: f64,
    /// Learning rate of the last step of --find-lr, which stops earlier if the loss diverges
    #[arg(long, value_name = "X", default_value_t = 10.0, requires = "find_lr")]
    lr_to: f64,
    /// Number of steps of --find-lr, each with a higher learning rate
    #[arg(long, value_name = "N", default_value_t = 200, requires = "find_lr")]
    lr_steps: usize,
}

impl LrRangeArgs {
    /// Runs the test on the first configured arm and prints the result.
    pub(super) fn run(&self, experiment: &Experiment, quiet: bool, json: bool) -> Result<()> {
        let arm = *experiment.config().train.arms.first().context("train.arms: expected at least one")?;
        let mut progress = Progress::of(quiet);
        let on = &mut |event: Event| match event {
            Event::Step(at) if !quiet => progress.count("find-lr", "steps", at.step, self.lr_steps),
            Event::Step(_) => {}
            other => progress.show(other),
        };
        let range = experiment.find_lr(arm, [self.lr_from, self.lr_to], self.lr_steps, on)?;
        if json {
            return print_json(&range);
        }
        print(&format!("{}: smoothed loss by optim.lr\n{}\n", arm.title(), chart(&range.points)))?;
        print(&advice(&range))
    }
}

/// Formats one row for every few steps, with a bar proportional to the loss.
fn chart(points: &[LrPoint]) -> String {
    let highest = points.iter().map(|p| p.smoothed).fold(0.0, f64::max);
    let row = |p: &LrPoint| {
        let bar = "#".repeat((BAR * p.smoothed / highest).round().max(0.0) as usize);
        format!("{:9.2e} {:9.3} {bar}", p.lr, p.smoothed)
    };
    let rows = points.chunks(points.len().div_ceil(NUM_ROWS).max(1)).filter_map(|chunk| chunk.last());
    rows.map(row).collect::<Vec<_>>().join("\n")
}

fn advice(range: &LrRange) -> String {
    let LrRange { steepest, tenth_of_least, has_diverged, points, .. } = range;
    let (Some(steepest), Some(tenth)) = (steepest, tenth_of_least) else {
        return "the loss diverged at once: start from a lower learning rate (--lr-from)".to_owned();
    };
    let end = match (has_diverged, points.last()) {
        (true, Some(last)) => format!("above {:.2e} it diverges", last.lr),
        _ => "it never diverged: test higher rates (--lr-to)".to_owned(),
    };
    format!("the loss falls fastest at {steepest:.2e}; a tenth of the rate with the lowest loss is {tenth:.2e}; {end}")
}
