//! `maskinv compare`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::bootstrap::BootstrapArgs;
use super::{print, print_json};
use crate::eval::{
    BootstrapConfig, PairedFigure, Setting, compare_systems, comparison_table, join_scores, read_scores,
};
use crate::report::{REAL_MASKS, ReportFile};

/// Arguments of `maskinv compare`.
#[derive(Args, Debug)]
pub struct CompareArgs {
    /// Reports of `evaluate --report` (the folder or its report.json), or CSVs of scores of the same pairs, joined by
    /// their columns image_a and image_b, or else in the same order; the first system is the baseline
    #[arg(required = true, value_name = "REPORT|SCORES")]
    inputs: Vec<PathBuf>,
    #[command(flatten)]
    bootstrap: BootstrapArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Figures of several systems on the same pairs.
struct Comparison {
    /// Setting, such as `U-M`; empty for score files.
    setting: String,
    systems: Vec<String>,
    figures: Vec<PairedFigure>,
    /// Reason why differences are not tested, if they are not.
    note: Option<String>,
}

impl CompareArgs {
    /// Compares the systems and prints a table for every setting that at least two of them share.
    ///
    /// # Errors
    /// When a file is invalid, the systems scored different pairs, or no setting has two systems.
    pub fn run(self) -> Result<()> {
        let bootstrap = self.bootstrap.config()?;
        let num_reports = self.inputs.iter().filter(|path| is_report(path)).count();
        let comparisons = match num_reports {
            0 => vec![self.of_scores(&bootstrap)?],
            num if num == self.inputs.len() => self.of_reports(&bootstrap)?,
            _ => bail!("expected either reports or score files, found both"),
        };
        if self.json {
            let record = |c: &Comparison| serde_json::json!({ "setting": c.setting, "systems": c.systems, "figures": c.figures, "note": c.note });
            return print_json(&serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"),
                "commit": env!("MASKINV_COMMIT"),
                "bootstrap": bootstrap,
                "comparisons": comparisons.iter().map(record).collect::<Vec<_>>(),
            }));
        }
        let text = |c: &Comparison| {
            let title = if c.setting.is_empty() { String::new() } else { format!("{}\n\n", c.setting) };
            let note = c.note.as_ref().map(|note| format!("\n{note}")).unwrap_or_default();
            title + &comparison_table(&c.systems, &c.figures, bootstrap.confidence) + &note
        };
        print(&comparisons.iter().map(text).collect::<Vec<_>>().join("\n\n"))
    }

    fn of_scores(&self, bootstrap: &BootstrapConfig) -> Result<Comparison> {
        let systems: Vec<String> = self.inputs.iter().map(|path| path.display().to_string()).collect();
        let figures = paired(&self.inputs, bootstrap).with_context(|| systems.join(", "))?;
        Ok(Comparison { setting: String::new(), systems, figures, note: None })
    }

    fn of_reports(&self, bootstrap: &BootstrapConfig) -> Result<Vec<Comparison>> {
        let reports = self.inputs.iter().map(|path| ReportFile::read(path)).collect::<Result<Vec<_>, _>>()?;
        let mut settings: Vec<&str> = Vec::new();
        for (_, setting) in reports.iter().flat_map(ReportFile::measured) {
            if !settings.contains(&setting) {
                settings.push(setting);
            }
        }
        // In the order of the papers' tables, then all other settings.
        settings.sort_by_key(|setting| {
            Setting::ALL.iter().position(|known| known.name() == *setting).unwrap_or(usize::MAX)
        });
        let mut comparisons = Vec::new();
        for setting in settings {
            let with = |(i, report)| {
                let models = ReportFile::measured(report).filter(|(_, of)| *of == setting);
                models.map(move |(model, _)| (i, report, model))
            };
            let measured: Vec<(usize, &ReportFile, &str)> = reports.iter().enumerate().flat_map(with).collect();
            if measured.len() < 2 {
                continue;
            }
            check_test_sets(&measured, setting, &self.inputs)?;
            if Setting::ALL.iter().any(|known| *known != Setting::UU && known.name() == setting) {
                check_masks(&measured, &self.inputs)?;
            }
            let is_ambiguous = |name: &str| measured.iter().filter(|(.., other)| *other == name).count() > 1;
            let name = |(i, _, model): &(usize, &ReportFile, &str)| match is_ambiguous(model) {
                true => format!("{}: {model}", self.inputs[*i].display()),
                false => (*model).to_owned(),
            };
            let systems: Vec<String> = measured.iter().map(name).collect();
            let kept: Vec<Option<PathBuf>> = measured.iter().map(|(_, r, model)| r.scores(model, setting)).collect();
            let (figures, note) = match kept.iter().cloned().collect::<Option<Vec<_>>>() {
                Some(files) => (paired(&files, bootstrap).with_context(|| setting.to_owned())?, None),
                None => {
                    let missing: Vec<&str> =
                        systems.iter().zip(&kept).filter(|(_, file)| file.is_none()).map(|(s, _)| s.as_str()).collect();
                    let note =
                        format!("differences are not tested: no scores beside the report of {}", missing.join(", "));
                    (as_reported(&measured, setting), Some(note))
                }
            };
            comparisons.push(Comparison { setting: setting.to_owned(), systems, figures, note });
        }
        if comparisons.is_empty() {
            bail!("expected two systems measured in the same setting, found none");
        }
        Ok(comparisons)
    }
}

