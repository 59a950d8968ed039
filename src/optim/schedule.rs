//! Learning-rate schedules.

use serde::{Deserialize, Serialize};

/// Shape of the decay after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Multiplies the learning rate by `gamma` at the start of each epoch of `milestones`; the published recipe.
    #[default]
    Step,
    /// Half a cosine from 1 to 0 (Loshchilov and Hutter, 2017, eq. 5).
    Cosine,
    /// `(1 - progress) ^ power`, insightface's `PolyScheduler`.
    Polynomial,
}

/// Schedule settings; the default is the published recipe for MS1MV2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Shape of the decay.
    pub kind: ScheduleKind,
    /// Warm-up: epochs of linear growth from 0 before the decay; may be fractional.
    pub warmup_epochs: f64,
    /// Epochs (from 0) at which the learning rate falls, for [`ScheduleKind::Step`].
    pub milestones: Vec<usize>,
    /// Factor of the learning rate at each milestone.
    pub gamma: f64,
    /// Exponent of [`ScheduleKind::Polynomial`].
    pub power: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Step, warmup_epochs: 0.0, milestones: vec![7, 13, 19, 24], gamma: 0.1, power: 2.0 }
    }
}

impl ScheduleConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let wrong = |what: String| Err(crate::Error::Config(format!("schedule.{what}")));
        if !(self.warmup_epochs.is_finite() && self.warmup_epochs >= 0.0) {
            return wrong(format!("warmup_epochs: expected 0 or more, found {}", self.warmup_epochs));
        }
        if !self.milestones.is_sorted() {
            return wrong(format!("milestones: expected rising epochs, found {:?}", self.milestones));
        }
        if !(self.gamma > 0.0 && self.gamma <= 1.0) {
            return wrong(format!("gamma: expected 0 < gamma <= 1, found {}", self.gamma));
        }
        if !(self.power.is_finite() && self.power > 0.0) {
            return wrong(format!("power: expected a positive number, found {}", self.power));
        }
        Ok(())
    }

    /// Returns the factor of the learning rate at `step` (from 0) of `epochs * steps_per_epoch`.
    pub fn factor(&self, step: usize, steps_per_epoch: usize, epochs: usize) -> f64 {
        let per_epoch = steps_per_epoch.max(1) as f64;
        let warmup = self.warmup_epochs * per_epoch;
        // Counting steps from 1 gives the first step of a warm-up a learning rate above 0.
        let done = step as f64 + 1.0;
        if done <= warmup {
            return done / warmup;
        }
        let total = epochs as f64 * per_epoch;
        let progress = ((step as f64 - warmup) / (total - warmup).max(1.0)).clamp(0.0, 1.0);
        match self.kind {
            ScheduleKind::Step => {
                let epoch = step / steps_per_epoch.max(1);
                let decays = self.milestones.iter().filter(|&&m| m <= epoch).count();
                self.gamma.powi(decays as i32)
            }
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            ScheduleKind::Polynomial => (1.0 - progress).powf(self.power),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_schedule_is_the_published_one() {
        let schedule = ScheduleConfig::default();
        let rate = |epoch: usize| schedule.factor(epoch * 10, 10, 26);
        for (epoch, factor) in [(0, 1.0), (6, 1.0), (7, 0.1), (12, 0.1), (13, 0.01), (19, 1e-3), (24, 1e-4), (25, 1e-4)]
        {
            assert!((rate(epoch) - factor).abs() <= 1e-12 * factor, "epoch {epoch}: {}", rate(epoch));
        }
        assert_eq!(schedule.factor(69, 10, 26), 1.0);
    }

    #[test]
    fn warm_up_grows_linearly_and_meets_the_decay() {
        let schedule = ScheduleConfig { kind: ScheduleKind::Cosine, warmup_epochs: 2.0, ..ScheduleConfig::default() };
        let factors: Vec<f64> = (0..100).map(|step| schedule.factor(step, 10, 10)).collect();
        assert!((factors[0] - 1.0 / 20.0).abs() <= 1e-12);
        assert!((factors[19] - 1.0).abs() <= 1e-12 && (factors[20] - 1.0).abs() <= 1e-12);
        assert!(factors[20..].windows(2).all(|w| w[1] < w[0]));
        assert!(factors[99] > 0.0 && factors[99] < 1e-3);
    }

    #[test]
    fn polynomial_ends_near_zero() {
        let schedule = ScheduleConfig { kind: ScheduleKind::Polynomial, ..ScheduleConfig::default() };
        assert_eq!(schedule.factor(0, 10, 10), 1.0);
        assert!((schedule.factor(50, 10, 10) - 0.25).abs() <= 1e-12);
    }

    #[test]
    fn falling_milestones_are_refused() {
        let schedule = ScheduleConfig { milestones: vec![5, 3], ..ScheduleConfig::default() };
        assert!(schedule.validate().unwrap_err().to_string().contains("milestones"));
    }
}
