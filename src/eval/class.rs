//! Scores of one class, genuine or impostor, with or without integer weights.

use std::sync::Arc;

use rayon::slice::ParallelSliceMut;

use super::units::weight;
use crate::error::{Error, Result};

/// Number of scores whose weights are added up once for every replicate.
const BLOCK: usize = 64;

/// Scores of one class in order, with weights; a weight counts as that many equal scores.
pub(super) trait Class {
    /// The scores, ascending, among them those of weight 0.
    fn scores(&self) -> &[f64];

    /// Total weight of the `place` lowest scores.
    fn num_before(&self, place: usize) -> u64;

    /// Mean and population variance, which is exactly zero when all scores are equal.
    fn moments(&self) -> (f64, f64);

    /// Total weight.
    fn num(&self) -> u64 {
        self.num_before(self.scores().len())
    }

    /// Total weight of the scores below `threshold`.
    fn num_below(&self, threshold: f64) -> u64 {
        self.num_before(self.scores().partition_point(|&s| s < threshold))
    }

    /// Total weight of the scores up to `score`.
    fn num_up_to(&self, score: f64) -> u64 {
        self.num_before(self.scores().partition_point(|&s| s <= score))
    }

    /// Lowest score above `score` whose weight is not 0; infinity if there is none.
    fn next_above(&self, score: f64) -> f64 {
        let from = self.scores().partition_point(|&s| s <= score);
        let (before, above) = (self.num_before(from), &self.scores()[from..]);
        let place = (0..above.len()).find(|place| self.num_before(from + place + 1) > before);
        place.map_or(f64::INFINITY, |place| above[place])
    }
}

/// Returns the first place at or after `from` at which `is_before` fails, for scores of which it holds up to some place.
/// Takes logarithmic time in the distance.
pub(super) fn advance(scores: &[f64], from: usize, is_before: impl Fn(f64) -> bool) -> usize {
    let (mut low, mut step) = (from, 1);
    while low + step <= scores.len() && is_before(scores[low + step - 1]) {
        low += step;
        step *= 2;
    }
    let high = (low + step).min(scores.len());
    low + scores[low..high].partition_point(|&score| is_before(score))
}

/// Ascending scores of weight one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sorted(Vec<f64>);

impl Sorted {
    /// Checks and sorts `scores`; `class` names them in errors.
    pub fn new(class: &str, mut scores: Vec<f64>) -> Result<Self> {
        if scores.is_empty() {
            return Err(Error::Evaluation(format!("expected at least one {class} score, found none")));
        }
        if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
            return Err(Error::Evaluation(format!("{class} score {i}: expected a finite number, found {}", scores[i])));
        }
        scores.par_sort_unstable_by(f64::total_cmp);
        Ok(Self(scores))
    }
}

impl Class for Sorted {
    fn scores(&self) -> &[f64] {
        &self.0
    }

    fn num_before(&self, place: usize) -> u64 {
        place as u64
    }

    fn moments(&self) -> (f64, f64) {
        let num = self.0.len() as f64;
        let mean = self.0.iter().sum::<f64>() / num;
        if self.0.first() == self.0.last() {
            return (mean, 0.0);
        }
        (mean, self.0.iter().map(|score| (score - mean).powi(2)).sum::<f64>() / num)
    }
}

/// Ascending scores, each with the two units that determine its weight in a replicate.
#[derive(Debug)]
pub(super) struct Ordered {
    scores: Vec<f64>,
    units: Vec<[u32; 2]>,
    mean: f64,
}

impl Ordered {
    /// Sorts scores with their units.
    pub fn new(mut scored: Vec<(f64, [u32; 2])>) -> Self {
        scored.par_sort_by(|a, b| a.0.total_cmp(&b.0));
        let (scores, units): (Vec<f64>, Vec<[u32; 2]>) = scored.into_iter().unzip();
        let mean = scores.iter().sum::<f64>() / scores.len().max(1) as f64;
        Self { scores, units, mean }
    }
}

