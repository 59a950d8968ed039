//! The ten-fold verification protocol of Labeled Faces in the Wild, as face recognition papers report it.
//!
//! The pairs, in their published order, are cut into contiguous folds. For every fold a threshold is chosen on the
//! other folds and applied to it. Folds, threshold grids and interpolation are those of insightface's `verification.py`
//! (`calculate_roc`, `calculate_val`), so results are comparable with published ones. A pair is "same" when its squared
//! L2 distance is below the threshold.

use std::ops::Range;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::bootstrap::Interval;
use crate::error::{Error, Result};

/// Thresholds of the accuracy: `0, 0.01 .. 3.99`, on squared L2 distance.
const ACCURACY_GRID: Grid = Grid { step: 0.01, len: 400 };

/// Thresholds of TAR at FAR: `0, 0.001 .. 3.999`, on squared L2 distance.
const TAR_GRID: Grid = Grid { step: 0.001, len: 4000 };

/// Verification accuracy over the folds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FoldAccuracy {
    /// Mean of `accuracies`, in `[0, 1]`.
    pub mean: f64,
    /// Population standard deviation of `accuracies`.
    pub std: f64,
    /// Share of pairs of each fold that are classified correctly.
    pub accuracies: Vec<f64>,
    /// Squared L2 threshold of each fold: the lowest of those that are most accurate on the other folds.
    pub thresholds: Vec<f64>,
    /// Interval of `mean`, with thresholds chosen anew in every replicate; `None` without a bootstrap.
    pub interval: Option<Interval>,
}

/// True accept rate at a false accept rate over the folds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FoldTar {
    /// Target false accept rate.
    pub far_target: f64,
    /// Mean of `tars`, in `[0, 1]`.
    pub tar_mean: f64,
    /// Population standard deviation of `tars`.
    pub tar_std: f64,
    /// Mean of `fars`, in `[0, 1]`.
    pub far_mean: f64,
    /// Share of the "same" pairs of each fold that are accepted.
    pub tars: Vec<f64>,
    /// Share of the "different" pairs of each fold that are accepted.
    pub fars: Vec<f64>,
    /// Squared L2 threshold of each fold; 0 where no threshold below 4 reaches `far_target` on the other folds.
    pub thresholds: Vec<f64>,
    /// Interval of `tar_mean`, with thresholds chosen anew in every replicate; `None` without a bootstrap.
    pub interval: Option<Interval>,
}

/// Squared L2 distance of two unit vectors with this cosine, in `[0, 4]`: `2 - 2 cos`, clamped at 0 against rounding.
pub fn squared_l2(cosine: f64) -> f64 {
    (2.0 - 2.0 * cosine).max(0.0)
}

/// Accuracy with the threshold of each fold chosen on the other folds (insightface, `calculate_roc`).
///
/// - `distances`: squared L2, not negative, in the order of the protocol's pairs
/// - `is_same`: whether each pair shows one person
/// - `num_folds`: 10 in the protocol; the first `len % num_folds` folds are one pair longer
///
/// # Errors
/// [`Error::Evaluation`] when the lengths differ, a distance is negative or not finite, or `num_folds` is below 2 or
/// above the number of pairs.
pub fn fold_accuracy(distances: &[f64], is_same: &[bool], num_folds: usize) -> Result<FoldAccuracy> {
    Ok(FoldedPairs::new(distances, is_same, num_folds)?.accuracy(&|_| 1))
}

/// TAR and FAR with the threshold of each fold interpolated on the other folds (insightface, `calculate_val`).
///
/// `far_target` is in `(0, 1)`, 1e-3 in the protocol; the other arguments are those of [`fold_accuracy`]. If several
/// consecutive thresholds have exactly the target FAR, the highest of them is used, as SciPy's spline did.
///
/// # Errors
/// [`Error::Evaluation`] as for [`fold_accuracy`], when `far_target` is out of range, and when a fold lacks "same" or
/// "different" pairs or the other folds lack "different" pairs.
pub fn fold_tar_at_far(distances: &[f64], is_same: &[bool], num_folds: usize, far_target: f64) -> Result<FoldTar> {
    FoldedPairs::new(distances, is_same, num_folds)?.tar_at_far(far_target, &|_| 1)
}

/// Pairs cut into folds. The methods take a `weight`: how often each pair counts, by its index.
pub(super) struct FoldedPairs<'a> {
    distances: &'a [f64],
    is_same: &'a [bool],
    folds: Vec<Range<usize>>,
    /// For each pair, the first threshold of the grid that accepts it; computed on first use.
    accuracy_bins: OnceLock<Vec<usize>>,
    tar_bins: OnceLock<Vec<usize>>,
}

impl<'a> FoldedPairs<'a> {
    /// Checks the pairs and cuts them into folds, as for [`fold_accuracy`].
    pub fn new(distances: &'a [f64], is_same: &'a [bool], num_folds: usize) -> Result<Self> {
        let folds = fold_ranges(distances, is_same, num_folds)?;
        Ok(Self { distances, is_same, folds, accuracy_bins: OnceLock::new(), tar_bins: OnceLock::new() })
    }

