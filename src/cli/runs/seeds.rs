//! Summary of trainings that differ only in their seed.

use anyhow::{Result, bail};
use statrs::distribution::{ContinuousCDF, StudentsT};

use super::{grid, other_test_data};
use crate::cli::print;
use crate::eval::{Setting, SettingResult};
use crate::train::{Arm, PairedTest, Run};

/// Prints, for every arm and setting, the mean over the seeds with its 95 % interval, and the p values of the paired
/// tests, one per seed.
///
/// # Errors
/// When there are fewer than two trainings, two have the same seed or differ in more, or one is not finished.
pub(super) fn summarise(runs: &[Run]) -> Result<()> {
    let [first, rest @ ..] = runs else { bail!("expected two or more trainings, found none") };
    if rest.is_empty() {
        bail!("expected two or more trainings, found one: {}", first.folder.display());
    }
    for run in rest {
        let differs = first.config.entries_unlike(&run.config)?;
        if let Some((key, _)) = differs.into_iter().find(|(key, _)| key != "train.seed") {
            let [a, b] = [first, run].map(|run| run.folder.display());
            bail!("{a} and {b}: expected trainings that differ in train.seed only, found a different {key}");
        }
    }
    if let Some((run, what)) = other_test_data(runs) {
        let [a, b] = [first, run].map(|run| run.folder.display());
        bail!("{a} and {b}: expected trainings with one test set: {what}");
    }
    for (i, run) in runs.iter().enumerate() {
        let seed = run.config.train.seed;
        if let Some(same) = runs[..i].iter().find(|other| other.config.train.seed == seed) {
            let [a, b] = [same, run].map(|run| run.folder.display());
            bail!("{a} and {b}: expected trainings of different seeds, found seed {seed} in both");
        }
    }
    let mut arms: Vec<Arm> = first.finished().map(|(arm, _)| arm).collect();
    for run in runs {
        let found: Vec<Arm> = run.finished().map(|(arm, _)| arm).collect();
        if found != arms || run.arms.len() != arms.len() {
            bail!("{}: expected a finished training with the arms of {}", run.folder.display(), first.folder.display());
        }
    }
    arms.sort();
    let columns = Setting::TABLE.map(|setting| setting.name().to_owned());
    type Metric = (&'static str, f64, usize, fn(&SettingResult) -> Option<f64>);
    let metrics: [Metric; 3] = [
        ("EER %", 100.0, 2, |r| Some(r.metrics.eer)),
        ("FMR100 %", 100.0, 2, |r| Some(r.metrics.fmr100)),
        ("FDR", 1.0, 2, |r| r.metrics.fdr),
    ];
    for (name, factor, digits, metric) in metrics {
        let row = |&arm: &Arm| {
            let cell = |setting: Setting| {
                let of = |run: &Run| {
                    let (_, outcome) = run.finished().find(|(finished, _)| *finished == arm)?;
                    metric(outcome.evaluation.settings.get(&setting)?).map(|value| factor * value)
                };
                runs.iter().map(of).collect::<Option<Vec<f64>>>().map_or("-".to_owned(), |v| mean(&v, digits))
            };
            (arm.title().to_owned(), Setting::TABLE.map(cell).to_vec())
        };
        let rows: Vec<_> = arms.iter().map(row).collect();
        print(&grid(&format!("{name}, {} seeds", runs.len()), &columns, &rows))?;
    }
    let rows: Vec<_> = arms.iter().filter_map(|&arm| p_values(runs, arm)).collect();
    match rows.is_empty() {
        true => Ok(()),
        false => print(&grid("p against augmentation only (EER), by seed", &columns, &rows)),
    }
}

/// Returns an arm's row of p values; none if it was not tested.
fn p_values(runs: &[Run], arm: Arm) -> Option<(String, Vec<String>)> {
    let cell = |setting: Setting| {
        let is_wanted = |t: &&PairedTest| t.arm == arm && t.metric == "EER" && t.setting == setting.name();
        let of = |run: &Run| run.paired_tests.iter().find(is_wanted).map(|t| format!("{:.3}", t.difference.p_value));
        runs.iter().map(of).collect::<Option<Vec<String>>>().map(|values| values.join(" "))
    };
    let cells = Setting::TABLE.map(cell).into_iter().collect::<Option<Vec<_>>>()?;
    Some((arm.title().to_owned(), cells))
}

/// Formats a mean with its 95 % interval by Student's t; one value for all seeds stands alone.
pub(in crate::cli) fn mean(values: &[f64], digits: usize) -> String {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.iter().all(|value| value == &values[0]) {
        return format!("{mean:.digits$}");
    }
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let t = StudentsT::new(0.0, 1.0, n - 1.0).expect("at least two values").inverse_cdf(0.975);
    let half = t * (variance / n).sqrt();
    format!("{mean:.digits$} [{:.digits$}, {:.digits$}]", mean - half, mean + half)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_students() {
        // Mean 3, standard deviation sqrt(2.5), t of 4 degrees of freedom 2.7764: 3 -+ 1.9632.
        assert_eq!(mean(&[1.0, 2.0, 3.0, 4.0, 5.0], 2), "3.00 [1.04, 4.96]");
        assert_eq!(mean(&[0.4, 0.4], 2), "0.40");
    }
}
