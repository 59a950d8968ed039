//! Points of ROC and DET curves, and score histograms.

use serde::Serialize;

use super::class::Class;
use super::metrics::{Scores, ratio};

/// Relative change of an error rate below which two operating points look the same.
const STEP: f64 = 0.02;
/// Number of bins of a histogram.
const NUM_BINS: usize = 100;

/// Error rates at one threshold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OperatingPoint {
    /// Lowest score that is accepted.
    pub threshold: f64,
    /// False match rate.
    pub fmr: f64,
    /// False non-match rate.
    pub fnmr: f64,
}

/// Histogram of the scores over bins of equal width.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Histogram {
    /// Lower edge of the first bin.
    pub low: f64,
    /// Upper edge of the last bin.
    pub high: f64,
    /// Share of the genuine scores in each bin.
    pub genuine: Vec<f64>,
    /// Share of the impostor scores in each bin.
    pub impostor: Vec<f64>,
}

impl Scores {
    /// Calls `each(score, [impostor, genuine])` for every distinct score, highest first, with the numbers of scores at
    /// or above it.
    fn for_each_point(&self, mut each: impl FnMut(f64, [u64; 2])) {
        let mut left = [self.impostor(), self.genuine()];
        let num = left.map(<[f64]>::len);
        while let Some(score) = left.into_iter().filter_map(|scores| scores.last().copied()).reduce(f64::max) {
            for scores in &mut left {
                while let Some((_, lower)) = scores.split_last().filter(|(last, _)| **last == score) {
                    *scores = lower;
                }
            }
            each(score, [0, 1].map(|class| (num[class] - left[class].len()) as u64));
        }
    }

    /// Returns exact points of the ROC and DET curves, from the highest threshold to the lowest. A point within 2 % of
    /// the one before in both rates, relative to the rate or its complement, is left out; the last point is kept.
    pub fn operating_points(&self) -> Vec<OperatingPoint> {
        let (num_impostor, num_genuine) = (self.impostor.num(), self.genuine.num());
        let mut points: Vec<OperatingPoint> = Vec::new();
        let mut last = None;
        self.for_each_point(|threshold, [false_matches, matches]| {
            let fmr = ratio(false_matches, num_impostor);
            let point = OperatingPoint { threshold, fmr, fnmr: ratio(num_genuine - matches, num_genuine) };
            let is_new = points.last().is_none_or(|before| {
                let differs = |a: f64, b: f64| (a - b).abs() > STEP * a.max(b).min(1.0 - a.min(b));
                differs(before.fmr, point.fmr) || differs(before.fnmr, point.fnmr)
            });
            if is_new {
                points.push(point);
            }
            last = Some(point);
        });
        points.extend(last.filter(|last| points.last() != Some(last)));
        points
    }

    /// Returns `[TAR, FAR]` as insightface's IJB scripts read them off for a target FAR: at the corner of the ROC curve
    /// with the closest FAR, even if that exceeds the target. Only corners count, because scikit-learn's `roc_curve`
    /// drops collinear points.
    pub fn tar_at_closest_far(&self, far_target: f64) -> [f64; 2] {
        let (num_impostor, num_genuine) = (self.impostor().len() as f64, self.genuine().len() as f64);
        // Start of the curve, where nothing is accepted. Of corners at equal distance the last one wins.
        let mut best = (far_target, [0.0; 2]);
        let mut take = |[f, t]: [u64; 2]| {
            let far = f as f64 / num_impostor;
            let distance = (far - far_target).abs();
            if distance <= best.0 {
                best = (distance, [t as f64 / num_genuine, far]);
            }
        };
        let mut window: [Option<[u64; 2]>; 2] = [None; 2];
        self.for_each_point(|_, point| {
            match window {
                [Some(a), Some(b)] if (0..2).any(|k| a[k] + point[k] != 2 * b[k]) => take(b),
                [None, Some(first)] => take(first),
                _ => {}
            }
            window = [window[1], Some(point)];
        });
        window[1].map(&mut take);
        best.1
    }

    /// Returns the histogram of both classes over the range of all scores.
    pub fn histogram(&self) -> Histogram {
        let ends = [self.genuine(), self.impostor()].map(|scores| [scores[0], scores[scores.len() - 1]]);
        let (low, high) = (ends[0][0].min(ends[1][0]), ends[0][1].max(ends[1][1]));
        let width = ((high - low) / NUM_BINS as f64).max(f64::MIN_POSITIVE);
        let shares = |scores: &[f64]| {
            let mut below = 0;
            let counts = (1..=NUM_BINS).map(|bin| {
                let end = if bin == NUM_BINS { f64::INFINITY } else { low + bin as f64 * width };
                let until = scores.partition_point(|&s| s < end);
                (until - std::mem::replace(&mut below, until)) as f64 / scores.len() as f64
            });
            counts.collect()
        };
        Histogram { low, high, genuine: shares(self.genuine()), impostor: shares(self.impostor()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_goes_from_no_acceptance_to_all_and_is_exact() {
        let value = |i: usize, shift: f64| (i as f64 * 0.618).fract() + shift;
        let genuine: Vec<f64> = (0..3000).map(|i| value(i, 0.5)).collect();
        let impostor: Vec<f64> = (0..5000).map(|i| value(i, 0.0)).collect();
        let scores = Scores::new(genuine, impostor).unwrap();
        let points = scores.operating_points();
        assert!((100..2000).contains(&points.len()), "{}", points.len());
        for pair in points.windows(2) {
            assert!(
                pair[0].threshold > pair[1].threshold && pair[0].fmr <= pair[1].fmr && pair[0].fnmr >= pair[1].fnmr
            );
        }
        for point in &points {
            assert_eq!(point.fmr, scores.fmr_at_threshold(point.threshold));
            assert_eq!(point.fnmr, scores.fnmr_at_threshold(point.threshold));
        }
        assert_eq!(points[points.len() - 1].fmr, 1.0);
        let histogram = scores.histogram();
        for shares in [&histogram.genuine, &histogram.impostor] {
            assert_eq!(shares.len(), NUM_BINS);
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn scores_that_are_all_equal_have_one_point() {
        let scores = Scores::new(vec![0.5; 3], vec![0.5; 2]).unwrap();
        assert_eq!(scores.operating_points(), [OperatingPoint { threshold: 0.5, fmr: 1.0, fnmr: 0.0 }]);
        assert_eq!(scores.histogram().genuine.iter().sum::<f64>(), 1.0);
        assert_eq!(scores.tar_at_closest_far(0.9), [1.0, 1.0]);
        assert_eq!(scores.tar_at_closest_far(0.1), [0.0, 0.0]);
    }
}
