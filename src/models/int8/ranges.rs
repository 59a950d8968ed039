//! Ranges of activations, from histograms.

use std::fmt;
use std::str::FromStr;

use candle_core::{Result, bail};

use crate::ops::conv::int8::Affine;

/// Bins on each side of zero.
const HALF: usize = 4096;
/// Shares of a side of the range that the search tries: from all of it in steps down to a fifth.
const SHARES: usize = 33;

/// How the range of an activation is chosen from the values that it had.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Ranges {
    /// The range with the smallest mean squared error.
    #[default]
    Mse,
    /// The range that leaves out the outer parts of the values, half of them on each side.
    Percentile(f64),
    /// All values.
    MinMax,
}

impl FromStr for Ranges {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "mse" => return Ok(Self::Mse),
            "min-max" => return Ok(Self::MinMax),
            _ => {}
        }
        let number = text.strip_prefix("percentile:").and_then(|number| number.parse().ok());
        match number.filter(|percent| (50.0..=100.0).contains(percent)) {
            Some(percent) => Ok(Self::Percentile(percent)),
            None => Err(format!("expected mse, min-max or percentile:X with X of 50 to 100, found {text:?}")),
        }
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mse => f.write_str("mse"),
            Self::Percentile(percent) => write!(f, "percentile:{percent}"),
            Self::MinMax => f.write_str("min-max"),
        }
    }
}

/// How often an activation had which value. The bins grow with the values: by joining neighbours, so that nothing has
/// to be seen twice.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    /// From `-limit` to `limit`.
    bins: Vec<u64>,
    /// A power of two; 0 before the first value that is not 0.
    limit: f64,
    lowest: f32,
    highest: f32,
}

impl Histogram {
    pub fn new() -> Self {
        Self { bins: vec![0; 2 * HALF], limit: 0.0, lowest: f32::INFINITY, highest: f32::NEG_INFINITY }
    }

    /// Counts values.
    ///
    /// # Errors
    /// When one is not finite.
    pub fn add(&mut self, values: &[f32]) -> Result<()> {
        let (mut lowest, mut highest) = (self.lowest, self.highest);
        for value in values {
            if !value.is_finite() {
                bail!("an activation is {value}");
            }
            (lowest, highest) = (lowest.min(*value), highest.max(*value));
        }
        (self.lowest, self.highest) = (lowest, highest);
        let largest = f64::from(highest.max(-lowest));
        if largest > self.limit {
            let limit = largest.log2().ceil().exp2();
            self.widen(limit);
        }
        // Zeros alone are all in the middle.
        let factor = if self.limit > 0.0 { (HALF as f64 / self.limit) as f32 } else { 0.0 };
        for value in values {
            let bin = (value * factor + HALF as f32) as usize;
            self.bins[bin.min(2 * HALF - 1)] += 1;
        }
        Ok(())
    }

    /// Makes the bins wider: up to a limit that is larger by a power of two.
    fn widen(&mut self, limit: f64) {
        let (mut bins, factor) = (vec![0; 2 * HALF], self.limit / limit);
        for (i, count) in self.bins.iter().enumerate().filter(|(_, count)| **count > 0) {
            let centre = (i as f64 + 0.5 - HALF as f64) * factor + HALF as f64;
            bins[(centre as usize).min(2 * HALF - 1)] += count;
        }
        (self.bins, self.limit) = (bins, limit);
    }

    /// Centre of a bin.
    fn value(&self, bin: usize) -> f32 {
        ((bin as f64 + 0.5 - HALF as f64) * (self.limit / HALF as f64)) as f32
    }

