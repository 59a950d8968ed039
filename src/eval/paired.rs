//! Paired significance tests of systems on the same pairs.

use serde::Serialize;

use super::bootstrap::{Bootstrap, BootstrapConfig, Difference};
use super::comparisons::Comparisons;
use super::metrics::{Metrics, Scores};
use crate::error::{Error, Result};

/// One metric of several systems.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairedFigure {
    /// Name of the metric.
    pub figure: &'static str,
    /// Value for each system; `None` where it is undefined.
    pub values: Vec<Option<f64>>,
    /// Difference of each later system from the first; `None` where a value, or more than one replicate in twenty, is
    /// missing.
    pub differences: Vec<Option<Difference>>,
}

/// Name of a metric and its value in [`Metrics`].
type Figure = (&'static str, fn(&Metrics) -> Option<f64>);

const FIGURES: [Figure; 5] = [
    ("EER", |m| Some(m.eer)),
    ("FMR100", |m| Some(m.fmr100)),
    ("FMR1000", |m| Some(m.fmr1000)),
    ("FDR", |m| m.fdr),
    ("AUC", |m| Some(m.auc)),
];

/// Returns the metrics of systems that scored the same pairs in the same order, and their differences from the first
/// system, by a paired bootstrap: every replicate has the same people for all systems.
///
/// # Errors
/// [`Error::Evaluation`] when there are fewer than two systems, their pairs differ, or `config` has no replicates.
pub fn compare_systems(systems: &[Comparisons], config: &BootstrapConfig) -> Result<Vec<PairedFigure>> {
    let [first, others @ ..] = systems else {
        return Err(Error::Evaluation("expected two or more systems, found none".to_owned()));
    };
    if others.is_empty() || config.replicates == 0 {
        let what = format!("expected several systems and resamples, found {} and {}", systems.len(), config.replicates);
        return Err(Error::Evaluation(what));
    }
    for (system, other) in others.iter().enumerate() {
        check_same_pairs(first, other).map_err(|what| Error::Evaluation(format!("system {}: {what}", system + 2)))?;
    }
    let drawn = |comparisons: &Comparisons| {
        let scores = Scores::from_labelled(comparisons.scores(), comparisons.is_same())?;
        let bootstrap = Bootstrap::new(comparisons, config)?;
        let replicates = bootstrap.replicates(|_, replicate| replicate.metrics());
        Ok((scores.metrics(), replicates, bootstrap))
    };
    let drawn = systems.iter().map(drawn).collect::<Result<Vec<_>>>()?;
    let figures = FIGURES.map(|(figure, of)| {
        let (base, base_replicates, bootstrap) = &drawn[0];
        let differences = drawn[1..].iter().map(|(metrics, replicates, _)| {
            let of_draw = |m: &Option<Metrics>| m.as_ref().and_then(of);
            let both = base_replicates.iter().zip(replicates).map(|(a, b)| [of_draw(a), of_draw(b)]);
            bootstrap.difference([of(base)?, of(metrics)?], both)
        });
        PairedFigure {
            figure,
            values: drawn.iter().map(|(metrics, ..)| of(metrics)).collect(),
            differences: differences.collect(),
        }
    });
    Ok(figures.into())
}

fn check_same_pairs(a: &Comparisons, b: &Comparisons) -> std::result::Result<(), String> {
    if a.len() != b.len() {
        return Err(format!("expected {} pairs, as in the first, found {}", a.len(), b.len()));
    }
    if let Some(i) = (0..a.len()).find(|&i| a.is_same()[i] != b.is_same()[i]) {
        let kind = |is_same: bool| if is_same { "genuine" } else { "impostor" };
        return Err(format!("pair {i}: expected a {} one, found a {} one", kind(a.is_same()[i]), kind(b.is_same()[i])));
    }
    match (a.people(), b.people()) {
        (Some(a), Some(b)) => match (0..a.len()).find(|&i| a[i] != b[i]) {
            Some(i) => Err(format!("pair {i}: expected the same two people as in the first, found others")),
            None => Ok(()),
        },
        (None, None) => Ok(()),
        _ => Err("expected people named either in both files or in neither".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparisons(better_by: f64) -> Comparisons {
        let (mut scores, mut is_same, mut people) = (vec![], vec![], vec![]);
        for a in 0..50u32 {
            for b in a..50 {
                let noise = f64::from((a * 31 + b * 17) % 23) / 23.0 - 0.5;
                scores.push(if a == b { 0.4 + better_by } else { 0.0 } + 0.6 * noise);
                is_same.push(a == b);
                people.push([a, b]);
            }
        }
        Comparisons::new(scores, is_same, Some(people)).unwrap()
    }

    #[test]
    fn a_better_system_is_better_and_the_same_system_is_not() {
        let config = BootstrapConfig { replicates: 300, ..BootstrapConfig::default() };
        let systems = [comparisons(0.0), comparisons(0.1), comparisons(0.0)];
        let figures = compare_systems(&systems, &config).unwrap();
        let auc = figures.iter().find(|f| f.figure == "AUC").unwrap();
        let [better, same] = [0, 1].map(|i| auc.differences[i].unwrap());
        assert!(better.p_value < 0.01 && better.interval.low > 0.0, "{better:?}");
        assert!((better.difference - (auc.values[1].unwrap() - auc.values[0].unwrap())).abs() < 1e-12);
        assert_eq!((same.difference, same.p_value, same.interval.low, same.interval.high), (0.0, 1.0, 0.0, 0.0));
    }

    #[test]
    fn systems_of_other_pairs_cannot_be_compared() {
        let config = BootstrapConfig { replicates: 100, ..BootstrapConfig::default() };
        let error = |b: Comparisons| compare_systems(&[comparisons(0.0), b], &config).unwrap_err().to_string();
        let base = comparisons(0.0);
        let with = |scores: Vec<f64>, people: Option<Vec<[u32; 2]>>| {
            let is_same = base.is_same()[..scores.len()].to_vec();
            Comparisons::new(scores, is_same, people).unwrap()
        };
        assert!(error(with(base.scores()[1..].to_vec(), None)).contains("system 2: expected 1275 pairs"));
        assert!(error(with(base.scores().to_vec(), None)).contains("named either in both"));
        let renamed = base.people().unwrap().iter().map(|pair| pair.map(|p| 49 - p)).collect();
        assert!(error(with(base.scores().to_vec(), Some(renamed))).contains("pair 0: expected the same two people"));
        assert!(compare_systems(&[comparisons(0.0)], &config).is_err());
    }
}
