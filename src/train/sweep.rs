//! Ablations: several settings, each trained with several seeds, and compared with one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::config::Config;
use super::evaluation::{REAL_MASKS, score_file};
use super::run::Run;
use crate::error::{Error, Result};
use crate::eval::{Difference, SettingResult, compare_systems, read_scores};

/// An ablation, as read from a TOML file.
///
/// ```
/// use maskinv::train::Sweep;
///
/// let sweep = Sweep::parse(
///     r#"
///     seeds = [0, 1, 2]
///     baseline = "aug"
///     [[rows]]
///     name = "aug"
///     arm = "aug"
///     [[rows]]
///     name = "adaptive"
///     arm = "hg"
///     set = ["distill.centres=adaptive"]
///     "#,
/// )?;
/// assert_eq!(sweep.trainings().count(), 6);
/// # Ok::<_, maskinv::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// Seeds, with each of which every row is trained.
    pub seeds: Vec<u64>,
    /// Name of the row that the others are tested against.
    pub baseline: String,
    /// Settings of all rows, as KEY=VALUE.
    #[serde(default)]
    pub set: Vec<String>,
    /// What is compared.
    pub rows: Vec<SweepRow>,
}

/// Settings to compare with others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepRow {
    /// Name, of letters, digits, `-`, `_` and `.`: the folder of its trainings.
    pub name: String,
    /// The arm that is trained.
    pub arm: Arm,
    /// Settings, as KEY=VALUE, after those of all rows.
    #[serde(default)]
    pub set: Vec<String>,
}