/// Checks that reports of one setting are of the same test set.
fn check_test_sets(measured: &[(usize, &ReportFile, &str)], setting: &str, inputs: &[PathBuf]) -> Result<()> {
    // The checksum is of the pairs with drawn masks; photos with real masks are told apart by their names.
    if setting == REAL_MASKS {
        return Ok(());
    }
    let known = |&(i, report, _): &(usize, &ReportFile, &str)| Some((i, report.test_set_sha256()?.to_owned()));
    let sums: Vec<(usize, String)> = measured.iter().filter_map(known).collect();
    match sums.iter().find(|(_, sum)| *sum != sums[0].1) {
        Some((other, _)) => {
            let [a, b] = [sums[0].0, *other].map(|i| inputs[i].display());
            bail!(
                "{a} and {b}: expected reports of the same test set, found other images or pairs (their SHA-256 \
                 differs)"
            )
        }
        None => Ok(()),
    }
}

/// Checks that reports of one setting have the same masks on the same images.
fn check_masks(measured: &[(usize, &ReportFile, &str)], inputs: &[PathBuf]) -> Result<()> {
    let [(first, report, _), others @ ..] = measured else { return Ok(()) };
    let expected = report.drawn_masks();
    for (other, report, _) in others {
        for (name, found) in report.drawn_masks() {
            if let Some(expected) = expected.get(&name).filter(|expected| **expected != found) {
                let [a, b] = [first, other].map(|i| inputs[*i].display());
                bail!("{a} and {b}: expected the same masks, found {name} = {expected} and {found}");
            }
        }
    }
    Ok(())
}

/// Whether a path is a report rather than a score file.
fn is_report(path: &Path) -> bool {
    path.is_dir() || path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"))
}

fn paired(files: &[PathBuf], bootstrap: &BootstrapConfig) -> Result<Vec<PairedFigure>> {
    let read = |path: &PathBuf| Ok((path.display().to_string(), read_scores(path, None)?));
    let systems = join_scores(files.iter().map(read).collect::<Result<Vec<_>>>()?)?;
    Ok(compare_systems(&systems, bootstrap)?)
}

/// The figures as stored in the reports, without differences.
fn as_reported(measured: &[(usize, &ReportFile, &str)], setting: &str) -> Vec<PairedFigure> {
    let figures = [("EER", "eer"), ("FMR100", "fmr100"), ("FMR1000", "fmr1000"), ("FDR", "fdr"), ("AUC", "auc")];
    let figure = |(figure, key)| PairedFigure {
        figure,
        values: measured.iter().map(|(_, report, model)| report.figure(model, setting, key)).collect(),
        differences: vec![None; measured.len() - 1],
    };
    figures.map(figure).into()
}
