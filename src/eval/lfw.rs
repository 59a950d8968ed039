//! The ten-fold verification protocol of Labeled Faces in the Wild, as face recognition papers report it.
//!
//! The pairs, in their published order, are cut into contiguous folds. For every fold a threshold is chosen on all the
//! others and applied to it. The folds, the grids of thresholds and the interpolation are those of insightface's
//! `verification.py` (`calculate_roc`, `calculate_val`), so figures compare with published ones; a pair is "same" when
//! its squared L2 distance is below the threshold.

use std::ops::Range;

use serde::Serialize;

use crate::error::{Error, Result};

/// Thresholds of the accuracy: `0, 0.01 .. 3.99`, on squared L2 distance.
const ACCURACY_GRID: Grid = Grid { step: 0.01, len: 400 };

/// Thresholds of TAR at FAR: `0, 0.001 .. 3.999`, on squared L2 distance.
const TAR_GRID: Grid = Grid { step: 0.001, len: 4000 };

/// Verification accuracy over the folds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FoldAccuracy {
    /// Mean of `accuracies`, in `[0, 1]`.
    pub mean: f64,
    /// Population standard deviation of `accuracies`.
    pub std: f64,
    /// Share of pairs of each fold that are classified rightly.
    pub accuracies: Vec<f64>,
    /// The squared L2 threshold used on each fold: the lowest of those most accurate on the other folds.
    pub thresholds: Vec<f64>,
}

/// True accept rate at a false accept rate over the folds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FoldTar {
    /// The false accept rate aimed at.
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
    /// The squared L2 threshold used on each fold; 0 where no threshold below 4 reaches `far_target` on the others.
    pub thresholds: Vec<f64>,
}

/// Squared L2 distance of two unit vectors with this cosine, in `[0, 4]`: `2 - 2 cos`, never negative by rounding.
pub fn squared_l2(cosine: f64) -> f64 {
    (2.0 - 2.0 * cosine).max(0.0)
}

/// Accuracy with the threshold of each fold chosen on the others (insightface, `calculate_roc`).
///
/// - `distances`: squared L2, not negative, in the order of the protocol's pairs
/// - `is_same`: whether each pair shows one person
/// - `num_folds`: 10 in the protocol; the first `len % num_folds` folds are one pair longer
///
/// # Errors
/// [`Error::Evaluation`] when the lengths differ, a distance is negative or not finite, or there are not
/// `2 <= num_folds <= pairs`.
pub fn fold_accuracy(distances: &[f64], is_same: &[bool], num_folds: usize) -> Result<FoldAccuracy> {
    let folds = fold_ranges(distances, is_same, num_folds)?;
    let curves: Vec<_> = folds.iter().map(|f| ACCURACY_GRID.accepted(f, distances, is_same)).collect();
    let total = ACCURACY_GRID.accepted(&(0..distances.len()), distances, is_same);
    let (mut accuracies, mut thresholds) = (Vec::new(), Vec::new());
    for (test, fold) in curves.iter().zip(&folds) {
        let train = total.without(test);
        let mut best = 0;
        for i in 1..ACCURACY_GRID.len {
            if train.num_right(i) > train.num_right(best) {
                best = i;
            }
        }
        accuracies.push(test.num_right(best) as f64 / fold.len() as f64);
        thresholds.push(ACCURACY_GRID.threshold(best));
    }
    let (mean, std) = mean_and_std(&accuracies);
    Ok(FoldAccuracy { mean, std, accuracies, thresholds })
}

