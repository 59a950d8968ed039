//! `maskinv metrics`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::bootstrap::BootstrapArgs;
use super::{print, print_json};
use crate::eval::{
    Figures, Groups, ScoreFile, SettingResult, details_of, group_rates, group_table, operating_points, read_scores,
};

/// Which scores, and what to make of them.
#[derive(Args, Debug)]
pub struct MetricsArgs {
    /// A CSV with the columns score and is_same, and maybe person_a, person_b, group_a and group_b; or a .npy file of scores. Higher
    /// scores mean more alike
    #[arg(value_name = "SCORES")]
    scores: PathBuf,
    /// A .npy file of zeros and ones, which of the scores of a .npy file are of one person
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Folds of equal size that the pairs fall into, in their order, for LFW's accuracy; the scores must be cosines
    #[arg(long, default_value_t = 0, value_name = "N")]
    folds: usize,
    /// False match rate whose threshold the groups are compared at
    #[arg(long, default_value_t = 1e-3, value_name = "RATE")]
    group_fmr: f64,
    #[command(flatten)]
    bootstrap: BootstrapArgs,
    /// Prints all figures as JSON
    #[arg(long)]
    json: bool,
}

impl MetricsArgs {
    /// Computes the figures of the scores and prints them.
    ///
    /// # Errors
    /// When the file is wrong or the scores are too few.
    pub fn run(self) -> Result<()> {
        let ScoreFile { comparisons, groups, repeated } = read_scores(&self.scores, self.labels.as_deref())?;
        if let Some(line) = repeated.first() {
            let (path, num) = (self.scores.display(), repeated.len());
            eprintln!("{path}: {num} pairs come again, the first one in line {line}: they count each time");
        }
        let bootstrap = self.bootstrap.config()?;
        let name = || self.scores.display().to_string();
        let figures = Figures::new(&comparisons, self.folds, &bootstrap).with_context(name)?;
        let result = figures.compute(None).with_context(name)?;
        let rates = |groups: Vec<[String; 2]>| group_rates(&comparisons, &groups, self.group_fmr, &bootstrap);
        let groups = groups.map(rates).transpose().context("--group-fmr")?;
        if self.json {
            return print_json(&serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"),
                "commit": env!("MASKINV_COMMIT"),
                "scores": self.scores,
                "labels": self.labels,
                "bootstrap": bootstrap,
                "figures": result,
                "groups": groups,
            }));
        }
        print(&self.text(&result, groups, bootstrap.confidence))
    }

    fn text(&self, result: &SettingResult, groups: Option<Groups>, confidence: f64) -> String {
        let m = &result.metrics;
        let mut text =
            format!("{}: {} genuine, {} impostor comparisons", self.scores.display(), m.num_genuine, m.num_impostor);
        if let Some(drawn) = &result.bootstrap {
            text += &format!("; in brackets {} % intervals of {drawn}", 100.0 * confidence);
        }
        text += &format!("\n\n{}\n\n{}", details_of(&[("scores", result)]), operating_points(result));
        if let Some(groups) = groups {
            let (table, threshold, fmr) = (group_table(&groups), groups.threshold, groups.fmr_target);
            text += &format!("\n\nby group, at the threshold {threshold:.4} of FMR {fmr} over all:\n\n{table}");
        }
        text
    }
}
