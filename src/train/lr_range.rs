//! The learning-rate range test (Smith, WACV 2017, section 3.3).

use serde::Serialize;

use super::arm::Arm;
use super::experiment::Experiment;
use super::given_weights::Origin;
use super::outcome::Event;
use super::start::Centres;
use crate::error::{Error, Result};

/// Decay of the moving average that smooths the loss.
const SMOOTHING: f64 = 0.95;
/// The test stops when the smoothed loss exceeds its minimum by this factor.
const DIVERGED: f64 = 3.0;
/// First steps, which the suggestions ignore: their moving average covers too few losses.
const NUM_FIRST: usize = 5;

/// One step of the range test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LrPoint {
    /// The learning rate as a value of `optim.lr`, that is, for a batch of `optim.lr_batch` images.
    pub lr: f64,
    /// The loss before the step.
    pub loss: f64,
    /// Moving average of the loss, with bias correction.
    pub smoothed: f64,
}

/// Result of a learning-rate range test: losses under a learning rate that grows with every step.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LrRange {
    /// The arm.
    pub arm: Arm,
    /// The steps before the loss diverged or was not finite.
    pub points: Vec<LrPoint>,
    /// Whether the test stopped because the loss diverged or was not finite, before the highest learning rate.
    pub has_diverged: bool,
    /// Learning rate at which the smoothed loss falls fastest against the logarithm of the learning rate.
    pub steepest: Option<f64>,
    /// A tenth of the learning rate with the lowest smoothed loss.
    pub tenth_of_least: Option<f64>,
}

impl LrRange {
    fn new(arm: Arm, points: Vec<LrPoint>, has_diverged: bool) -> Self {
        let later = &points[NUM_FIRST.min(points.len())..];
        let least = later.iter().min_by(|a, b| a.smoothed.total_cmp(&b.smoothed));
        // Beyond its minimum the loss may fall only briefly.
        let falling: Vec<&LrPoint> = later.iter().take_while(|p| least.is_none_or(|least| p.lr <= least.lr)).collect();
        let slope = |w: &[&LrPoint]| (w[1].smoothed - w[0].smoothed) / (w[1].lr / w[0].lr).ln();
        let steepest = falling.windows(2).min_by(|a, b| slope(a).total_cmp(&slope(b))).map(|w| w[1].lr);
        let tenth_of_least = least.map(|least| least.lr / 10.0);
        Self { arm, points, has_diverged, steepest, tenth_of_least }
    }
}

impl Experiment {
    /// Runs the range test: trains an arm for `num_steps` steps at learning rates from `range[0]` to `range[1]`, spaced
    /// geometrically, and discards the weights. Its batches and margins are those of the arm's first steps.
    ///
    /// # Errors
    /// The errors of a training; when the arm needs a teacher or weights that are not given; when the range is empty or
    /// there are too few steps.
    pub fn find_lr(&self, arm: Arm, range: [f64; 2], num_steps: usize, on: &mut dyn FnMut(Event)) -> Result<LrRange> {
        let [low, high] = range;
        if !(low > 0.0 && low < high && high.is_finite()) || num_steps < 2 * NUM_FIRST {
            let what = format!("expected rising rates and {} steps or more, found {low} to {high}", 2 * NUM_FIRST);
            return Err(Error::Config(format!("{what} and {num_steps} steps")));
        }
        self.check_ranks()?;
        let given = self.given();
        given.check(self.config(), &[arm], self.train_set(arm).num_classes())?;
        let start = match given.origin(self.config(), arm) {
            None => None,
            Some(Origin::Given) => given.start.as_ref().map(|start| (Origin::Given, start)),
            Some(origin) => given.teacher.as_ref().map(|teacher| (origin, teacher)),
        };
        let mut steps =
            self.steps(&self.arm_start(arm, given.teacher.as_ref(), start), None, &mut Centres::new(), on)?;
        let mut points: Vec<LrPoint> = Vec::new();
        let (mut mean, mut least) = (0.0, f64::INFINITY);
        let scale = self.config().base_lr() / self.config().optim.lr;
        for i in 0..num_steps {
            let lr = low * (high / low).powf(i as f64 / (num_steps - 1) as f64);
            steps.step_of_any_epoch(Some(lr * scale))?;
            // On a GPU a step does not wait for the loss.
            let record = steps.record(steps.trainer.report()?);
            on(Event::Step(&record));
            let report = record.report;
            mean = SMOOTHING * mean + (1.0 - SMOOTHING) * report.loss;
            let smoothed = mean / (1.0 - SMOOTHING.powi(i as i32 + 1));
            if !smoothed.is_finite() || (i > NUM_FIRST && smoothed > DIVERGED * least) {
                return Ok(LrRange::new(arm, points, true));
            }
            least = least.min(smoothed);
            points.push(LrPoint { lr, loss: report.loss, smoothed });
        }
        Ok(LrRange::new(arm, points, false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_follows_from_where_the_loss_falls_and_is_least() {
        // A loss that falls between 1e-3 and 1e-1, fastest at 1e-2, and then rises.
        let point = |i: usize| {
            let x = -5.0 + i as f64 * 0.05;
            let smoothed = 10.0 - 4.0 / (1.0 + (-6.0 * (x + 2.0)).exp()) + 30.0 * (x + 0.5f64).max(0.0).powi(2);
            LrPoint { lr: 10f64.powf(x), loss: smoothed, smoothed }
        };
        let range = LrRange::new(Arm::Teacher, (0..110).map(point).collect(), true);
        let (steepest, tenth) = (range.steepest.unwrap(), range.tenth_of_least.unwrap());
        assert!((0.8e-2..1.3e-2).contains(&steepest), "{steepest}");
        assert!((0.02..0.05).contains(&tenth), "{tenth}");
        let range = LrRange::new(Arm::Teacher, Vec::new(), true);
        assert_eq!((range.steepest, range.tenth_of_least), (None, None));
    }
}
