//! Axes of DET plots: error rates on the scale of normal quantiles, on which two normal classes yield a straight line
//! (Martin et al., Eurospeech 1997).

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use statrs::distribution::{ContinuousCDF, Normal};

/// Rates with a tick.
const MARKS: [f64; 14] = [1e-6, 1e-5, 1e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8];

/// Error rates from `low` to `high`, both in (0, 1).
#[derive(Clone, Debug)]
pub(super) struct ProbitAxis {
    low: f64,
    high: f64,
}

impl ProbitAxis {
    /// Axis from `low` to `high`.
    ///
    /// # Panics
    /// Unless `0 < low < high < 1`.
    pub fn new(low: f64, high: f64) -> Self {
        assert!(0.0 < low && low < high && high < 1.0, "an axis from {low} to {high}");
        Self { low, high }
    }
}

impl Ranged for ProbitAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let [low, high, at] = [self.low, self.high, value.clamp(self.low, self.high)].map(probit);
        limit.0 + (f64::from(limit.1 - limit.0) * (at - low) / (high - low)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        MARKS.into_iter().filter(|mark| (self.low..=self.high).contains(mark)).collect()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

/// Formats a rate in per cent, without trailing zeros.
pub(super) fn per_cent(rate: f64) -> String {
    let text = format!("{:.4}", 100.0 * rate);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn probit(rate: f64) -> f64 {
    Normal::standard().inverse_cdf(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_is_in_the_middle_and_the_tails_are_as_far_as_the_normal_distribution_says() {
        assert!((probit(0.975) - 1.959_963_985).abs() < 1e-6);
        let axis = ProbitAxis::new(0.01, 0.99);
        assert_eq!([0.01, 0.5, 0.99, 0.0, 1.0].map(|v| axis.map(&v, (100, 300))), [100, 200, 300, 100, 300]);
        // One standard deviation of the 2.326 to each side.
        assert_eq!(axis.map(&0.841_344_746, (100, 300)), 243);
        assert_eq!([1e-6, 0.002, 0.05, 0.2].map(per_cent), ["0.0001", "0.2", "5", "20"]);
    }
}
