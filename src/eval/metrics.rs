//! Exact error rates and separation measures of genuine and impostor scores.
//!
//! Scores are similarities: higher means more alike. At a threshold `t` a pair is accepted when its score is `>= t`:
//!
//! - `FMR(t)`, the false match rate: the share of impostor scores `>= t`
//! - `FNMR(t)`, the false non-match rate: the share of genuine scores `< t`
//!
//! Both only change at a score, so every metric here is computed by sorting, in `O(n log n)`, without a grid of
//! thresholds.

use serde::{Deserialize, Serialize};

use super::class::{Class, Sorted, advance};
use crate::error::{Error, Result};

/// Genuine and impostor scores, at least one of each, all finite.
///
/// ```
/// use maskinv::eval::Scores;
///
/// # fn main() -> maskinv::Result<()> {
/// let scores = Scores::new(vec![0.9, 0.7, 0.2], vec![0.5, 0.1, -0.2])?;
/// assert!((scores.metrics().eer - 1.0 / 3.0).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    pub(super) genuine: Sorted,
    pub(super) impostor: Sorted,
}

/// Metrics of one set of [`Scores`]; rates are in `[0, 1]`, not per cent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Metrics {
    /// Equal error rate: where the straight lines between neighbouring operating points `(FMR, FNMR)` meet the diagonal
    /// `FMR = FNMR`. An operating point on the diagonal needs no interpolation.
    pub eer: f64,
    /// Threshold of `eer`: the middle of the interval of thresholds of the operating point on the diagonal. Without
    /// such a point it is interpolated between the two neighbouring scores with the same weight as `eer`.
    pub eer_threshold: f64,
    /// Lowest FNMR at FMR <= 1 %. With fewer than 100 impostor scores this is the FNMR at zero false matches, which
    /// says little about an FMR of 1 %.
    pub fmr100: f64,
    /// Lowest FNMR at FMR <= 0.1 %; with fewer than 1000 impostor scores, the FNMR at zero false matches.
    pub fmr1000: f64,
    /// Fisher discriminant ratio `(g_mean - i_mean)^2 / (var_G + var_I)` with population variances; `None` when both
    /// variances are zero.
    pub fdr: Option<f64>,
    /// Mean genuine score.
    pub g_mean: f64,
    /// Mean impostor score.
    pub i_mean: f64,
    /// Area under the ROC curve: the share of (genuine, impostor) score pairs in which the genuine score is higher;
    /// ties count half.
    pub auc: f64,
    /// Number of genuine scores.
    pub num_genuine: usize,
    /// Number of impostor scores.
    pub num_impostor: usize,
}

impl Scores {
    /// Returns the sorted scores of the two classes, given in any order.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when a class is empty or a score is NaN or infinite.
    pub fn new(genuine: Vec<f64>, impostor: Vec<f64>) -> Result<Self> {
        Ok(Self { genuine: Sorted::new("genuine", genuine)?, impostor: Sorted::new("impostor", impostor)? })
    }

    /// Returns the scores of a list of pairs; `is_same[i]` says whether `scores[i]` compares images of one person.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when the lengths differ, and as for [`Scores::new`].
    pub fn from_labelled(scores: &[f64], is_same: &[bool]) -> Result<Self> {
        if scores.len() != is_same.len() {
            let what = format!("expected a label for each of {} scores, found {} labels", scores.len(), is_same.len());
            return Err(Error::Evaluation(what));
        }
        let of = |class: bool| scores.iter().zip(is_same).filter(|p| *p.1 == class).map(|p| *p.0).collect();
        Self::new(of(true), of(false))
    }

    /// The genuine scores, ascending.
    pub fn genuine(&self) -> &[f64] {
        self.genuine.scores()
    }

    /// The impostor scores, ascending.
    pub fn impostor(&self) -> &[f64] {
        self.impostor.scores()
    }

    /// `FMR(threshold)`: the share of impostor scores `>= threshold`, in `[0, 1]`.
    pub fn fmr_at_threshold(&self, threshold: f64) -> f64 {
        share_from(&self.impostor, threshold)
    }

    /// `FNMR(threshold)`: the share of genuine scores `< threshold`, in `[0, 1]`.
    ///
    /// With a threshold from [`Scores::threshold_at_fmr`] on unmasked comparisons and the scores of masked ones, this
    /// is the FNMR of NIST's mask report (Ngan, Grother, Hanaoka, NISTIR 8311).
    pub fn fnmr_at_threshold(&self, threshold: f64) -> f64 {
        share_below(&self.genuine, threshold)
    }

    /// Lowest threshold with an FMR of at most `fmr`: the next `f64` above the highest impostor score that must be
    /// rejected.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when `fmr` is not between 0 and 1 (exclusive), or there are fewer than `1 / fmr`
    /// impostor scores, on which the rate cannot be measured.
    pub fn threshold_at_fmr(&self, fmr: f64) -> Result<f64> {
        if !(fmr > 0.0 && fmr < 1.0) {
            return Err(Error::Evaluation(format!("expected an FMR between 0 and 1, found {fmr}")));
        }
        let total = self.impostor.num();
        if ratio(1, total) > fmr {
            let smallest = ratio(1, total);
            let what = format!("FMR {fmr} cannot be measured on {total} impostor scores: each counts {smallest}");
            return Err(Error::Evaluation(what));
        }
        Ok(lowest_threshold(&self.impostor, fmr))
    }

