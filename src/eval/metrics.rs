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

use super::class::{Class, Distinct, Sorted};
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
    let (g_mean, i_mean) = (mean(genuine), mean(impostor));
    let variance = variance(genuine, g_mean) + variance(impostor, i_mean);
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
    let (total, mut accepted) = (impostor.num(), 0);
    let mut rejected = Distinct::new(impostor.descending()).filter(|(_, num)| {
        accepted += num;
        ratio(accepted, total) > fmr
    });
    rejected.next().expect("all scores are a share of 1, which is above fmr").0.next_up()
}

/// EER and its threshold. Walks up the distinct scores and compares counts as integers, so that a point on the diagonal
/// is recognised exactly.
fn equal_error(genuine: &impl Class, impostor: &impl Class) -> (f64, f64) {
    let (num_genuine, num_impostor) = (genuine.num(), impostor.num());
    // FNMR - FMR in units of 1 / (num_genuine * num_impostor), with `below_*` scores under the threshold.
    let difference = |below_genuine: u64, below_impostor: u64| {
        i128::from(below_genuine) * i128::from(num_impostor)
            - i128::from(num_impostor - below_impostor) * i128::from(num_genuine)
    };
    let (mut genuine, mut impostor) = (Distinct::new(genuine.ascending()), Distinct::new(impostor.ascending()));
    let (mut below_genuine, mut below_impostor) = (0, 0);
    loop {
        // Thresholds up to `low` have the counts so far; those above it, up to the next score, have the new counts.
        let low = next_score(&mut genuine, &mut impostor);
        let before = difference(below_genuine, below_impostor);
        let fmr_before = ratio(num_impostor - below_impostor, num_impostor);
        below_genuine += genuine.take_score(low);
        below_impostor += impostor.take_score(low);
        let after = difference(below_genuine, below_impostor);
        if after < 0 {
            continue; // Terminates: with every score below the threshold FNMR is 1 and FMR 0.
        }
        let fmr = ratio(num_impostor - below_impostor, num_impostor);
        let high = next_score(&mut genuine, &mut impostor);
        if after == 0 {
            let middle = f64::midpoint(low, high);
            return (fmr, if middle > low { middle } else { high });
        }
        let weight = before.unsigned_abs() as f64 / (after - before) as f64;
        let threshold = if high.is_finite() { low * (1.0 - weight) + high * weight } else { low };
        return (fmr_before + weight * (fmr - fmr_before), threshold);
    }
}

/// Lowest remaining score of the two classes; infinity if none is left.
fn next_score<A, B>(a: &mut Distinct<A>, b: &mut Distinct<B>) -> f64
where
    A: Iterator<Item = (f64, u64)>,
    B: Iterator<Item = (f64, u64)>,
{
    a.peek().unwrap_or(f64::INFINITY).min(b.peek().unwrap_or(f64::INFINITY))
}

/// The Mann-Whitney statistic as a share, counted in integers.
fn auc(genuine: &impl Class, impostor: &impl Class) -> f64 {
    let mut others = Distinct::new(impostor.ascending());
    let (mut below, mut twice_wins) = (0, 0u128);
    for (score, num) in Distinct::new(genuine.ascending()) {
        while let Some(lower) = others.peek().filter(|&other| other < score) {
            below += others.take_score(lower);
        }
        let equal = others.take_score(score);
        twice_wins += u128::from(num) * (2 * u128::from(below) + u128::from(equal));
        below += equal;
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

fn mean(class: &impl Class) -> f64 {
    class.ascending().map(|(score, num)| num as f64 * score).sum::<f64>() / class.num() as f64
}

/// Population variance; exactly zero when all scores are equal, whatever the rounding of `mean`.
fn variance(class: &impl Class, mean: f64) -> f64 {
    let end = |score: Option<(f64, u64)>| score.map(|(score, _)| score);
    if end(class.ascending().next()) == end(class.descending().next()) {
        return 0.0;
    }
    class.ascending().map(|(score, num)| num as f64 * (score - mean).powi(2)).sum::<f64>() / class.num() as f64
}
