//! Exact error rates and separation figures of genuine and impostor scores.
//!
//! Scores are similarities: higher means more alike. At a threshold `t` a pair is accepted when its score is `>= t`:
//!
//! - `FMR(t)`, the false match rate: the share of impostor scores `>= t`
//! - `FNMR(t)`, the false non-match rate: the share of genuine scores `< t`
//!
//! Both only change at a score, so every figure here is found by sorting, in `O(n log n)`, without a grid of
//! thresholds.

use serde::Serialize;

use crate::error::{Error, Result};

/// Genuine and impostor scores, at least one of each, all finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// Ascending.
    genuine: Vec<f64>,
    /// Ascending.
    impostor: Vec<f64>,
}

/// The figures of one set of [`Scores`]; rates are shares in `[0, 1]`, not per cent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Metrics {
    /// Equal error rate: where the straight lines between neighbouring operating points `(FMR, FNMR)` meet
    /// `FMR = FNMR`. An operating point on that diagonal is taken as it is.
    pub eer: f64,
    /// A threshold at `eer`: the middle of the interval of thresholds that give the operating point on the diagonal;
    /// without one, the point between the two neighbouring scores that divides them as `eer` divides the line.
    pub eer_threshold: f64,
    /// Lowest FNMR at FMR <= 1 %. With fewer than 100 impostor scores that is at no false match at all, and says little
    /// about a rate of 1 %.
    pub fmr100: f64,
    /// Lowest FNMR at FMR <= 0.1 %; with fewer than 1000 impostor scores, at no false match at all.
    pub fmr1000: f64,
    /// Fisher discriminant ratio `(g_mean - i_mean)^2 / (var_G + var_I)` with population variances; `None` when both
    /// variances are zero.
    pub fdr: Option<f64>,
    /// Mean genuine score.
    pub g_mean: f64,
    /// Mean impostor score.
    pub i_mean: f64,
    /// Area under the ROC curve: the share of (genuine, impostor) couples with the genuine score higher, ties half.
    pub auc: f64,
    /// Number of genuine scores.
    pub num_genuine: usize,
    /// Number of impostor scores.
    pub num_impostor: usize,
}

impl Scores {
    /// Returns the scores of the two classes, in any order.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when a class is empty or a score is NaN or infinite.
    pub fn new(genuine: Vec<f64>, impostor: Vec<f64>) -> Result<Self> {
        Ok(Self { genuine: sorted("genuine", genuine)?, impostor: sorted("impostor", impostor)? })
    }

