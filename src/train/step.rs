//! One training step: both networks forward, the objective, the gradients, the update.

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

/// A student with its head and optimisers, and the teacher it learns from.
pub struct Trainer<'a> {
    /// The backbone in training, as it was when [`Self::synchronise`] was last called; on the CPU, as it is.
    pub student: Model,
    head: MarginHead,
    trains_head: bool,
    /// Of the last step whose figures are known.
    report: StepReport,
    engine: Engine<'a>,
}

/// How steps are taken; the default is the published recipe without a teacher.
#[derive(Clone, Debug, PartialEq)]
pub struct StepConfig {
    /// Kind and weights of the losses.
    pub distill: DistillConfig,
    /// The optimiser.
    pub optim: OptimConfig,
    /// Parts of equal size in which a batch goes through the network; their gradients are added up. Each has batch statistics of its own.
    pub accumulate: usize,
    /// Whether most activations are computed again in the backward pass instead of kept.
    pub recompute: bool,
    /// Decay of the exponential moving average of the weights, below 1; 0 for none.
    pub ema: f64,
    /// Decides the margins drawn and where a projection starts.
    pub seed: u64,
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
        }
    }
}

impl StepConfig {
    /// Decides where a projection starts.
    pub(super) fn projection_seed(&self) -> u64 {
        self.seed.wrapping_add(2)
    }
}

/// What carries the steps out.
enum Engine<'a> {
    Cpu(Box<CpuTrainer<'a>>),
    #[cfg(any(test, feature = "cuda"))]
    Gpu(Box<GpuTrainer>),
}

/// What one step did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepReport {
    /// The objective: `margin_loss + lambda * distill_loss`.
    pub loss: f64,
    /// Cross-entropy under the margin, with its weight; 0 if that is 0.
    pub margin_loss: f64,
    /// Distance to the teacher's embeddings before its weight; 0 without a teacher.
    pub distill_loss: f64,
    /// Norm of the backbone's gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Mean cosine of all pairs of embeddings in the batch: near 1, they have collapsed.
    pub mean_cosine: Option<f64>,
    /// Mean cosine of the embeddings and their class centres. None without the margin loss.
    pub target_cosine: Option<f64>,
    /// The same for each image of the batch; NaN without a label.
    pub target_cosines: Vec<f64>,
    /// Whether the loss or the gradient was not finite: nothing was changed then, not even the running statistics.
    pub is_skipped: bool,
}

impl<'a> Engine<'a> {
    /// That of the student's machine.
    fn new(student: &Model, head: &MarginHead, teacher: Option<&'a Model>, config: &StepConfig) -> crate::Result<Self> {
        #[cfg(any(test, feature = "cuda"))]
        if student.machine().gpu().is_some() {
            return Ok(Self::Gpu(Box::new(GpuTrainer::new(student, head, teacher, config)?)));
        }
        Ok(Self::Cpu(Box::new(CpuTrainer::new(student, head, teacher, config)?)))
    }
}

impl<'a> Trainer<'a> {
    /// Returns a trainer on the student's machine, which must be the teacher's; `teacher` is used if distillation has a weight. A teacher
    /// whose embeddings have another length is followed through a [`Projection`](crate::losses::Projection).
    ///
    /// # Errors
    /// When memory for the optimisers cannot be had, a teacher is missing or of another input size, or the machine has no way for a
    /// network or for what `config` asks.
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

    /// The classification head in training; none where the margin loss has no weight.
    pub fn head(&self) -> Option<&MarginHead> {
        self.trains_head.then_some(&self.head)
    }

    /// The head, whether it is trained or not.
    pub(super) fn any_head(&self) -> &MarginHead {
        &self.head
    }

    /// Trains on one batch with learning rate `lr`; `step` counts from 0 and decides the margins drawn. Returns the step's
    /// figures; none on a GPU, which is not waited for, but in every 20th step.
    ///
    /// # Errors
    /// When a trainable parameter receives no gradient or a tensor operation fails; no parameter was updated then, only the running
    /// statistics. On a GPU also when a loss was not finite, which is found when figures are read; no step that had one updated a
    /// parameter, the running statistics are spoiled.
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

    /// The trained parameters to which the first step gave no gradient at all, by name: they do not learn. Empty before it.
    pub fn without_gradient(&self) -> &[String] {
        match &self.engine {
            Engine::Cpu(engine) => engine.without_gradient.as_deref().unwrap_or_default(),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.without_gradient.as_deref().unwrap_or_default(),
        }
    }

    /// Returns about how many bytes the activations of a batch of `n` images, or of a part of one, and their gradients take at the peak;
    /// none where the network goes layer by layer, and on a GPU.
    pub fn activation_bytes(&self, n: usize) -> Option<usize> {
        match &self.engine {
            Engine::Cpu(engine) => engine.training.activation_bytes(n),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(_) => None,
        }
    }

    /// Saves the weights that are evaluated as they are now, the average if one is kept, with the head.
    pub(super) fn save(&self, folder: &Path) -> crate::Result<()> {
        let averaged = self.averaged()?;
        save_checkpoint(folder, averaged.as_ref().unwrap_or(&self.student), self.head())
    }

    /// Returns the average of the student's weights over the steps, as a network that receives no gradients, if one is kept.
    ///
    /// # Errors
    /// When memory for it cannot be had.
    pub fn averaged(&self) -> crate::Result<Option<Model>> {
        let averages = match &self.engine {
            Engine::Cpu(engine) => engine.averages(&self.student)?,
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.averages(&self.student)?,
        };
        averages.map(|weights| self.frozen(weights)).transpose()
    }

    /// The student with these weights, as a network that receives no gradients.
    pub(super) fn frozen(&self, weights: BTreeMap<String, Tensor>) -> crate::Result<Model> {
        let student = &self.student;
        let model = Model::frozen(student.config(), weights, &Device::Cpu)?;
        Ok(model.with_preprocessing(student.preprocessing().clone()).on(student.machine()))
    }

    /// Returns everything that later steps depend on beside the student and the head, by the file that it is kept in: what the optimisers
    /// remember, the projection, the average.
    ///
    /// # Errors
    /// When memory for the copies cannot be had.
    pub(super) fn state(&self) -> crate::Result<Others> {
        match &self.engine {
            Engine::Cpu(engine) => engine.state(),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.state(),
        }
    }

    /// Goes on with [`Self::state`] of another trainer of the same kind, on whichever machine.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or of another shape.
    pub(super) fn load_state(&mut self, state: &Others) -> crate::Result<()> {
        match &mut self.engine {
            Engine::Cpu(engine) => engine.load_state(state),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.load_state(state),
        }
    }

    /// Brings the student and the head up to date with what was trained, wherever that was; returns the figures of the last step.
    ///
    /// # Errors
    /// When a step that was not waited for had a loss that is not finite, or the copy fails.
    pub fn synchronise(&mut self) -> crate::Result<StepReport> {
        #[cfg(any(test, feature = "cuda"))]
        if let Engine::Gpu(engine) = &self.engine {
            self.report = engine.synchronise(&self.student, &self.head)?;
        }
        Ok(self.report.clone())
    }
}
