//! All metrics of one set of comparisons, with confidence intervals.

use serde::{Deserialize, Serialize};

use super::bootstrap::{Bootstrap, BootstrapConfig, Interval, MetricIntervals, Replicate};
use super::comparisons::Comparisons;
use super::lfw::{FoldAccuracy, FoldTar, FoldedPairs, squared_l2};
use super::metrics::{Metrics, Scores};
use crate::error::Result;

/// False match rates at which systems are compared, as in IJB-B, IJB-C and NIST's reports.
pub const FMR_TARGETS: [f64; 6] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];

/// Error rates at the threshold for a target false match rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AtFmr {
    /// Target false match rate.
    pub fmr_target: f64,
    /// Lowest threshold that keeps the target. With fewer than `1 / fmr_target` impostor scores the rate cannot be
    /// measured; then this and all following fields are `None`.
    pub threshold: Option<f64>,
    /// Share of impostor scores at or above the threshold.
    pub fmr: Option<f64>,
    /// Share of genuine scores below the threshold; the true accept rate is `1 - fnmr`.
    pub fnmr: Option<f64>,
    /// Interval of `fmr`, with the threshold chosen anew in every replicate. `None` where the threshold was chosen on
    /// the same comparisons and keeps the rate by construction.
    pub fmr_interval: Option<Interval>,
    /// Interval of `fnmr`, with the threshold chosen anew in every replicate.
    pub fnmr_interval: Option<Interval>,
}

/// All metrics of one set of comparisons.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SettingResult {
    /// Error rates and score statistics over all pairs.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// Confidence intervals of `metrics`; `None` without a bootstrap.
    pub intervals: Option<MetricIntervals>,
    /// Human-readable description of the bootstrap; `None` without one.
    pub bootstrap: Option<String>,
    /// LFW's k-fold accuracy; `None` without folds or if the scores are not cosines.
    pub accuracy: Option<FoldAccuracy>,
    /// LFW's k-fold TAR at FAR 1e-3; `None` like `accuracy`, and where a fold lacks genuine or impostor pairs.
    pub tar_at_far: Option<FoldTar>,
    /// Error rates at thresholds chosen on the same comparisons.
    pub at_fmr: Vec<AtFmr>,
    /// Error rates at thresholds chosen on unmasked comparisons, as in NIST's mask reports (Ngan, Grother, Hanaoka,
    /// NISTIR 8311); empty if there are no unmasked comparisons.
    pub at_unmasked_fmr: Vec<AtFmr>,
}

/// Comparisons with their sorted scores, thresholds and bootstrap replicates. These are computed once and serve both
/// their own metrics and the error rates of other comparisons at their thresholds.
#[derive(Debug)]
pub struct Figures<'a> {
    comparisons: &'a Comparisons,
    num_folds: usize,
    config: &'a BootstrapConfig,
    scores: Scores,
    thresholds: [Option<f64>; NUM_TARGETS],
    bootstrap: Option<(Bootstrap, Vec<Option<Draw>>)>,
}

const NUM_TARGETS: usize = FMR_TARGETS.len();

/// `[FMR, FNMR]` at every target; `None` where a target cannot be measured.
type Rates = [Option<[f64; 2]>; NUM_TARGETS];

/// Results of one replicate.
#[derive(Clone, Copy, Debug)]
struct Draw {
    metrics: Metrics,
    thresholds: [Option<f64>; NUM_TARGETS],
    rates: Rates,
}

impl<'a> Figures<'a> {
    /// Sorts `comparisons` and runs the bootstrap. They fall into `num_folds` folds of equal size; below two there are
    /// no folds.
    ///
    /// # Errors
    /// When there is no genuine or no impostor comparison, or a setting of the bootstrap is out of range.
    pub fn new(comparisons: &'a Comparisons, num_folds: usize, config: &'a BootstrapConfig) -> Result<Self> {
        let scores = Scores::from_labelled(comparisons.scores(), comparisons.is_same())?;
        let thresholds = FMR_TARGETS.map(|fmr| scores.threshold_at_fmr(fmr).ok());
        let draw = |_, replicate: &Replicate| {
            let thresholds = std::array::from_fn(|i| thresholds[i].map(|_| replicate.threshold_at_fmr(FMR_TARGETS[i])));
            Draw { metrics: replicate.metrics(), thresholds, rates: rates(replicate, &thresholds) }
        };
        let bootstrap = match config.replicates {
            0 => None,
            _ => {
                let bootstrap = Bootstrap::new(comparisons, config)?;
                let draws = bootstrap.replicates(draw);
                Some((bootstrap, draws))
            }
        };
        Ok(Self { comparisons, num_folds, config, scores, thresholds, bootstrap })
    }

