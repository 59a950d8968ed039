//! One training step: both networks forward, the objective, the gradients, the update.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::on_cpu::CpuTrainer;
#[cfg(any(test, feature = "cuda"))]
use super::on_gpu::GpuTrainer;
use crate::data::Batch;
use crate::losses::{DistillConfig, MarginHead};
use crate::models::Model;
use crate::optim::OptimConfig;

/// Whose the tensors of a saved optimiser are.
const STUDENT: &str = "student";
const HEAD: &str = "head";

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

/// What carries the steps out.
enum Engine<'a> {
    Cpu(Box<CpuTrainer<'a>>),
    #[cfg(any(test, feature = "cuda"))]
    Gpu(Box<GpuTrainer>),
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
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
    /// Whether the loss or the gradient was not finite: nothing was changed then, not even the running statistics.
    pub is_skipped: bool,
}

impl<'a> Engine<'a> {
    /// That of the student's machine.
    fn new(
        student: &Model,
        head: &MarginHead,
        teacher: Option<&'a Model>,
        distill: &DistillConfig,
        optim: &OptimConfig,
        seed: u64,
    ) -> crate::Result<Self> {
        #[cfg(any(test, feature = "cuda"))]
        if student.machine().gpu().is_some() {
            return Ok(Self::Gpu(Box::new(GpuTrainer::new(student, head, teacher, distill, optim, seed)?)));
        }
        Ok(Self::Cpu(Box::new(CpuTrainer::new(student, head, teacher, distill, optim, seed)?)))
    }
}

impl<'a> Trainer<'a> {
    /// Returns a trainer on the student's machine, which must be the teacher's; `teacher` is used if `distill` has a weight.
    ///
    /// # Errors
    /// When memory for the optimisers cannot be had, a teacher is missing or of another embedding or input size, or the
    /// machine has no way for a network.
    pub fn new(
        student: Model,
        head: MarginHead,
        teacher: Option<&'a Model>,
        distill: &DistillConfig,
        optim: &OptimConfig,
        seed: u64,
    ) -> crate::Result<Self> {
        let teacher = if distill.lambda > 0.0 {
            let wrong = |what: String| Err(crate::Error::Training(what));
            let Some(teacher) = teacher else { return wrong("distillation needs a teacher".into()) };
            let (t, s) = (teacher.config().embedding_size, student.config().embedding_size);
            if t != s {
                return wrong(format!("the teacher's embeddings have {t} elements, the student's {s}"));
            }
            let (t, s) = (teacher.config().input_size, student.config().input_size);
            if t != s {
                return wrong(format!("the teacher sees images of {t} pixels, the student of {s}"));
            }
            Some(teacher)
        } else {
            None
        };
        let engine = Engine::new(&student, &head, teacher, distill, optim, seed)?;
        let trains_head = distill.margin_weight > 0.0;
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
            Engine::Cpu(engine) => Some(engine.step(&self.student, &self.head, &batch, step, lr)?),
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => engine.step(&self.student, &batch, step, lr)?,
        };
        self.report = report.unwrap_or(self.report);
        Ok(report)
    }

    /// Returns what the optimisers remember, by names that [`Self::load_optimizers`] knows.
    ///
    /// # Errors
    /// When memory for the copies cannot be had.
    pub fn optimizers(&self) -> crate::Result<BTreeMap<String, Tensor>> {
        let [student, head] = match &self.engine {
            Engine::Cpu(engine) => {
                let [student, head] = engine.optimizers();
                [student.state()?, head.state()?]
            }
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => {
                let [student, head] = engine.optimizers();
                [student.state()?, head.state()?]
            }
        };
        let named = |part: &'static str| move |(name, tensor)| (format!("{part}.{name}"), tensor);
        Ok(student.into_iter().map(named(STUDENT)).chain(head.into_iter().map(named(HEAD))).collect())
    }

    /// Goes on with what the optimisers of another trainer of the same kind remembered.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or of another shape.
    pub fn load_optimizers(&mut self, state: &BTreeMap<String, Tensor>) -> crate::Result<()> {
        let part = |part: &str| -> BTreeMap<String, Tensor> {
            let named = |(name, tensor): (&String, &Tensor)| {
                Some((name.strip_prefix(part)?.strip_prefix('.')?.to_owned(), tensor.clone()))
            };
            state.iter().filter_map(named).collect()
        };
        let [of_student, of_head] = [part(STUDENT), part(HEAD)];
        match &mut self.engine {
            Engine::Cpu(engine) => {
                let [student, head] = engine.optimizers_mut();
                student.load(&of_student)?;
                head.load(&of_head)?;
            }
            #[cfg(any(test, feature = "cuda"))]
            Engine::Gpu(engine) => {
                let [student, head] = engine.optimizers_mut();
                student.load(&of_student)?;
                head.load(&of_head)?;
            }
        }
        Ok(())
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
        Ok(self.report)
    }
}
