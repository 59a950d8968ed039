//! Settings and figures of a training step.

use crate::losses::DistillConfig;
use crate::optim::OptimConfig;

/// Settings of the training step. The default is the published recipe without a teacher.
#[derive(Clone, Debug, PartialEq)]
pub struct StepConfig {
    /// Kind and weights of the losses.
    pub distill: DistillConfig,
    /// The optimiser.
    pub optim: OptimConfig,
    /// Gradient accumulation: number of equal mini-batches that a batch is split into. Their gradients are added; each
    /// has its own batch-norm statistics.
    pub accumulate: usize,
    /// Whether to use activation checkpointing.
    pub recompute: bool,
    /// Decay of the exponential moving average of the weights, below 1; 0 turns it off.
    pub ema: f64,
    /// Seed of the margins and of the initial projection.
    pub seed: u64,
    /// Steps from one whose figures are read from a GPU to the next, at least 1.
    pub log_every: usize,
}

impl Default for StepConfig {
    fn default() -> Self {
        Self {
            distill: DistillConfig::default(),
            optim: OptimConfig::default(),
            accumulate: 1,
            recompute: false,
            ema: 0.0,
            seed: 0,
            log_every: 20,
        }
    }
}

impl StepConfig {
    /// Returns the seed of the initial projection.
    pub(super) fn projection_seed(&self) -> u64 {
        self.seed.wrapping_add(2)
    }
}

/// Figures of one training step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// The total loss: `margin_loss + lambda * distill_loss`.
    pub loss: f64,
    /// The margin loss (cross-entropy with margin), multiplied by its weight; 0 if the weight is 0.
    pub margin_loss: f64,
    /// The distillation loss before multiplication by `lambda`; 0 without a teacher.
    pub distill_loss: f64,
    /// Norm of the backbone's gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Mean cosine of all pairs of embeddings in the batch; near 1 the embeddings have collapsed.
    pub mean_cosine: Option<f64>,
    /// Mean cosine between embeddings and their class centres; none without the margin loss.
    pub target_cosine: Option<f64>,
    /// Cosine between each image's embedding and its class centre; NaN without a label.
    pub target_cosines: Vec<f64>,
    /// Whether the step was skipped because its loss or gradient was not finite: no parameter, moment or running
    /// statistic has changed. Always false on a GPU, where such a step is an error.
    pub is_skipped: bool,
}

impl StepReport {
    /// Computes what follows from the losses and target cosines of a batch of `n` images, and from the sum of the
    /// directions of their embeddings; `lambda` is the weight of the distillation loss.
    pub(super) fn conclude(&mut self, directions: &[f64], n: usize, lambda: f64) {
        self.loss = self.margin_loss + lambda * self.distill_loss;
        let (n, squares) = (n as f64, directions.iter().map(|v| v * v).sum::<f64>());
        self.mean_cosine = (n > 1.0).then(|| (squares - n) / (n * (n - 1.0)));
        let known: Vec<f64> = self.target_cosines.iter().copied().filter(|cosine| !cosine.is_nan()).collect();
        self.target_cosine = (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64);
    }
}