    /// Returns the scores of a list of pairs; `is_same[i]` says whether `scores[i]` compares images of one person.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when the lengths differ, and as [`Scores::new`].
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
        &self.genuine
    }

    /// The impostor scores, ascending.
    pub fn impostor(&self) -> &[f64] {
        &self.impostor
    }

    /// `FMR(threshold)`: the share of impostor scores `>= threshold`, in `[0, 1]`.
    pub fn fmr_at_threshold(&self, threshold: f64) -> f64 {
        ratio(self.impostor.len() - count_below(&self.impostor, threshold), self.impostor.len())
    }

    /// `FNMR(threshold)`: the share of genuine scores `< threshold`, in `[0, 1]`.
    ///
    /// With a threshold from [`Scores::threshold_at_fmr`] on unmasked comparisons and the scores of masked ones, this
    /// is the figure of NIST's mask report (Ngan, Grother, Hanaoka, NISTIR 8311).
    pub fn fnmr_at_threshold(&self, threshold: f64) -> f64 {
        ratio(count_below(&self.genuine, threshold), self.genuine.len())
    }

    /// The lowest threshold whose FMR is at most `fmr`: the next `f64` above the highest impostor score that must be
    /// rejected.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when `fmr` is not between 0 and 1 (exclusive), or with fewer than `1 / fmr` impostor
    /// scores: such a rate cannot be measured on them.
    pub fn threshold_at_fmr(&self, fmr: f64) -> Result<f64> {
        if !(fmr > 0.0 && fmr < 1.0) {
            return Err(Error::Evaluation(format!("expected an FMR between 0 and 1, found {fmr}")));
        }
        let total = self.impostor.len();
        if ratio(1, total) > fmr {
            let smallest = ratio(1, total);
            let what = format!("FMR {fmr} cannot be measured on {total} impostor scores: one of them is {smallest}");
            return Err(Error::Evaluation(what));
        }
        Ok(self.lowest_threshold(fmr))
    }

    /// The lowest threshold whose FMR is at most `fmr`, in (0, 1), however few the impostor scores.
    fn lowest_threshold(&self, fmr: f64) -> f64 {
        let total = self.impostor.len();
        // The product can be off by one where fmr * total is a whole number; the quotient, rounded once, cannot.
        let mut accepted = (fmr * total as f64) as usize;
        while ratio(accepted, total) > fmr {
            accepted -= 1;
        }
        while ratio(accepted + 1, total) <= fmr {
            accepted += 1;
        }
        self.impostor[total - 1 - accepted].next_up()
    }

    /// The lowest FNMR at an FMR of at most `fmr`, in `[0, 1]`.
    ///
    /// # Errors
    /// As [`Scores::threshold_at_fmr`].
    pub fn fnmr_at_fmr(&self, fmr: f64) -> Result<f64> {
        Ok(self.fnmr_at_threshold(self.threshold_at_fmr(fmr)?))
    }

    /// All figures of these scores.
    pub fn metrics(&self) -> Metrics {
        let (eer, eer_threshold) = self.equal_error();
        let (g_mean, i_mean) = (mean(&self.genuine), mean(&self.impostor));
        let variance = variance(&self.genuine, g_mean) + variance(&self.impostor, i_mean);
        Metrics {
            eer,
            eer_threshold,
            fmr100: self.fnmr_at_threshold(self.lowest_threshold(0.01)),
            fmr1000: self.fnmr_at_threshold(self.lowest_threshold(0.001)),
            fdr: (variance > 0.0).then(|| (g_mean - i_mean).powi(2) / variance),
            g_mean,
            i_mean,
            auc: self.auc(),
            num_genuine: self.genuine.len(),
            num_impostor: self.impostor.len(),
        }
    }

    /// EER and its threshold, walking up the distinct scores. Counts are compared as integers, so a point on the
    /// diagonal is recognised exactly.
    fn equal_error(&self) -> (f64, f64) {
        let (num_genuine, num_impostor) = (self.genuine.len(), self.impostor.len());
        // FNMR - FMR in units of 1 / (num_genuine * num_impostor), with `below_*` scores under the threshold.
        let difference = |below_genuine: usize, below_impostor: usize| {
            (below_genuine as i128) * (num_impostor as i128)
                - ((num_impostor - below_impostor) as i128) * (num_genuine as i128)
        };
        let (mut below_genuine, mut below_impostor) = (0, 0);
        loop {
            let next_genuine = self.genuine.get(below_genuine).copied().unwrap_or(f64::INFINITY);
            let next_impostor = self.impostor.get(below_impostor).copied().unwrap_or(f64::INFINITY);
            // Thresholds up to `low` give the counts so far, those above it, up to the next score, the new counts.
            let low = next_genuine.min(next_impostor);
            let before = difference(below_genuine, below_impostor);
            let fmr_before = ratio(num_impostor - below_impostor, num_impostor);
            below_genuine += count_equal(&self.genuine[below_genuine..], low);
            below_impostor += count_equal(&self.impostor[below_impostor..], low);
            let after = difference(below_genuine, below_impostor);
            if after < 0 {
                continue; // Ends: with every score below the threshold FNMR is 1 and FMR 0.
            }
            let fmr = ratio(num_impostor - below_impostor, num_impostor);
            let high_genuine = self.genuine.get(below_genuine).copied().unwrap_or(f64::INFINITY);
            let high_impostor = self.impostor.get(below_impostor).copied().unwrap_or(f64::INFINITY);
            let high = high_genuine.min(high_impostor);
            if after == 0 {
                let middle = f64::midpoint(low, high);
                return (fmr, if middle > low { middle } else { high });
            }
            let weight = before.unsigned_abs() as f64 / (after - before) as f64;
            let threshold = if high.is_finite() { low * (1.0 - weight) + high * weight } else { low };
            return (fmr_before + weight * (fmr - fmr_before), threshold);
        }
    }

    /// The Mann-Whitney statistic as a share, counted in integers.
    fn auc(&self) -> f64 {
        let (mut below, mut up_to, mut twice_wins) = (0, 0, 0u128);
        for &score in &self.genuine {
            while self.impostor.get(below).is_some_and(|&s| s < score) {
                below += 1;
            }
            up_to = up_to.max(below);
            while self.impostor.get(up_to).is_some_and(|&s| s <= score) {
                up_to += 1;
            }
            twice_wins += (below + up_to) as u128;
        }
        twice_wins as f64 / (2 * self.genuine.len() as u128 * self.impostor.len() as u128) as f64
    }
}

/// The scores of one class, checked, ascending.
fn sorted(class: &str, mut scores: Vec<f64>) -> Result<Vec<f64>> {
    if scores.is_empty() {
        return Err(Error::Evaluation(format!("expected at least one {class} score, found none")));
    }
    if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
        return Err(Error::Evaluation(format!("{class} score {i}: expected a finite number, found {}", scores[i])));
    }
    scores.sort_unstable_by(f64::total_cmp);
    Ok(scores)
}

/// Number of ascending scores below `threshold`.
fn count_below(scores: &[f64], threshold: f64) -> usize {
    scores.partition_point(|&s| s < threshold)
}

/// Number of scores at the front that equal `value`.
fn count_equal(scores: &[f64], value: f64) -> usize {
    scores.iter().take_while(|&&s| s == value).count()
}

fn ratio(part: usize, total: usize) -> f64 {
    part as f64 / total as f64
}

fn mean(scores: &[f64]) -> f64 {
    scores.iter().sum::<f64>() / scores.len() as f64
}

/// Population variance; exactly zero when all scores are equal, whatever the rounding of `mean`.
fn variance(ascending: &[f64], mean: f64) -> f64 {
    if ascending.first() == ascending.last() {
        return 0.0;
    }
    ascending.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / ascending.len() as f64
}