    /// Chooses the range.
    ///
    /// # Errors
    /// When nothing was counted.
    pub fn range(&self, ranges: Ranges) -> Result<Affine> {
        let full = Affine::covering(self.lowest, self.highest)?;
        match ranges {
            Ranges::MinMax => Ok(full),
            Ranges::Percentile(percent) => {
                let total: u64 = self.bins.iter().sum();
                let outside = ((1.0 - percent / 100.0) / 2.0 * total as f64) as u64;
                let (mut below, mut above) = (0, 0);
                let low = (0..2 * HALF).find(|bin| {
                    below += self.bins[*bin];
                    below > outside
                });
                let high = (0..2 * HALF).rev().find(|bin| {
                    above += self.bins[*bin];
                    above > outside
                });
                let value = |bin: Option<usize>, other: f32| bin.map_or(other, |bin| self.value(bin));
                let (low, high) = (value(low, self.lowest), value(high, self.highest));
                Affine::covering(low.clamp(self.lowest, self.highest), high.clamp(self.lowest, self.highest))
            }
            Ranges::Mse => {
                let used: Vec<(f32, f64)> = (0..2 * HALF)
                    .filter(|bin| self.bins[*bin] > 0)
                    .map(|bin| (self.value(bin), self.bins[bin] as f64))
                    .collect();
                let shares = || (0..SHARES).map(|i| 1.0 - 0.8 * i as f32 / (SHARES - 1) as f32);
                let mut best = (f64::INFINITY, full);
                let (low, high) = (self.lowest.min(0.0), self.highest.max(0.0));
                for of_low in shares().take(if low < 0.0 { SHARES } else { 1 }) {
                    for of_high in shares().take(if high > 0.0 { SHARES } else { 1 }) {
                        let range = Affine::covering(low * of_low, high * of_high)?;
                        let error = error(&used, range);
                        if error < best.0 {
                            best = (error, range);
                        }
                    }
                }
                Ok(best.1)
            }
        }
    }
}

/// Sum of squared errors of values with their counts.
fn error(values: &[(f32, f64)], range: Affine) -> f64 {
    let (factor, zero) = (range.scale.recip(), f32::from(range.zero));
    let mut sum = 0.0;
    for (value, count) in values {
        let steps = (value * factor).round_ties_even().max(-zero).min(255.0 - zero);
        let error = f64::from(value - steps * range.scale);
        sum += count * error * error;
    }
    sum
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::nn::standard_normal;

    #[test]
    fn a_few_outliers_do_not_widen_the_range() -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut histogram = Histogram::new();
        for i in 0..20 {
            let mut values: Vec<f32> = (0..10_000).map(|_| standard_normal(&mut rng) as f32).collect();
            values[0] = if i == 7 { 14.0 } else { 0.0 };
            histogram.add(&values)?;
        }
        let highest = |range: Affine| range.value(255);
        assert!((highest(histogram.range(Ranges::MinMax)?) - 14.0).abs() < 0.1);
        for ranges in [Ranges::Mse, Ranges::Percentile(99.99)] {
            let range = histogram.range(ranges)?;
            assert!((3.0..12.0).contains(&highest(range)) && (-6.0..-3.0).contains(&range.value(0)), "{range:?}");
        }
        assert_eq!(histogram.bins.iter().sum::<u64>(), 200_000);
        Ok(())
    }

    #[test]
    fn the_chosen_range_has_the_smallest_error_of_those_tried() -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let values: Vec<f32> = (0..50_000).map(|_| standard_normal(&mut rng).powi(3) as f32).collect();
        let mut histogram = Histogram::new();
        histogram.add(&values)?;
        let of = |range: Affine| -> f64 {
            values.iter().map(|value| f64::from(value - range.value(range.quantise(*value))).powi(2)).sum()
        };
        let chosen = of(histogram.range(Ranges::Mse)?);
        for ranges in [Ranges::MinMax, Ranges::Percentile(99.0), Ranges::Percentile(99.9), Ranges::Percentile(99.99)] {
            assert!(chosen < 1.01 * of(histogram.range(ranges)?), "{ranges}");
        }
        Ok(())
    }

    #[test]
    fn values_of_one_sign_and_zeros_have_ranges() -> Result<()> {
        for (values, lowest, highest) in [([1.0, 2.0], 0.0, 2.0), ([-3.0, -1.0], -3.0, 0.0), ([0.0, 0.0], 0.0, 255.0)] {
            for ranges in [Ranges::Mse, Ranges::Percentile(100.0), Ranges::MinMax] {
                let mut histogram = Histogram::new();
                histogram.add(&values)?;
                let range = histogram.range(ranges)?;
                let found = (range.value(0), range.value(255));
                assert!((found.0 - lowest).abs() < 0.02 && (found.1 - highest).abs() < 0.02, "{ranges}: {range:?}");
            }
        }
        assert!(Histogram::new().range(Ranges::Mse).is_err() && Histogram::new().add(&[f32::NAN]).is_err());
        Ok(())
    }

    #[test]
    fn ranges_have_names() {
        for (text, ranges) in
            [("mse", Ranges::Mse), ("min-max", Ranges::MinMax), ("percentile:99.9", Ranges::Percentile(99.9))]
        {
            assert_eq!(text.parse(), Ok(ranges));
            assert_eq!(ranges.to_string(), text);
        }
        for text in ["", "percentile", "percentile:101", "percentile:NaN", "max"] {
            assert!(text.parse::<Ranges>().is_err(), "{text}");
        }
    }
}
