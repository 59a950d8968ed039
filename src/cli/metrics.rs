//! `maskinv metrics`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::bootstrap::BootstrapArgs;
use super::{print, print_json};
use crate::cli::tell;
use crate::eval::{
    Figures, Groups, ScoreFile, SettingResult, details_of, group_rates, group_table, operating_points, read_scores,
};

/// An equal error rate above that of guessing by this much is no accident.
const GUESSING: f64 = 0.6;

/// Arguments of `maskinv metrics`.
#[derive(Args, Debug)]
pub struct MetricsArgs {
    /// CSV with the columns score and is_same (optionally person_a, person_b, group_a, group_b), or .npy file of
    /// scores; higher scores mean more similar
    #[arg(value_name = "SCORES")]
    scores: PathBuf,
    /// For .npy scores, a .npy file of labels: 1 for genuine pairs, 0 for impostor pairs
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Number of folds for LFW's accuracy: equal parts of the pairs in file order; scores must be cosines; 0 for
    /// none
    #[arg(long, default_value_t = 0, value_name = "N")]
    folds: usize,
    /// Overall false match rate, a fraction, that sets the threshold for comparing groups
    #[arg(long, default_value_t = 1e-3, value_name = "RATE", value_parser = super::rate)]
    group_fmr: f64,
    #[command(flatten)]
    bootstrap: BootstrapArgs,
    /// Print all figures as JSON
    #[arg(long)]
    json: bool,
}

impl MetricsArgs {
    /// Computes the figures of the scores and prints them.
    ///
    /// # Errors
    /// When the file is invalid or has too few scores.
    pub fn run(self) -> Result<()> {
        let ScoreFile { comparisons, groups, repeated, with_itself, .. } =
            read_scores(&self.scores, self.labels.as_deref())?;
        if let Some(line) = repeated.first() {
            let (path, num) = (self.scores.display(), repeated.len());
            tell(format_args!("{path}: {num} repeated pairs, the first in line {line}; each occurrence counts"));
        }
        if let Some(line) = with_itself.first() {
            let (path, num) = (self.scores.display(), with_itself.len());
            tell(format_args!("{path}: {num} pairs of an image with itself, the first in line {line}; each counts"));
        }
        let bootstrap = self.bootstrap.config()?;
        let name = || self.scores.display().to_string();
        let figures = Figures::new(&comparisons, self.folds, &bootstrap).with_context(name)?;
        let result = figures.compute(None).with_context(name)?;
        if result.metrics.eer > GUESSING {
            let what = "the scores rank impostor pairs above genuine ones: are they distances? Negate them";
            tell(format_args!("{}: EER {:.1} %: {what}", self.scores.display(), 100.0 * result.metrics.eer));
        }
        let rates = |groups: Vec<[String; 2]>| group_rates(&comparisons, &groups, self.group_fmr, &bootstrap);
        // The figures of all pairs are there even if those of the groups cannot be.
        let groups = groups.map(rates).transpose().unwrap_or_else(|error| {
            tell(format_args!("{}: no figures by group, see --group-fmr: {error}", self.scores.display()));
            None
        });
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
            text += &format!("; in brackets: {} % intervals of {drawn}", 100.0 * confidence);
        }
        text += &format!("\n\n{}\n\n{}", details_of(&[("scores", result)]), operating_points(result));
        if let Some(groups) = groups {
            let (table, threshold, fmr) = (group_table(&groups), groups.threshold, groups.fmr_target);
            text += &format!("\n\nby group, at threshold {threshold:.4} (overall FMR {fmr}):\n\n{table}");
        }
        text
    }
}
