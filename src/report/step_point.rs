//! Metrics of the steps of a training.

/// Metrics of a step as (key, title), in the order of [`StepPoint::values`].
pub const FIGURES: [(&str, &str); 8] = [
    ("loss", "Loss"),
    ("margin_loss", "Margin loss"),
    ("distill_loss", "Distillation loss"),
    ("grad_norm", "Gradient norm"),
    ("lr", "Learning rate"),
    ("target_cosine", "Target cosine"),
    ("mean_cosine", "Mean cosine"),
    ("images_per_s", "Images per second"),
];

/// Metrics of one step.
#[derive(Clone, Debug, Default)]
pub struct StepPoint {
    /// The step: where on the axis the point is drawn.
    pub step: usize,
    /// Its epoch, from 0.
    pub epoch: usize,
    /// Values of the metrics in [`FIGURES`]; `None` where one was not finite or not measured.
    pub values: Vec<Option<f64>>,
}

impl StepPoint {
    /// Value of a metric, if it is finite.
    pub(super) fn value(&self, figure: usize) -> Option<f64> {
        self.values.get(figure).copied().flatten().filter(|value| value.is_finite())
    }
}