    /// The comparisons, in the order of the protocol.
    pub fn comparisons(&self) -> &'a Comparisons {
        self.comparisons
    }

    /// The scores, sorted.
    pub fn scores(&self) -> &Scores {
        &self.scores
    }

    /// Returns all metrics. `unmasked` are the comparisons of the same people without masks, possibly `self`, whose
    /// thresholds [`SettingResult::at_unmasked_fmr`] uses.
    ///
    /// # Errors
    /// When there are more folds than comparisons.
    pub fn compute(&self, unmasked: Option<&Self>) -> Result<SettingResult> {
        let (accuracy, tar_at_far) = self.over_folds()?;
        let bootstrap = self.bootstrap.as_ref();
        let metrics = |draws: &[Option<Draw>]| draws.iter().map(|d| d.map(|d| d.metrics)).collect::<Vec<_>>();
        Ok(SettingResult {
            metrics: self.scores.metrics(),
            intervals: bootstrap.map(|(bootstrap, draws)| bootstrap.intervals(&metrics(draws))),
            bootstrap: bootstrap.map(|(bootstrap, _)| bootstrap.describe()),
            accuracy,
            tar_at_far,
            at_fmr: self.at(self),
            at_unmasked_fmr: unmasked.map_or_else(Vec::new, |unmasked| self.at(unmasked)),
        })
    }

    /// LFW's accuracy and TAR, if there are folds.
    fn over_folds(&self) -> Result<(Option<FoldAccuracy>, Option<FoldTar>)> {
        let (scores, is_same) = (self.comparisons.scores(), self.comparisons.is_same());
        // LFW's squared L2 is computed from cosines; a score outside [-1, 1] is not one.
        if self.num_folds < 2 || scores.iter().any(|s| s.abs() > 1.0 + 1e-6) {
            return Ok((None, None));
        }
        let distances: Vec<f64> = scores.iter().map(|&c| squared_l2(c)).collect();
        let pairs = FoldedPairs::new(&distances, is_same, self.num_folds)?;
        let mut accuracy = pairs.accuracy(&|_| 1);
        let mut tar = pairs.tar_at_far(1e-3, &|_| 1).ok();
        let Some((bootstrap, _)) = &self.bootstrap else { return Ok((Some(accuracy), tar)) };
        let replicate = |k: usize| {
            let weights = bootstrap.weights(k);
            let weight = |i: usize| weights[i] as usize;
            let tar = tar.as_ref().and_then(|tar| pairs.tar_at_far(tar.far_target, &weight).ok());
            Some([Some(pairs.accuracy(&weight).mean), tar.map(|tar| tar.tar_mean)])
        };
        let means = self.config.replicates_of(replicate);
        let interval = |figure: usize| self.config.interval(means.iter().map(|means| means.and_then(|m| m[figure])));
        accuracy.interval = interval(0);
        if let Some(tar) = &mut tar {
            tar.interval = interval(1);
        }
        Ok((Some(accuracy), tar))
    }

    /// Error rates of these comparisons at the thresholds chosen on `other`.
    fn at(&self, other: &Self) -> Vec<AtFmr> {
        let is_own = std::ptr::eq(self, other);
        let drawn = self.drawn(other);
        let interval = |target: usize, rate: usize| {
            let values = drawn.iter().map(|rates| rates.and_then(|rates| Some(rates[target]?[rate])));
            self.config.interval(values)
        };
        let at = |(target, fmr_target): (usize, f64)| {
            let threshold = other.thresholds[target];
            AtFmr {
                fmr_target,
                threshold,
                fmr: threshold.map(|t| self.scores.fmr_at_threshold(t)),
                fnmr: threshold.map(|t| self.scores.fnmr_at_threshold(t)),
                fmr_interval: if is_own { None } else { interval(target, 0) },
                fnmr_interval: interval(target, 1),
            }
        };
        FMR_TARGETS.into_iter().enumerate().map(at).collect()
    }

    /// Rates of every replicate at the thresholds that the same replicate has on `other`.
    fn drawn(&self, other: &Self) -> Vec<Option<Rates>> {
        let (Some((bootstrap, own)), Some((_, chosen))) = (&self.bootstrap, &other.bootstrap) else {
            return Vec::new();
        };
        if std::ptr::eq(self, other) {
            return own.iter().map(|draw| draw.map(|draw| draw.rates)).collect();
        }
        let at = |k: usize, replicate: &Replicate| chosen[k].map(|draw| rates(replicate, &draw.thresholds));
        bootstrap.replicates(at).into_iter().map(Option::flatten).collect()
    }
}

fn rates(replicate: &Replicate, thresholds: &[Option<f64>; NUM_TARGETS]) -> Rates {
    thresholds.map(|t| t.map(|t| [replicate.fmr_at_threshold(t), replicate.fnmr_at_threshold(t)]))
}

impl SettingResult {
    /// Returns the error rates at the threshold for this FMR on unmasked comparisons; `None` if it was not measured.
    pub fn at_unmasked(&self, fmr_target: f64) -> Option<&AtFmr> {
        self.at_unmasked_fmr.iter().find(|at| at.fmr_target == fmr_target && at.threshold.is_some())
    }
}
