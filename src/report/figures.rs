//! Metrics of the steps of a training, as their plots show them.

use crate::records::StepRecord;

/// A metric with a plot of its own.
#[derive(Clone, Copy)]
pub(super) struct Figure {
    pub title: &'static str,
    /// Whether only distillation has it.
    pub is_of_distillation: bool,
    /// Whether it is drawn on a logarithmic axis if it is positive and spans more than a decade.
    pub is_magnitude: bool,
    value: fn(&StepRecord) -> Option<f64>,
}

impl Figure {
    /// Value in a step, if it is finite.
    pub fn of(&self, step: &StepRecord) -> Option<f64> {
        (self.value)(step).filter(|value| value.is_finite())
    }
}

const fn figure(title: &'static str, value: fn(&StepRecord) -> Option<f64>) -> Figure {
    Figure { title, is_of_distillation: false, is_magnitude: false, value }
}

const fn magnitude(title: &'static str, value: fn(&StepRecord) -> Option<f64>) -> Figure {
    Figure { is_magnitude: true, ..figure(title, value) }
}

/// The total loss.
pub(super) const LOSS: Figure = figure("Loss", |step| Some(step.report.loss));

/// All metrics.
pub(super) const FIGURES: [Figure; 8] = [
    LOSS,
    figure("Margin loss", |step| Some(step.report.margin_loss)),
    Figure { is_of_distillation: true, ..magnitude("Distillation loss", |step| Some(step.report.distill_loss)) },
    magnitude("Gradient norm", |step| Some(step.report.grad_norm)),
    magnitude("Learning rate", |step| Some(step.report.lr)),
    figure("Target cosine", |step| step.report.target_cosine),
    figure("Mean cosine", |step| step.report.mean_cosine),
    figure("Images per second", |step| Some(step.speed.images_per_s)),
];

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::records::{Speed, StepReport};

    /// A step whose metrics all are `value`.
    pub fn step(step: usize, value: f64) -> StepRecord {
        let cosine = Some(value).filter(|value| value.is_finite());
        let report = StepReport {
            loss: value,
            margin_loss: value,
            distill_loss: value,
            grad_norm: value,
            lr: value,
            mean_cosine: cosine,
            target_cosine: cosine,
            ..StepReport::default()
        };
        let speed = Speed { images_per_s: value, ..Speed::default() };
        StepRecord { step, epoch: step / 100, speed, report, ..StepRecord::default() }
    }
}
