//! `maskinv runs`.

pub(super) mod seeds;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::results::eers;
use super::{print, print_json, run_report};
use crate::cli::tell;
use crate::eval::{Setting, SettingResult, figure_rows};
use crate::train::{Arm, Progressed, REPORT_PAGE, Run};

/// Arguments of `maskinv runs`.
#[derive(Args, Debug)]
pub struct RunsArgs {
    /// Folders of training runs, or folders that contain some; two or more runs are compared [default: runs]
    #[arg(value_name = "DIR")]
    folders: Vec<PathBuf>,
    /// Rewrite report.html in each run's folder
    #[arg(long)]
    report: bool,
    /// Summarise runs that differ only in their seed: means with 95 % intervals, and each run's p values against aug
    #[arg(long, conflicts_with_all = ["report", "json"])]
    seeds: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl RunsArgs {
    /// Lists the trainings in a folder, or compares the given trainings.
    ///
    /// # Errors
    /// When there are none, or a given training has no settings or corrupt records.
    pub fn run(self) -> Result<()> {
        let default = [PathBuf::from("runs")];
        let named: &[PathBuf] = if self.folders.is_empty() { &default } else { &self.folders };
        let mut runs = Vec::new();
        for folder in named {
            match Run::is_in(folder) {
                true => runs.push(Run::read(folder)?),
                // A corrupt training is reported, and the rest are still listed.
                false => runs.extend(inside(folder)?.into_iter().filter_map(|folder| match Run::read(&folder) {
                    Ok(run) => Some(run),
                    Err(error) => {
                        tell(format_args!("{}: {error}", folder.display()));
                        None
                    }
                })),
            }
        }
        if runs.is_empty() {
            let names: Vec<String> = named.iter().map(|folder| folder.display().to_string()).collect();
            bail!("{}: expected training folders (with config.toml), found none", names.join(", "));
        }
        if self.report {
            for run in &runs {
                run_report::write(&run.folder, None, Vec::new())?;
                print(&run.folder.join(REPORT_PAGE).display().to_string())?;
            }
            return Ok(());
        }
        if self.seeds {
            return seeds::summarise(&runs);
        }
        if self.json {
            return print_json(&runs);
        }
        let is_comparison = runs.len() > 1 && named.iter().all(|folder| Run::is_in(folder));
        if is_comparison { compare(&runs) } else { list(&runs) }
    }
}

/// Returns the training folders inside a folder, in name order.
fn inside(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("{}: cannot list trainings", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| folder.display().to_string())?.path();
        if Run::is_in(&path) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Prints a line for every training, followed by one for each of its arms.
fn list(runs: &[Run]) -> Result<()> {
    for run in runs {
        let config = &run.config;
        let data = config.data.root.as_ref().map_or("procedural faces".to_owned(), |root| root.display().to_string());
        let commit = run.provenance.as_ref().map_or(String::new(), |p| format!(", commit {}", p.commit));
        let (arch, seed) = (config.model.arch.name(), config.train.seed);
        print(&format!("{}: {arch} on {data}, seed {seed}{commit}", run.folder.display()))?;
        for (arm, progressed) in &run.arms {
            print(&format!("  {:8} {}", arm.name(), describe(progressed)))?;
        }
    }
    Ok(())
}

fn describe(progressed: &Progressed) -> String {
    match progressed {
        Progressed::Waiting => "not started".to_owned(),
        Progressed::Begun(step) => {
            let loss = step.report.loss;
            let loss = if loss.is_finite() { format!("{loss:.3}") } else { "not finite".to_owned() };
            format!("at step {}, epoch {}, loss {loss}", step.step, step.epoch)
        }
        Progressed::Finished(outcome) => {
            format!("{} steps in {:.0} s, {}", outcome.num_steps, outcome.seconds, eers(&outcome.evaluation))
        }
    }
}

/// Prints the settings that differ, and all figures of the arms finished in more than one training.
fn compare(runs: &[Run]) -> Result<()> {
    let names: Vec<String> = runs.iter().map(|run| run.folder.display().to_string()).collect();
    let entries = runs.iter().map(|run| run.config.entries()).collect::<Result<Vec<_>, _>>()?;
    let keys: BTreeSet<&String> = entries.iter().flat_map(|entries| entries.keys()).collect();
    let rows = keys.into_iter().filter_map(|key| {
        let values: Vec<String> =
            entries.iter().map(|entries| entries.get(key).cloned().unwrap_or_else(|| "-".to_owned())).collect();
        values.iter().any(|value| *value != values[0]).then(|| (key.clone(), values))
    });
    let rows: Vec<_> = rows.collect();
    print(&match rows.is_empty() {
        true => "identical settings\n".to_owned(),
        false => grid("setting", &names, &rows),
    })?;
    if let Some((run, what)) = other_test_data(runs) {
        let [a, b] = [&runs[0], run].map(|run| run.folder.display());
        print(&format!("not comparable: the test sets of {a} and {b} differ: {what}\n"))?;
    }
    for arm in Arm::ALL {
        for setting in Setting::TABLE {
            let of = |run: &Run| -> Option<SettingResult> {
                let (_, outcome) = run.finished().find(|(finished, _)| *finished == arm)?;
                outcome.evaluation.settings.get(&setting).cloned()
            };
            let found: Vec<(&String, SettingResult)> =
                names.iter().zip(runs).filter_map(|(name, run)| Some((name, of(run)?))).collect();
            if found.len() > 1 {
                let results: Vec<&SettingResult> = found.iter().map(|(_, result)| result).collect();
                let names: Vec<String> = found.iter().map(|(name, _)| (*name).clone()).collect();
                let rows: Vec<(String, Vec<String>)> =
                    figure_rows(&results).into_iter().map(|(name, cells)| (name.to_string(), cells)).collect();
                print(&grid(&format!("{}, {}", arm.name(), setting.name()), &names, &rows))?;
            }
        }
    }
    Ok(())
}

/// Returns the first training that was tested on other data than the first one, and the first difference.
fn other_test_data(runs: &[Run]) -> Option<(&Run, String)> {
    let expected = runs.first()?.test_data.as_ref()?;
    runs.iter().find_map(|run| Some((run, expected.difference(run.test_data.as_ref()?)?)))
}

/// Formats a table with one column per name.
pub(super) fn grid(title: &str, names: &[String], rows: &[(String, Vec<String>)]) -> String {
    let header = (title.to_owned(), names.to_vec());
    let all: Vec<&(String, Vec<String>)> = std::iter::once(&header).chain(rows).collect();
    let width = |column: usize| {
        let cell = |row: &(String, Vec<String>)| match column {
            0 => row.0.chars().count(),
            column => row.1[column - 1].chars().count(),
        };
        all.iter().map(|row| cell(row)).max().unwrap_or_default()
    };
    let line = |row: &(String, Vec<String>)| {
        let cells = row.1.iter().enumerate().map(|(i, cell)| format!("  {cell:w$}", w = width(i + 1)));
        format!("{:w$}{}", row.0, cells.collect::<String>(), w = width(0)).trim_end().to_owned()
    };
    all.iter().map(|row| line(row)).collect::<Vec<_>>().join("\n") + "\n"
}