    /// Lowest FNMR at an FMR of at most `fmr`, in `[0, 1]`.
    ///
    /// # Errors
    /// As for [`Scores::threshold_at_fmr`].
    pub fn fnmr_at_fmr(&self, fmr: f64) -> Result<f64> {
        Ok(self.fnmr_at_threshold(self.threshold_at_fmr(fmr)?))
    }

    /// All metrics of these scores.
    pub fn metrics(&self) -> Metrics {
        metrics(&self.genuine, &self.impostor)
    }
}

/// All metrics of the scores of two classes.
pub(super) fn metrics(genuine: &impl Class, impostor: &impl Class) -> Metrics {
    let (eer, eer_threshold) = equal_error(genuine, impostor);
    let ((g_mean, g_variance), (i_mean, i_variance)) = (genuine.moments(), impostor.moments());
    let variance = g_variance + i_variance;
    Metrics {
        eer,
        eer_threshold,
        fmr100: share_below(genuine, lowest_threshold(impostor, 0.01)),
        fmr1000: share_below(genuine, lowest_threshold(impostor, 0.001)),
        fdr: (variance > 0.0).then(|| (g_mean - i_mean).powi(2) / variance),
        g_mean,
        i_mean,
        auc: auc(genuine, impostor),
        num_genuine: genuine.num() as usize,
        num_impostor: impostor.num() as usize,
    }
}

/// Lowest threshold with an FMR of at most `fmr`, in (0, 1), however few impostor scores there are.
pub(super) fn lowest_threshold(impostor: &impl Class, fmr: f64) -> f64 {
    let (total, scores) = (impostor.num(), impostor.scores());
    // All scores are a share of 1, which is above `fmr`, so that the lowest one is rejected.
    let rejected = scores.partition_point(|&score| ratio(total - impostor.num_below(score), total) > fmr);
    scores[rejected - 1].next_up()
}

/// EER and its threshold. Compares counts as integers, so that a point on the diagonal is recognised exactly.
fn equal_error(genuine: &impl Class, impostor: &impl Class) -> (f64, f64) {
    let (num_genuine, num_impostor) = (genuine.num(), impostor.num());
    // FNMR - FMR in units of 1 / (num_genuine * num_impostor), with `below_*` scores under the threshold.
    let difference = |below_genuine: u64, below_impostor: u64| {
        i128::from(below_genuine) * i128::from(num_impostor)
            - i128::from(num_impostor - below_impostor) * i128::from(num_genuine)
    };
    let after = |score: f64| difference(genuine.num_up_to(score), impostor.num_up_to(score));
    // It grows with the score, from below 0 to above: with every score below the threshold FNMR is 1 and FMR 0.
    let first = |scores: &[f64]| scores.get(scores.partition_point(|&score| after(score) < 0)).copied();
    let firsts = [first(genuine.scores()), first(impostor.scores())];
    let low = firsts.into_iter().flatten().fold(f64::INFINITY, f64::min);
    // Thresholds up to `low` have the counts of the scores below it; those above, up to the next score, have new counts.
    let fmr_at = |below: u64| ratio(num_impostor - below, num_impostor);
    let (before, fmr_before) =
        (difference(genuine.num_below(low), impostor.num_below(low)), fmr_at(impostor.num_below(low)));
    let (after, fmr) = (after(low), fmr_at(impostor.num_up_to(low)));
    let high = genuine.next_above(low).min(impostor.next_above(low));
    if after == 0 {
        let middle = f64::midpoint(low, high);
        return (fmr, if middle > low { middle } else { high });
    }
    let weight = before.unsigned_abs() as f64 / (after - before) as f64;
    let threshold = if high.is_finite() { low * (1.0 - weight) + high * weight } else { low };
    (fmr_before + weight * (fmr - fmr_before), threshold)
}

/// The Mann-Whitney statistic as a share, counted in integers.
fn auc(genuine: &impl Class, impostor: &impl Class) -> f64 {
    let (scores, others) = (genuine.scores(), impostor.scores());
    let (mut place, mut other, mut twice_wins) = (0, 0, 0u128);
    while let Some(&score) = scores.get(place) {
        let next = advance(scores, place, |s| s <= score);
        let num = genuine.num_before(next) - genuine.num_before(place);
        place = next;
        let below = advance(others, other, |s| s < score);
        other = advance(others, below, |s| s <= score);
        // Impostor scores below count twice, equal ones once.
        twice_wins +=
            u128::from(num) * (u128::from(impostor.num_before(below)) + u128::from(impostor.num_before(other)));
    }
    twice_wins as f64 / (2 * u128::from(genuine.num()) * u128::from(impostor.num())) as f64
}

/// Share of scores below `threshold`.
pub(super) fn share_below(class: &impl Class, threshold: f64) -> f64 {
    ratio(class.num_below(threshold), class.num())
}

/// Share of scores at or above `threshold`.
pub(super) fn share_from(class: &impl Class, threshold: f64) -> f64 {
    ratio(class.num() - class.num_below(threshold), class.num())
}

pub(super) fn ratio(part: u64, total: u64) -> f64 {
    part as f64 / total as f64
}