/// Ascending scores with the weights of one replicate.
#[derive(Debug)]
pub(super) struct Weighted<'a> {
    ordered: &'a Ordered,
    /// How often each unit was drawn.
    drawn: Arc<[u32]>,
    /// Total weight before each block of scores, and of all.
    before: Vec<u64>,
    moments: (f64, f64),
}

impl<'a> Weighted<'a> {
    /// Weighs the scores by how often each unit was drawn; `None` if no score has a weight.
    pub fn new(ordered: &'a Ordered, drawn: &Arc<[u32]>) -> Option<Self> {
        // One pass over the scores: moments about the mean of all of them lose no digits. Counts are sums of whole
        // numbers below 2^53, which f64 adds exactly, and without a conversion for each score.
        let times: Vec<f64> = drawn.iter().map(|times| f64::from(*times)).collect();
        let (mut num, mut first, mut second) = (0, 0.0, 0.0);
        let mut before = Vec::with_capacity(ordered.scores.len() / BLOCK + 2);
        before.push(0);
        for (scores, units) in ordered.scores.chunks(BLOCK).zip(ordered.units.chunks(BLOCK)) {
            let mut sums = (0.0, 0.0, 0.0);
            for (score, units) in scores.iter().zip(units) {
                let (weight, from_mean) = (weight(*units, &times), score - ordered.mean);
                sums = (sums.0 + weight, sums.1 + weight * from_mean, sums.2 + weight * from_mean * from_mean);
            }
            (num, first, second) = (num + sums.0 as u64, first + sums.1, second + sums.2);
            before.push(num);
        }
        if num == 0 {
            return None;
        }
        let mut weighted = Self { ordered, drawn: drawn.clone(), before, moments: (0.0, 0.0) };
        let (first, second) = (first / num as f64, second / num as f64);
        let is_constant = weighted.next_above(weighted.next_above(f64::NEG_INFINITY)).is_infinite();
        let variance = if is_constant { 0.0 } else { (second - first * first).max(0.0) };
        weighted.moments = (ordered.mean + first, variance);
        Some(weighted)
    }

    fn weight(&self, place: usize) -> u64 {
        u64::from(weight(self.ordered.units[place], &self.drawn))
    }
}

impl Class for Weighted<'_> {
    fn scores(&self) -> &[f64] {
        &self.ordered.scores
    }

    fn num_before(&self, place: usize) -> u64 {
        let block = place / BLOCK;
        self.before[block] + (block * BLOCK..place).map(|place| self.weight(place)).sum::<u64>()
    }

    fn moments(&self) -> (f64, f64) {
        self.moments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_from_any_place_before_them() {
        let scores: Vec<f64> = (0..200).map(|i| f64::from(i / 3)).collect();
        for threshold in [-1.0, 0.0, 0.5, 33.0, 66.0, 67.0] {
            let expected = scores.partition_point(|&s| s < threshold);
            for from in 0..=expected {
                assert_eq!(advance(&scores, from, |s| s < threshold), expected, "{threshold} from {from}");
            }
        }
    }

    #[test]
    fn weights_are_counted_up_to_any_place() {
        let scored = (0..1000u32).map(|i| (f64::from(i / 2), [i % 7, i % 5])).collect();
        let ordered = Ordered::new(scored);
        let drawn: Arc<[u32]> = vec![0, 2, 1, 0, 3, 0, 1].into();
        let weighted = Weighted::new(&ordered, &drawn).unwrap();
        let mut num = 0;
        for (place, units) in ordered.units.iter().enumerate() {
            assert_eq!(weighted.num_before(place), num);
            num += u64::from(weight(*units, &drawn));
        }
        assert_eq!(weighted.num(), num);
        // The scores of weight 0 between two others are passed over.
        assert_eq!((weighted.next_above(f64::NEG_INFINITY), weighted.next_above(499.0)), (0.0, f64::INFINITY));
        assert!(Weighted::new(&ordered, &vec![0; 7].into()).is_none());
    }
}