/// TAR and FAR with the threshold of each fold interpolated on the others (insightface, `calculate_val`).
///
/// `far_target` is in `(0, 1)`, 1e-3 in the protocol; the other arguments are those of [`fold_accuracy`]. Where
/// thresholds in a row have exactly the target FAR the highest of them is taken, as SciPy's spline did.
///
/// # Errors
/// [`Error::Evaluation`] as [`fold_accuracy`], when `far_target` is out of range, and when a fold, or all others
/// together, lacks "same" or "different" pairs.
pub fn fold_tar_at_far(distances: &[f64], is_same: &[bool], num_folds: usize, far_target: f64) -> Result<FoldTar> {
    if !(far_target > 0.0 && far_target < 1.0) {
        return Err(Error::Evaluation(format!("expected a FAR target between 0 and 1, found {far_target}")));
    }
    let folds = fold_ranges(distances, is_same, num_folds)?;
    let total = TAR_GRID.accepted(&(0..distances.len()), distances, is_same);
    let mut result = FoldTar {
        far_target,
        tar_mean: 0.0,
        tar_std: 0.0,
        far_mean: 0.0,
        tars: vec![],
        fars: vec![],
        thresholds: vec![],
    };
    for (index, fold) in folds.iter().enumerate() {
        let test = TAR_GRID.accepted(fold, distances, is_same);
        let train = total.without(&test);
        if test.num_same == 0 || test.num_different == 0 || train.num_different == 0 {
            let (same, different) = (test.num_same, test.num_different);
            let what = format!(
                "fold {index} of {num_folds}: TAR at FAR needs same and different pairs in it and different pairs in \
                 the others, found {same} same and {different} different in it and {} different in the others",
                train.num_different
            );
            return Err(Error::Evaluation(what));
        }
        let threshold = train.threshold_at_far(far_target);
        let accepted = |class: bool| {
            let pairs = fold.clone().filter(|&i| is_same[i] == class);
            pairs.filter(|&i| distances[i] < threshold).count() as f64
        };
        result.tars.push(accepted(true) / test.num_same as f64);
        result.fars.push(accepted(false) / test.num_different as f64);
        result.thresholds.push(threshold);
    }
    (result.tar_mean, result.tar_std) = mean_and_std(&result.tars);
    result.far_mean = mean_and_std(&result.fars).0;
    Ok(result)
}

/// Thresholds `0, step, 2 step ..`, the values of `numpy.arange`.
struct Grid {
    step: f64,
    len: usize,
}

/// How many pairs each threshold of a grid accepts.
struct Accepted {
    step: f64,
    same: Vec<usize>,
    different: Vec<usize>,
    num_same: usize,
    num_different: usize,
}

impl Grid {
    /// A product, not a running sum: 0.01 is not a binary fraction and the sum drifts.
    fn threshold(&self, index: usize) -> f64 {
        index as f64 * self.step
    }

    /// Counts the pairs of a range, each at the lowest threshold above its distance, then sums up.
    fn accepted(&self, range: &Range<usize>, distances: &[f64], is_same: &[bool]) -> Accepted {
        let thresholds: Vec<f64> = (0..self.len).map(|i| self.threshold(i)).collect();
        let (mut same, mut different) = (vec![0; self.len], vec![0; self.len]);
        let (mut num_same, mut num_different) = (0, 0);
        for i in range.clone() {
            let first = thresholds.partition_point(|&t| t <= distances[i]);
            let (counts, total) =
                if is_same[i] { (&mut same, &mut num_same) } else { (&mut different, &mut num_different) };
            *total += 1;
            if let Some(count) = counts.get_mut(first) {
                *count += 1;
            }
        }
        for counts in [&mut same, &mut different] {
            let mut sum = 0;
            for count in counts.iter_mut() {
                sum += *count;
                *count = sum;
            }
        }
        Accepted { step: self.step, same, different, num_same, num_different }
    }
}

impl Accepted {
    /// The counts of all pairs but those of a fold.
    fn without(&self, fold: &Self) -> Self {
        let minus = |a: &[usize], b: &[usize]| a.iter().zip(b).map(|(a, b)| a - b).collect();
        Self {
            step: self.step,
            same: minus(&self.same, &fold.same),
            different: minus(&self.different, &fold.different),
            num_same: self.num_same - fold.num_same,
            num_different: self.num_different - fold.num_different,
        }
    }

    /// Number of pairs classified rightly at threshold `index`.
    fn num_right(&self, index: usize) -> usize {
        self.same[index] + self.num_different - self.different[index]
    }

    /// The threshold at a FAR, on the straight line between the two thresholds around it; 0 when none reaches it.
    fn threshold_at_far(&self, target: f64) -> f64 {
        let far = |i: usize| self.different[i] as f64 / self.num_different as f64;
        let last = self.different.len() - 1;
        let above = (0..=last).find(|&i| far(i) > target);
        match above {
            // FAR is 0 at threshold 0 and the target is positive, so there is a threshold below.
            Some(i) => {
                let (low, high) = (far(i - 1), far(i));
                let weight = 1.0 / (high - low);
                (i - 1) as f64 * self.step * (weight * (high - target))
                    + i as f64 * self.step * (weight * (target - low))
            }
            None if far(last) == target => last as f64 * self.step,
            None => 0.0,
        }
    }
}

/// Checks the input and cuts it as scikit-learn's `KFold` without shuffling does.
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
        return Err(Error::Evaluation(format!("expected 2 folds to one per pair ({len}), found {num_folds} folds")));
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
