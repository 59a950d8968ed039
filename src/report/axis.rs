//! Plot axes with ticks at round numbers, for any range of values.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};

/// Approximate number of ticks per axis.
const NUM_MARKS: usize = 6;
/// Larger values are drawn at the end of the axis, so that the difference of two values is finite.
const LARGEST: f64 = 1e300;
/// Smaller magnitudes count as zero: the distance between ticks would underflow.
const SMALLEST: f64 = 1e-290;

/// Scale of an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scale {
    Linear,
    Log,
}

/// Numeric axis from `low` to `high`.
#[derive(Clone, Debug)]
pub(super) struct NumberAxis {
    low: f64,
    high: f64,
    scale: Scale,
    /// Smallest distance between ticks of a linear axis.
    least: f64,
}

impl NumberAxis {
    /// Linear axis from `low` to `high`, a little wider if the two are nearly equal.
    pub fn linear(low: f64, high: f64) -> Self {
        let [low, high] = [low, high].map(|v| v.clamp(-LARGEST, LARGEST));
        let size = low.abs().max(high.abs());
        let room = match size {
            _ if size < SMALLEST => 1.0,
            _ if high - low < 1e-4 * size => 0.05 * size,
            _ => 0.0,
        };
        Self { low: low - room, high: high + room, scale: Scale::Linear, least: 0.0 }
    }

    /// Axis of training steps from 0 to `last`, with ticks at whole steps only.
    pub fn steps(last: usize) -> Self {
        Self { low: 0.0, high: last.max(1) as f64, scale: Scale::Linear, least: 1.0 }
    }

    /// Logarithmic axis.
    ///
    /// # Panics
    /// Unless `0 < low < high`.
    pub fn log(low: f64, high: f64) -> Self {
        assert!(0.0 < low && low < high && high.is_finite(), "a logarithmic axis from {low} to {high}");
        Self { low, high, scale: Scale::Log, least: 0.0 }
    }

    /// Position of a value, from 0 at the low end to 1 at the high end.
    fn share(&self, value: f64) -> f64 {
        let value = value.clamp(self.low, self.high);
        match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value.ln() - self.low.ln()) / (self.high.ln() - self.low.ln()),
        }
    }

    fn marks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let least = self.least.max((self.high - self.low) / NUM_MARKS as f64);
                let decade = 10f64.powi(least.log10().floor() as i32);
                let step = [1.0, 2.0, 5.0].map(|m| m * decade).into_iter().find(|step| *step >= least);
                let step = step.unwrap_or(10.0 * decade);
                // Ticks are whole multiples of the step, so that rounding adds none and zero is exact.
                let [first, last] = [(self.low / step).ceil(), (self.high / step).floor()];
                (0..=2 * NUM_MARKS).map(|i| first + i as f64).take_while(|i| *i <= last).map(|i| i * step).collect()
            }
            Scale::Log => {
                let [first, last] = [self.low.log10().floor() as i32, self.high.log10().ceil() as i32];
                let stride = (last - first) as usize / NUM_MARKS + 1;
                let between: &[f64] = if last - first < 4 { &[1.0, 2.0, 5.0] } else { &[1.0] };
                let marks = (first..=last).step_by(stride).flat_map(|k| between.iter().map(move |m| m * 10f64.powi(k)));
                marks.filter(|mark| (self.low..=self.high).contains(mark)).collect()
            }
        }
    }
}

impl Ranged for NumberAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        limit.0 + (f64::from(limit.1 - limit.0) * self.share(*value)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _hint: Hint) -> Vec<f64> {
        self.marks()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

/// Formats a number in a few digits, without trailing zeros.
pub(super) fn number(value: f64) -> String {
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    let size = value.abs();
    if value == 0.0 || (1e-4..1e7).contains(&size) {
        let decimals = 5 - size.max(1e-4).log10().floor() as i32;
        return trimmed(&format!("{value:.*}", decimals.max(0) as usize));
    }
    let text = format!("{value:.3e}");
    text.split_once('e').map_or(text.clone(), |(digits, power)| format!("{}e{power}", trimmed(digits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: &NumberAxis) -> Vec<String> {
        axis.marks().into_iter().map(number).collect()
    }

    #[test]
    fn marks_are_round_and_few() {
        assert_eq!(texts(&NumberAxis::linear(0.0, 1.0)), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(texts(&NumberAxis::linear(-0.11, 0.31)), ["-0.1", "0", "0.1", "0.2", "0.3"]);
        assert_eq!(texts(&NumberAxis::steps(3)), ["0", "1", "2", "3"]);
        assert_eq!(texts(&NumberAxis::steps(0)), ["0", "1"]);
        assert_eq!(texts(&NumberAxis::steps(1_000_000)), ["0", "200000", "400000", "600000", "800000", "1000000"]);
        assert_eq!(texts(&NumberAxis::log(0.15, 1.6)), ["0.2", "0.5", "1"]);
        assert_eq!(texts(&NumberAxis::log(1e-5, 0.2)), ["1e-5", "0.0001", "0.001", "0.01", "0.1"]);
        for [low, high] in [[0.0, 0.0], [3.0, 3.0], [1e30, 1e30], [-1e308, 1e308], [0.0, 1e-310], [1.0, 1.0 + 1e-12]] {
            let axis = NumberAxis::linear(low, high);
            let (marks, range) = (axis.marks(), axis.range());
            assert!((2..=NUM_MARKS + 1).contains(&marks.len()), "{marks:?} from {low} to {high}");
            assert!(marks.iter().all(|m| m.is_finite() && *m >= range.start && *m <= range.end), "{marks:?}");
        }
        for [low, high] in [[1e-300, 1e300], [1e-320, 1.0], [0.9, 9.9], [1.0, 1e8]] {
            let marks = NumberAxis::log(low, high).marks();
            assert!((2..=9).contains(&marks.len()), "{marks:?} from {low} to {high}");
        }
    }

    #[test]
    fn a_value_is_where_it_should_be_and_never_outside() {
        let axis = NumberAxis::linear(0.0, 10.0);
        assert_eq!([-1.0, 0.0, 2.5, 10.0, 1e308].map(|v| axis.map(&v, (100, 300))), [100, 100, 150, 300, 300]);
        let axis = NumberAxis::log(0.01, 100.0);
        assert_eq!([1e-9, 0.1, 1.0, 100.0].map(|v| axis.map(&v, (400, 0))), [400, 300, 200, 0]);
        assert_eq!(
            [0.0, 0.25, 1234.5, -2e30, 1.5e-7, 0.1 + 0.2].map(number),
            ["0", "0.25", "1234.5", "-2e30", "1.5e-7", "0.3"]
        );
    }
}
