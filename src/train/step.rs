//! One training step: forward passes of teacher and student, losses, gradients, update.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::checkpoint::save_checkpoint;
use super::on_cpu::CpuTrainer;
#[cfg(any(test, feature = "cuda"))]
use super::on_gpu::GpuTrainer;
use super::others::Others;
use crate::data::Batch;
use crate::losses::{DistillConfig, MarginHead};
use crate::models::Model;
use crate::optim::OptimConfig;

/// Trains a student and its head, optionally with a teacher to distil from.
pub struct Trainer<'a> {
    /// The backbone in training. On a GPU its weights are those of the last call of [`Self::synchronise`].
    pub student: Model,
    head: MarginHead,
    trains_head: bool,
    /// Report of the last step whose figures are known.
    report: StepReport,
    engine: Engine<'a>,
}

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

/// The implementation of the training step.
enum Engine<'a> {
    Cpu(Box<CpuTrainer<'a>>),
    #[cfg(any(test, feature = "cuda"))]
    Gpu(Box<GpuTrainer>),
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

impl<'a> Engine<'a> {
    /// Returns the implementation for the student's machine.
    fn new(student: &Model, head: &MarginHead, teacher: Option<&'a Model>, config: &StepConfig) -> crate::Result<Self> {
        #[cfg(any(test, feature = "cuda"))]
        if student.machine().gpu().is_some() {
            return Ok(Self::Gpu(Box::new(GpuTrainer::new(student, head, teacher, config)?)));
        }
        Ok(Self::Cpu(Box::new(CpuTrainer::new(student, head, teacher, config)?)))
    }
}

impl<'a> Trainer<'a> {
    /// Returns a trainer on the student's machine, where the teacher must be too. The teacher is used if the
    /// distillation loss has a weight. If its embeddings have a different length from the student's, a
    /// [`Projection`](crate::losses::Projection) is trained with the student.
    ///
    /// # Errors
    /// When memory for the optimisers cannot be allocated, the teacher is missing or has a different input size, or the
    /// machine does not support a network or a setting of `config`.
    pub fn new(
        student: Model,
        head: MarginHead,
        teacher: Option<&'a Model>,
        config: &StepConfig,
    ) -> crate::Result<Self> {
        let teacher = if config.distill.lambda > 0.0 {
            let wrong = |what: String| Err(crate::Error::Training(what));
            let Some(teacher) = teacher else { return wrong("distillation needs a teacher".into()) };
            let (t, s) = (teacher.config().input_size, student.config().input_size);
            if t != s {
                return wrong(format!("the teacher sees images of {t} pixels, the student of {s}"));
            }
            Some(teacher)
        } else {
            None
        };
        let engine = Engine::new(&student, &head, teacher, config)?;
        let trains_head = config.distill.margin_weight > 0.0;
        Ok(Self { student, head, trains_head, report: StepReport::default(), engine })
    }

    /// Returns the classification head in training; none if the margin loss has weight 0.
    pub fn head(&self) -> Option<&MarginHead> {
        self.trains_head.then_some(&self.head)
    }

    /// Returns the head, whether or not it is trained.
    pub(super) fn any_head(&self) -> &MarginHead {
        &self.head
    }

    /// Trains on one batch with learning rate `lr`; `step` counts from 0 and seeds the margins. Returns the step's
    /// figures. On a GPU, which runs asynchronously, only every 20th step returns them.
    ///
    /// # Errors
    /// When a trainable parameter receives no gradient or a tensor operation fails; running statistics may have been
    /// updated by then, parameters have not. On a GPU also when a loss or gradient was not finite, which is detected
    /// when figures are read: no such step updated a parameter, but the running statistics are corrupt.
    pub fn step(&mut self, batch: Batch, step: u64, lr: f64) -> crate::Result<Option<StepReport>> {
        let report = match &mut self.engine {
            Engine::Cpu(engine) => Some(engine.step(&self.student, &self.head, batch, step, lr)?),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.step(&self.student, batch, step, lr)?,
        };
        if let Some(report) = &report {
            self.report = report.clone();
        }
        Ok(report)
    }

    /// Returns the names of the trained parameters whose gradient was zero everywhere in the first step: they do not
    /// learn. Empty before the first step.
    pub fn without_gradient(&self) -> &[String] {
        match &self.engine {
            Engine::Cpu(engine) => engine.without_gradient.as_deref().unwrap_or_default(),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.without_gradient.as_deref().unwrap_or_default(),
        }
    }

    /// Returns the approximate peak size, in bytes, of the activations of a mini-batch of `n` images and their
    /// gradients; none for a network that runs layer by layer, and on a GPU.
    pub fn activation_bytes(&self, n: usize) -> Option<usize> {
        match &self.engine {
            Engine::Cpu(engine) => engine.training.activation_bytes(n),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(_) => None,
        }
    }

    /// Saves the head and the weights used for evaluation: the moving average if one is kept, else the student's.
    pub(super) fn save(&self, folder: &Path, identities: &[String]) -> crate::Result<()> {
        let averaged = self.averaged()?;
        save_checkpoint(folder, averaged.as_ref().unwrap_or(&self.student), self.head(), identities)
    }

    /// Returns the moving average of the student's weights as a frozen network, if one is kept.
    ///
    /// # Errors
    /// When memory for the network cannot be allocated.
    pub fn averaged(&self) -> crate::Result<Option<Model>> {
        let averages = match &self.engine {
            Engine::Cpu(engine) => engine.averages(&self.student)?,
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.averages(&self.student)?,
        };
        averages.map(|weights| self.frozen(weights)).transpose()
    }

    /// Returns a frozen copy of the student with these weights.
    pub(super) fn frozen(&self, weights: BTreeMap<String, Tensor>) -> crate::Result<Model> {
        let student = &self.student;
        let model = Model::frozen(student.config(), weights, &Device::Cpu)?;
        Ok(model.with_preprocessing(student.preprocessing().clone()).on(student.machine()))
    }

    /// Returns everything that later steps depend on apart from the student and the head, by file: the state of the
    /// optimisers, the projection and the moving average.
    ///
    /// # Errors
    /// When memory for the copies cannot be allocated.
    pub(super) fn state(&self) -> crate::Result<Others> {
        match &self.engine {
            Engine::Cpu(engine) => engine.state(),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.state(),
        }
    }

    /// Restores the [`Self::state`] of a trainer with the same settings, on any machine.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or has the wrong shape.
    pub(super) fn load_state(&mut self, state: &Others) -> crate::Result<()> {
        match &mut self.engine {
            Engine::Cpu(engine) => engine.load_state(state),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.load_state(state),
        }
    }

    /// Copies trained weights from a GPU to the student and the head; on the CPU they are current already. Returns the
    /// figures of the last step.
    ///
    /// # Errors
    /// On a GPU, when a step had a loss or gradient that was not finite, or the copy fails.
    pub fn synchronise(&mut self) -> crate::Result<StepReport> {
        #[cfg(any(test, feature = "cuda"))]
        if let Engine::Gpu(engine) = &self.engine {
            self.report = engine.synchronise(&self.student, &self.head)?;
        }
        Ok(self.report.clone())
    }
}
