//! `maskinv train --sweep`: an ablation.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};

use super::{TrainArgs, carry_out};
use crate::cli::device::Work;
use crate::cli::runs::{grid, seeds::mean};
use crate::cli::{interrupt, print, tell};
use crate::eval::{Setting, SettingResult};
use crate::files::write_atomic;
use crate::machine::Machine;
use crate::report::REAL_MASKS;
use crate::train::{CONFIG_FILE, Config, Run, RunFolder, Sweep, SweepResults, SweepRow, SweptRow};

/// File of the results in the folder of an ablation.
const RESULTS_FILE: &str = "sweep.json";

/// A metric in the tables: its title, factor and value.
type Metric = (&'static str, f64, fn(&SettingResult) -> Option<f64>);

const METRICS: [Metric; 4] = [
    ("EER %", 100.0, |r| Some(r.metrics.eer)),
    ("FMR100 %", 100.0, |r| Some(r.metrics.fmr100)),
    ("FMR1000 %", 100.0, |r| Some(r.metrics.fmr1000)),
    ("FDR", 1.0, |r| r.metrics.fdr),
];

/// Trains what is not finished of an ablation, and prints its tables.
///
/// # Errors
/// When a setting, path or file is wrong, a finished training had other settings, or a training fails.
pub(super) fn run(args: &TrainArgs, file: &Path) -> Result<()> {
    let sweep = Sweep::read(file)?;
    let out = args.out.as_deref().context("expected --out, the folder for the trainings")?;
    let base = args.resolve(None)?;
    // What is wrong is said before anything is trained.
    for (row, seed) in sweep.trainings() {
        check_settings(&sweep.folder(out, row, seed), &settings(&sweep, &base, row, seed)?)?;
    }
    args.settings.threads.start()?;
    let machine = args.settings.device.open(Work::Training)?;
    let stop = interrupt::flag()?;
    let num = sweep.trainings().count();
    for (i, (row, seed)) in sweep.trainings().enumerate() {
        let name = format!("{} of {num}: {}, seed {seed}", i + 1, row.name);
        if is_finished(&sweep.folder(out, row, seed), row)? {
            tell(format_args!("{name}: is finished"));
            continue;
        }
        tell(format_args!("{name}"));
        train(args, &sweep.folder(out, row, seed), settings(&sweep, &base, row, seed)?, &machine, &stop)?;
    }
    let results = sweep.results(out)?;
    write_atomic(&out.join(RESULTS_FILE), &serde_json::to_vec_pretty(&results)?)?;
    print_tables(&results)?;
    print(&format!("All figures and tests are in {}.", out.join(RESULTS_FILE).display()))
}

/// Returns the settings of a training, with absolute paths.
fn settings(sweep: &Sweep, base: &Config, row: &SweepRow, seed: u64) -> Result<Config> {
    let mut config = sweep.config(base, row, seed)?;
    config.make_paths_absolute()?;
    Ok(config)
}

/// Checks that a training that was begun has the settings that it would have now.
fn check_settings(folder: &Path, config: &Config) -> Result<()> {
    if !Run::is_in(folder) {
        return Ok(());
    }
    let before = Config::read_written(&folder.join(CONFIG_FILE))?;
    let differences = config.differences(&before)?;
    if !differences.is_empty() {
        let found = differences.join(", ");
        bail!("{}: expected the settings that it was begun with: {found}; choose another --out", folder.display());
    }
    Ok(())
}

fn is_finished(folder: &Path, row: &SweepRow) -> Result<bool> {
    Ok(Run::is_in(folder) && Run::read(folder)?.finished().any(|(arm, _)| arm == row.arm))
}

/// Trains one row with one seed, or goes on with it.
fn train(args: &TrainArgs, folder: &Path, config: Config, machine: &Machine, stop: &Arc<AtomicBool>) -> Result<()> {
    let experiment = args.experiment(config, machine)?;
    let experiment = match Run::is_in(folder) {
        true => experiment.resumed(RunFolder::of_run(folder)?)?,
        false => experiment.in_folder(RunFolder::empty(folder)?),
    };
    carry_out(experiment, folder, args.quiet, stop, "the same command goes on").map(drop)
}

/// Prints the means over the seeds, and the p values of the tests against the baseline.
fn print_tables(results: &SweepResults) -> Result<()> {
    let settings: Vec<&str> = Setting::TABLE.iter().map(|setting| setting.name()).chain([REAL_MASKS]).collect();
    let settings: Vec<&str> = settings
        .into_iter()
        .filter(|setting| results.rows.iter().any(|row| row.figures.contains_key(*setting)))
        .collect();
    let columns: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
    for (title, factor, metric) in METRICS {
        let row = |row: &SweptRow| {
            let cell = |setting: &&str| {
                let figures = row.figures.get(*setting)?;
                let values: Option<Vec<f64>> = figures.values().map(|r| Some(factor * metric(r)?)).collect();
                values.map(|values| if values.len() > 1 { mean(&values, 2) } else { format!("{:.2}", values[0]) })
            };
            (row.name.clone(), settings.iter().map(|setting| cell(setting).unwrap_or_else(|| "-".into())).collect())
        };
        let rows: Vec<_> = results.rows.iter().map(row).collect();
        print(&grid(&format!("{title}, {} seeds", results.seeds.len()), &columns, &rows))?;
    }
    for metric in ["EER", "FMR1000", "FDR"] {
        let row = |row: &SweptRow| {
            let cell = |setting: &&str| {
                let tests = row.tests.get(*setting)?.get(metric)?;
                Some(tests.values().map(|test| format!("{:.3}", test.p_value)).collect::<Vec<_>>().join(" "))
            };
            let cells = settings.iter().map(|setting| cell(setting).unwrap_or_else(|| "-".into()));
            (!row.tests.is_empty()).then(|| (row.name.clone(), cells.collect()))
        };
        let rows: Vec<_> = results.rows.iter().filter_map(row).collect();
        if !rows.is_empty() {
            print(&grid(&format!("p against {} ({metric}), by seed", results.baseline), &columns, &rows))?;
        }
    }
    Ok(())
}
