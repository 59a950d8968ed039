//! Settings of a training step.

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
    /// Most bytes for the teacher's embeddings of training images, which are kept on the CPU so that each view is
    /// embedded once and not in every epoch; 0 keeps none. The result is the same.
    pub max_kept_bytes: usize,
    /// Whether batch norms use the statistics of the batches of all ranks.
    pub sync_batch_norm: bool,
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
            max_kept_bytes: 1 << 30,
            sync_batch_norm: false,
            ema: 0.0,
            seed: 0,
            log_every: 20,
        }
    }
}

impl StepConfig {
    /// Returns the seed of a rank's sampled classes.
    pub(super) fn sample_seed(&self, rank: usize) -> u64 {
        self.seed.wrapping_add(3).wrapping_add((rank as u64) << 32)
    }

    /// Returns the seed of the initial projection.
    pub(super) fn projection_seed(&self) -> u64 {
        self.seed.wrapping_add(2)
    }
}