    /// Accuracy, as [`fold_accuracy`]; its mean is NaN if all pairs of a fold have weight 0.
    pub fn accuracy(&self, weight: &impl Fn(usize) -> usize) -> FoldAccuracy {
        let bins = self.accuracy_bins.get_or_init(|| ACCURACY_GRID.bins(self.distances));
        let (curves, total) = ACCURACY_GRID.curves(self, bins, weight);
        let (mut accuracies, mut thresholds) = (Vec::new(), Vec::new());
        for test in &curves {
            let train = Others { total: &total, fold: test };
            let (mut best, mut most) = (0, train.num_right(0));
            for i in 1..ACCURACY_GRID.len {
                let num = train.num_right(i);
                if num > most {
                    (best, most) = (i, num);
                }
            }
            accuracies.push(test.num_right(best) as f64 / (test.num_same + test.num_different) as f64);
            thresholds.push(ACCURACY_GRID.threshold(best));
        }
        let (mean, std) = mean_and_std(&accuracies);
        FoldAccuracy { mean, std, accuracies, thresholds, interval: None }
    }

    /// TAR at FAR, as [`fold_tar_at_far`].
    pub fn tar_at_far(&self, far_target: f64, weight: &impl Fn(usize) -> usize) -> Result<FoldTar> {
        if !(far_target > 0.0 && far_target < 1.0) {
            return Err(Error::Evaluation(format!("expected a FAR target between 0 and 1, found {far_target}")));
        }
        let bins = self.tar_bins.get_or_init(|| TAR_GRID.bins(self.distances));
        let (curves, total) = TAR_GRID.curves(self, bins, weight);
        let (mut tars, mut fars, mut thresholds) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (fold, test)) in self.folds.iter().zip(&curves).enumerate() {
            let train = Others { total: &total, fold: test };
            if test.num_same == 0 || test.num_different == 0 || train.num_different() == 0 {
                let (num_folds, same, different) = (self.folds.len(), test.num_same, test.num_different);
                let what = format!(
                    "fold {index} of {num_folds}: TAR at FAR needs same and different pairs in the fold and \
                     different pairs in the others, found {same} same and {different} different in the fold and {} \
                     different in the others",
                    train.num_different()
                );
                return Err(Error::Evaluation(what));
            }
            let threshold = train.threshold_at_far(far_target);
            let accepted = |class: bool| {
                let pairs = fold.clone().filter(|&i| self.is_same[i] == class && self.distances[i] < threshold);
                pairs.map(weight).sum::<usize>() as f64
            };
            tars.push(accepted(true) / test.num_same as f64);
            fars.push(accepted(false) / test.num_different as f64);
            thresholds.push(threshold);
        }
        let (tar_mean, tar_std) = mean_and_std(&tars);
        let far_mean = mean_and_std(&fars).0;
        Ok(FoldTar { far_target, tar_mean, tar_std, far_mean, tars, fars, thresholds, interval: None })
    }
}

/// Thresholds `0, step, 2 step ..`, with the same values as `numpy.arange`.
struct Grid {
    step: f64,
    len: usize,
}

/// Number of pairs that each threshold of a grid accepts.
struct Accepted {
    step: f64,
    same: Vec<usize>,
    different: Vec<usize>,
    num_same: usize,
    num_different: usize,
}

impl Grid {
    /// Threshold `index`. It is a product, not a running sum: 0.01 is not a binary fraction and the sum would drift.
    fn threshold(&self, index: usize) -> f64 {
        index as f64 * self.step
    }

    /// Index of the lowest threshold above each distance; the length of the grid if there is none.
    fn bins(&self, distances: &[f64]) -> Vec<usize> {
        let thresholds: Vec<f64> = (0..self.len).map(|i| self.threshold(i)).collect();
        distances.iter().map(|&distance| thresholds.partition_point(|&t| t <= distance)).collect()
    }

    /// Numbers of pairs that each threshold accepts, for every fold and for all folds together.
    fn curves(
        &self,
        pairs: &FoldedPairs,
        bins: &[usize],
        weight: &impl Fn(usize) -> usize,
    ) -> (Vec<Accepted>, Accepted) {
        let none = || Accepted {
            step: self.step,
            same: vec![0; self.len],
            different: vec![0; self.len],
            num_same: 0,
            num_different: 0,
        };
        let mut total = none();
        let curve = |fold: &Range<usize>| {
            let mut curve = none();
            for i in fold.clone() {
                let weight = weight(i);
                let (counts, num) = match pairs.is_same[i] {
                    true => (&mut curve.same, &mut curve.num_same),
                    false => (&mut curve.different, &mut curve.num_different),
                };
                *num += weight;
                if let Some(count) = counts.get_mut(bins[i]) {
                    *count += weight;
                }
            }
            for counts in [&mut curve.same, &mut curve.different] {
                let mut sum = 0;
                for count in counts.iter_mut() {
                    sum += *count;
                    *count = sum;
                }
            }
            total.add(&curve);
            curve
        };
        let curves = pairs.folds.iter().map(curve).collect();
        (curves, total)
    }
}