impl Sweep {
    /// Reads an ablation from a TOML file.
    ///
    /// # Errors
    /// When the file cannot be read, a key is unknown or missing, or the ablation has no seeds, rows of one name, or no
    /// baseline.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Self::parse(&text).map_err(|error| match error {
            Error::Config(what) => Error::Config(format!("{}: {what}", path.display())),
            other => other,
        })
    }

    /// Reads an ablation from TOML.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(text: &str) -> Result<Self> {
        let sweep: Self =
            toml::from_str(text).map_err(|e| Error::Config(e.to_string().trim_end().replace('\n', " ")))?;
        sweep.validate()?;
        Ok(sweep)
    }

    fn validate(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Config(what));
        if self.seeds.is_empty() || self.seeds.iter().collect::<BTreeSet<_>>().len() < self.seeds.len() {
            return wrong(format!("seeds: expected one or more that differ, found {:?}", self.seeds));
        }
        let is_name = |name: &str| {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !name.is_empty() && !name.starts_with('.') && name.chars().all(is_plain)
        };
        if let Some(row) = self.rows.iter().find(|row| !is_name(&row.name)) {
            return wrong(format!("rows: expected a name of letters, digits, -, _ and ., found {:?}", row.name));
        }
        let names: BTreeSet<&String> = self.rows.iter().map(|row| &row.name).collect();
        if names.len() < self.rows.len() {
            return wrong("rows: expected names that differ, found one twice".into());
        }
        if !names.contains(&self.baseline) {
            return wrong(format!("baseline: expected the name of a row, found {}", self.baseline));
        }
        Ok(())
    }

    /// Returns the trainings in their order: all rows with the first seed, then with the next.
    pub fn trainings(&self) -> impl Iterator<Item = (&SweepRow, u64)> {
        self.seeds.iter().flat_map(|&seed| self.rows.iter().map(move |row| (row, seed)))
    }

    /// Returns the settings of a training, which change those of `base`.
    ///
    /// # Errors
    /// When a setting is unknown or out of range.
    pub fn config(&self, base: &Config, row: &SweepRow, seed: u64) -> Result<Config> {
        let mut config = base.clone();
        let in_row = |error: Error| Error::Config(format!("row {}: {error}", row.name));
        self.set.iter().chain(&row.set).try_for_each(|setting| config.set(setting)).map_err(in_row)?;
        config.train.arms = vec![row.arm];
        config.train.complete_arms();
        config.train.seed = seed;
        config.validate().map_err(in_row)?;
        Ok(config)
    }

    /// Returns the folder of a training in that of the ablation.
    pub fn folder(&self, out: &Path, row: &SweepRow, seed: u64) -> PathBuf {
        out.join(&row.name).join(format!("seed-{seed}"))
    }

    /// Reads the results of the trainings that are finished, and tests them against the baseline with the same seed.
    ///
    /// # Errors
    /// When a training's folder is corrupt.
    pub fn results(&self, out: &Path) -> Result<SweepResults> {
        let mut rows: Vec<SweptRow> = self.rows.iter().map(SweptRow::of).collect();
        for &seed in &self.seeds {
            let runs = self.rows.iter().map(|row| self.finished(out, row, seed)).collect::<Result<Vec<_>>>()?;
            for (row, figures) in rows.iter_mut().zip(&runs) {
                for (setting, result) in figures.iter().flatten() {
                    row.figures.entry(setting.clone()).or_default().insert(seed, result.clone());
                }
            }
            self.test(out, seed, &runs, &mut rows)?;
        }
        Ok(SweepResults { baseline: self.baseline.clone(), seeds: self.seeds.clone(), rows })
    }

    /// Returns the figures of a finished training by setting; none of one that is not finished.
    fn finished(&self, out: &Path, row: &SweepRow, seed: u64) -> Result<Option<BTreeMap<String, SettingResult>>> {
        let folder = self.folder(out, row, seed);
        if !Run::is_in(&folder) {
            return Ok(None);
        }
        let run = Run::read(&folder)?;
        let figures = run.finished().find(|(arm, _)| *arm == row.arm).map(|(_, outcome)| {
            let settings = outcome.evaluation.settings.iter();
            let settings = settings.map(|(setting, result)| (setting.name().to_owned(), result.clone()));
            settings.chain(outcome.real_masks.iter().map(|result| (REAL_MASKS.to_owned(), result.clone()))).collect()
        });
        Ok(figures)
    }

    /// Tests the rows that are finished with a seed against the baseline.
    fn test(
        &self,
        out: &Path,
        seed: u64,
        runs: &[Option<BTreeMap<String, SettingResult>>],
        rows: &mut [SweptRow],
    ) -> Result<()> {
        let is_baseline = |row: &SweepRow| row.name == self.baseline;
        let Some(base) = self.rows.iter().position(is_baseline).filter(|at| runs[*at].is_some()) else { return Ok(()) };
        let others: Vec<usize> = (0..rows.len()).filter(|at| *at != base && runs[*at].is_some()).collect();
        let folder = self.folder(out, &self.rows[base], seed);
        let bootstrap = Run::read(&folder)?.config.eval.bootstrap;
        if others.is_empty() || bootstrap.replicates == 0 {
            return Ok(());
        }
        for setting in runs[base].iter().flat_map(BTreeMap::keys) {
            let scores = |at: usize| {
                let row = &self.rows[at];
                Ok(read_scores(&score_file(&self.folder(out, row, seed), row.arm, setting), None)?.comparisons)
            };
            let systems =
                std::iter::once(base).chain(others.iter().copied()).map(scores).collect::<Result<Vec<_>>>()?;
            for figure in compare_systems(&systems, &bootstrap)? {
                for (&at, difference) in others.iter().zip(figure.differences) {
                    let Some(difference) = difference else { continue };
                    let tests = rows[at].tests.entry(setting.clone()).or_default();
                    tests.entry(figure.figure.to_owned()).or_default().insert(seed, difference);
                }
            }
        }
        Ok(())
    }
}

/// Results of an ablation.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SweepResults {
    /// Name of the row that the others are tested against.
    pub baseline: String,
    /// All seeds, of which some may not be finished.
    pub seeds: Vec<u64>,
    /// The rows in their order.
    pub rows: Vec<SweptRow>,
}

/// Results of a row.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SweptRow {
    /// Its name.
    pub name: String,
    /// The arm that was trained.
    pub arm: Arm,
    /// Figures by setting (`U-U`, ..., `real-masks`) and seed.
    pub figures: BTreeMap<String, BTreeMap<u64, SettingResult>>,
    /// Differences from the baseline of the same seed, by setting, metric (`EER`, `FMR1000`, `FDR`, ...) and seed.
    pub tests: BTreeMap<String, BTreeMap<String, BTreeMap<u64, Difference>>>,
}

impl SweptRow {
    fn of(row: &SweepRow) -> Self {
        Self { name: row.name.clone(), arm: row.arm, figures: BTreeMap::new(), tests: BTreeMap::new() }
    }
}
