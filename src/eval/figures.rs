//! The figures of one set of comparisons, each with the interval that it may well lie in.

use serde::Serialize;

use super::bootstrap::{Bootstrap, BootstrapConfig, Interval, MetricIntervals};
use super::comparisons::Comparisons;
use super::lfw::{FoldAccuracy, FoldTar, fold_accuracy, fold_tar_at_far, squared_l2};
use super::metrics::{Metrics, Scores};
use crate::error::Result;

/// False match rates at which systems are compared: those of IJB-B and IJB-C and of NIST's reports.
pub const FMR_TARGETS: [f64; 6] = [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6];

/// What happens at the threshold of a stated false match rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AtFmr {
    /// The false match rate that the threshold was chosen for.
    pub fmr_target: f64,
    /// The lowest threshold that keeps it; `None`, as all that follows, with fewer than `1 / fmr_target` impostor scores: then the
    /// rate cannot be measured.
    pub threshold: Option<f64>,
    /// The share of impostor scores from that threshold on.
    pub fmr: Option<f64>,
    /// The share of genuine scores below it; the true accept rate is the rest.
    pub fnmr: Option<f64>,
    /// Of `fmr`, threshold and all; `None` where the threshold was chosen on the same comparisons and keeps it by construction.
    pub fmr_interval: Option<Interval>,
    /// Of `fnmr`, threshold and all.
    pub fnmr_interval: Option<Interval>,
}

/// The figures of one set of comparisons.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SettingResult {
    /// Error rates and score statistics over all pairs.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// How sure they are; absent without a bootstrap.
    pub intervals: Option<MetricIntervals>,
    /// What was drawn for the intervals, for people.
    pub bootstrap: Option<String>,
    /// LFW's k-fold accuracy; absent where there are no folds.
    pub accuracy: Option<FoldAccuracy>,
    /// LFW's k-fold TAR at FAR 1e-3; absent where a fold has not both kinds of pairs.
    pub tar_at_far: Option<FoldTar>,
    /// At thresholds chosen on the same comparisons.
    pub at_fmr: Vec<AtFmr>,
    /// At thresholds chosen on unmasked comparisons, as in NIST's mask reports (Ngan, Grother, Hanaoka, NISTIR 8311); empty where
    /// there are none.
    pub at_unmasked_fmr: Vec<AtFmr>,
}

/// What [`SettingResult`] is computed of.
#[derive(Clone, Copy, Debug)]
pub struct Figures<'a> {
    /// The comparisons.
    pub comparisons: &'a Comparisons,
    /// Those of the same people without masks, for [`SettingResult::at_unmasked_fmr`].
    pub unmasked: Option<&'a Comparisons>,
    /// Folds of equal size that the comparisons fall into; fewer than two for none.
    pub num_folds: usize,
    /// How intervals are made.
    pub bootstrap: &'a BootstrapConfig,
}

impl Figures<'_> {
    /// Computes everything.
    ///
    /// # Errors
    /// When there is no genuine or no impostor comparison, or more folds than comparisons.
    pub fn compute(&self) -> Result<SettingResult> {
        let (scores, is_same) = (self.comparisons.scores(), self.comparisons.is_same());
        let own = Chosen::new(self.comparisons, self.bootstrap)?;
        let unmasked = self.unmasked.map(|unmasked| Chosen::new(unmasked, self.bootstrap)).transpose()?;
        let distances: Vec<f64> = scores.iter().map(|&c| squared_l2(c)).collect();
        // Squared L2 is that of unit vectors: other scores are no cosines.
        let has_folds = self.num_folds > 1 && scores.iter().all(|s| s.abs() <= 1.0 + 1e-6);
        let accuracy = has_folds.then(|| fold_accuracy(&distances, is_same, self.num_folds)).transpose()?;
        let tar_at_far = has_folds.then(|| fold_tar_at_far(&distances, is_same, self.num_folds, 1e-3).ok()).flatten();
        Ok(SettingResult {
            metrics: own.scores.metrics(),
            intervals: own.bootstrap.as_ref().map(Bootstrap::metrics),
            bootstrap: own.bootstrap.as_ref().map(Bootstrap::describe),
            accuracy,
            tar_at_far,
            at_fmr: own.at(&own),
            at_unmasked_fmr: match &unmasked {
                Some(unmasked) if unmasked.scores == own.scores => own.at(&own),
                Some(unmasked) => own.at(unmasked),
                None => Vec::new(),
            },
        })
    }
}