impl Accepted {
    /// Adds the counts of a fold.
    fn add(&mut self, fold: &Self) {
        self.same.iter_mut().zip(&fold.same).for_each(|(a, b)| *a += b);
        self.different.iter_mut().zip(&fold.different).for_each(|(a, b)| *a += b);
        self.num_same += fold.num_same;
        self.num_different += fold.num_different;
    }

    /// Number of pairs classified correctly at threshold `index`.
    fn num_right(&self, index: usize) -> usize {
        self.same[index] + self.num_different - self.different[index]
    }
}

/// Numbers of pairs that each threshold accepts in all folds but one.
struct Others<'a> {
    total: &'a Accepted,
    fold: &'a Accepted,
}

impl Others<'_> {
    /// Number of "different" pairs.
    fn num_different(&self) -> usize {
        self.total.num_different - self.fold.num_different
    }

    /// Number of pairs classified correctly at threshold `index`.
    fn num_right(&self, index: usize) -> usize {
        self.total.num_right(index) - self.fold.num_right(index)
    }

    /// Threshold at the target FAR, interpolated linearly between its two neighbours on the grid; 0 if no threshold
    /// reaches it.
    fn threshold_at_far(&self, target: f64) -> f64 {
        let step = self.total.step;
        let accepted = |i: usize| self.total.different[i] - self.fold.different[i];
        let far = |i: usize| accepted(i) as f64 / self.num_different() as f64;
        let last = self.total.different.len() - 1;
        let above = (0..=last).find(|&i| far(i) > target);
        match above {
            // FAR is 0 at threshold 0 and the target is positive, so `i` is at least 1.
            Some(i) => {
                let (low, high) = (far(i - 1), far(i));
                let weight = 1.0 / (high - low);
                (i - 1) as f64 * step * (weight * (high - target)) + i as f64 * step * (weight * (target - low))
            }
            None if far(last) == target => last as f64 * step,
            None => 0.0,
        }
    }
}

/// Checks the input and returns the folds of scikit-learn's `KFold` without shuffling.
fn fold_ranges(distances: &[f64], is_same: &[bool], num_folds: usize) -> Result<Vec<Range<usize>>> {
    let len = distances.len();
    if len != is_same.len() {
        let what = format!("expected a label for each of {len} distances, found {} labels", is_same.len());
        return Err(Error::Evaluation(what));
    }
    if let Some(i) = distances.iter().position(|d| !(d.is_finite() && *d >= 0.0)) {
        let what = format!("distance {i}: expected a finite number from 0, found {}", distances[i]);
        return Err(Error::Evaluation(what));
    }
    if num_folds < 2 || num_folds > len {
        return Err(Error::Evaluation(format!("expected 2 to {len} folds for {len} pairs, found {num_folds} folds")));
    }
    let mut start = 0;
    let next = |fold| {
        let end = start + len / num_folds + usize::from(fold < len % num_folds);
        std::mem::replace(&mut start, end)..end
    };
    Ok((0..num_folds).map(next).collect())
}

/// Mean and population standard deviation.
fn mean_and_std(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A weight of two equals repeating the pair.
    #[test]
    fn pairs_count_as_often_as_they_would_if_they_were_repeated() {
        let value = |i: usize| (i as f64 * 0.618_034).fract();
        let is_same: Vec<bool> = (0..90).map(|i| i % 2 == 0).collect();
        let distances: Vec<f64> = (0..90).map(|i| value(i) * 1.5 + if is_same[i] { 0.0 } else { 0.9 }).collect();
        let times = |i: usize| [2, 0, 1, 3, 1][i * 7 % 5];
        let weighted = FoldedPairs::new(&distances, &is_same, 3).unwrap();
        let repeated: Vec<usize> = (0..90).flat_map(|i| std::iter::repeat_n(i, times(i))).collect();
        let (d, s): (Vec<f64>, Vec<bool>) = repeated.iter().map(|&i| (distances[i], is_same[i])).unzip();
        let mut expected = FoldedPairs::new(&d, &s, 3).unwrap();
        let ends = [0, 30, 60, 90].map(|end| repeated.partition_point(|&i| i < end));
        expected.folds = ends.windows(2).map(|w| w[0]..w[1]).collect();
        assert_eq!(weighted.accuracy(&times), expected.accuracy(&|_| 1));
        let (found, expected) = (weighted.tar_at_far(0.05, &times), expected.tar_at_far(0.05, &|_| 1));
        assert_eq!(found.unwrap(), expected.unwrap());
        assert!(weighted.accuracy(&|i| usize::from(i < 60)).mean.is_nan());
        assert!(weighted.tar_at_far(0.05, &|i| usize::from(i < 60)).is_err());
    }
}