impl SettingResult {
    /// Returns what happens at the threshold of this FMR on unmasked comparisons, if that was measured.
    pub fn at_unmasked(&self, fmr_target: f64) -> Option<&AtFmr> {
        self.at_unmasked_fmr.iter().find(|at| at.fmr_target == fmr_target && at.threshold.is_some())
    }

    /// Returns what happens at the threshold of this FMR, if that was measured.
    pub fn at(&self, fmr_target: f64) -> Option<&AtFmr> {
        self.at_fmr.iter().find(|at| at.fmr_target == fmr_target && at.threshold.is_some())
    }
}

/// Comparisons that thresholds are chosen on, or applied to.
struct Chosen {
    scores: Scores,
    bootstrap: Option<Bootstrap>,
}

impl Chosen {
    fn new(comparisons: &Comparisons, config: &BootstrapConfig) -> Result<Self> {
        Ok(Self {
            scores: Scores::from_labelled(comparisons.scores(), comparisons.is_same())?,
            bootstrap: (config.replicates > 0).then(|| Bootstrap::new(comparisons, config)).transpose()?,
        })
    }

    /// What happens here at the thresholds chosen on `other`.
    fn at(&self, other: &Self) -> Vec<AtFmr> {
        let thresholds = FMR_TARGETS.map(|fmr| other.scores.threshold_at_fmr(fmr).ok());
        let drawn = self.drawn(other, &thresholds).unwrap_or_default();
        let interval = |target: usize, rate: usize| {
            let values = drawn.iter().map(|rates| rates.and_then(|rates| Some(rates[target]?[rate])));
            self.bootstrap.as_ref()?.interval(values)
        };
        let at = |(target, fmr_target): (usize, f64)| {
            let threshold = thresholds[target];
            AtFmr {
                fmr_target,
                threshold,
                fmr: threshold.map(|t| self.scores.fmr_at_threshold(t)),
                fnmr: threshold.map(|t| self.scores.fnmr_at_threshold(t)),
                fmr_interval: (!std::ptr::eq(self, other)).then(|| interval(target, 0)).flatten(),
                fnmr_interval: interval(target, 1),
            }
        };
        FMR_TARGETS.into_iter().enumerate().map(at).collect()
    }

    /// FMR and FNMR of every replicate at the thresholds that the same people give on `other`.
    fn drawn(&self, other: &Self, measured: &[Option<f64>; NUM_TARGETS]) -> Option<Vec<Option<DrawnRates>>> {
        let chosen = other.bootstrap.as_ref()?.replicates(|_, replicate| {
            std::array::from_fn(|i| measured[i].map(|_| replicate.threshold_at_fmr(FMR_TARGETS[i])))
        });
        let rates = self.bootstrap.as_ref()?.replicates(|k, replicate| {
            let rates = |t| [replicate.fmr_at_threshold(t), replicate.fnmr_at_threshold(t)];
            chosen[k].map(|thresholds: [Option<f64>; NUM_TARGETS]| thresholds.map(|t| t.map(rates)))
        });
        Some(rates.into_iter().map(Option::flatten).collect())
    }
}

const NUM_TARGETS: usize = FMR_TARGETS.len();

/// FMR and FNMR at every target of one replicate.
type DrawnRates = [Option<[f64; 2]>; NUM_TARGETS];
