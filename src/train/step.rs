//! One training step: both networks forward, the objective, the gradients, the update.

use candle_core::{Device, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

#[cfg(any(test, feature = "cuda"))]
use super::on_gpu::GpuTrainer;
use crate::data::Batch;
use crate::losses::{DistillConfig, MarginHead, distillation_loss};
use crate::models::{Inference, Model, Training};
use crate::optim::{OptimConfig, Optimizer, clip_scale, grad_norm};

/// Images that the teacher sees at once are at least about so many.
const TEACHER_BATCH: usize = 16;

/// A student with its head and optimisers, and the teacher it learns from.
pub struct Trainer<'a> {
    /// The backbone in training, as it was when [`Self::synchronise`] was last called; on the CPU, as it is.
    pub student: Model,
    head: MarginHead,
    training: Training,
    teacher: Option<(&'a Model, Inference<'a>)>,
    distill: DistillConfig,
    student_optim: Optimizer,
    head_optim: Optimizer,
    clip_norm: f64,
    seed: u64,
    /// Of the last step.
    report: StepReport,
    #[cfg(any(test, feature = "cuda"))]
    on_gpu: Option<Box<GpuTrainer>>,
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
        #[cfg(any(test, feature = "cuda"))]
        if student.machine().gpu().is_some() {
            let on_gpu = GpuTrainer::new(&student, &head, teacher, distill, optim, seed)?;
            let trainer = Self::on_cpu(student, head, None, distill, optim, seed);
            return Ok(Self { on_gpu: Some(Box::new(on_gpu)), ..trainer });
        }
        let teacher = match teacher {
            Some(teacher) => Some((teacher, teacher.inference(TEACHER_BATCH)?)),
            None => None,
        };
        Ok(Self::on_cpu(student, head, teacher, distill, optim, seed))
    }

    fn on_cpu(
        student: Model,
        head: MarginHead,
        teacher: Option<(&'a Model, Inference<'a>)>,
        distill: &DistillConfig,
        optim: &OptimConfig,
        seed: u64,
    ) -> Self {
        let student_optim = Optimizer::new(student.params(), optim);
        let head_optim = Optimizer::new(head.params(), optim);
        let (distill, clip_norm, training) = (distill.clone(), optim.clip_norm, student.training());
        Self {
            student,
            head,
            training,
            teacher,
            distill,
            student_optim,
            head_optim,
            clip_norm,
            seed,
            report: StepReport::default(),
            #[cfg(any(test, feature = "cuda"))]
            on_gpu: None,
        }
    }

    /// The classification head in training; none where the margin loss has no weight.
    pub fn head(&self) -> Option<&MarginHead> {
        (self.distill.margin_weight > 0.0).then_some(&self.head)
    }

    /// Trains on one batch with learning rate `lr`; `step` counts from 0 and decides the margins drawn. Returns the step's
    /// figures; none on a GPU, which is not waited for, but in every 20th step.
    ///
    /// # Errors
    /// When the loss is not finite, a trainable parameter receives no gradient, or a tensor operation fails; no
    /// parameter was updated then, only the running statistics. On a GPU a loss that is not finite is found when figures are
    /// read; no step that had one updated a parameter.
    pub fn step(&mut self, batch: Batch, step: u64, lr: f64) -> crate::Result<Option<StepReport>> {
        #[cfg(any(test, feature = "cuda"))]
        if let Some(on_gpu) = &mut self.on_gpu {
            return on_gpu.step(&self.student, &batch, step, lr);
        }
        // As one of the workers: from outside, every parallel loop would wake them and put this thread to sleep.
        self.report = rayon::scope(|_| self.step_as_worker(batch, step, lr))?;
        Ok(Some(self.report))
    }

    /// Brings the student and the head up to date with what was trained, wherever that was; returns the figures of the last step.
    ///
    /// # Errors
    /// When a step that was not waited for had a loss that is not finite, or the copy fails.
    pub fn synchronise(&mut self) -> crate::Result<StepReport> {
        #[cfg(any(test, feature = "cuda"))]
        if let Some(on_gpu) = &self.on_gpu {
            self.report = on_gpu.synchronise(&self.student, &self.head)?;
        }
        Ok(self.report)
    }

    fn step_as_worker(&mut self, batch: Batch, step: u64, lr: f64) -> crate::Result<StepReport> {
        let images = batch.student.to_tensor(self.student.preprocessing(), &Device::Cpu)?;
        let (embedding, recorded) = self.training.record(&self.student, &images)?;
        let mut report = StepReport { lr, ..StepReport::default() };
        let (mut of_embedding, mut of_head) = (None, None);
        if self.distill.margin_weight > 0.0 {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(step);
            let margin = self.head.step(&embedding, &batch.labels, self.distill.margin_weight, &mut rng)?;
            report.margin_loss = self.distill.margin_weight * margin.loss;
            (of_embedding, of_head) = (Some(margin.of_embedding), Some(margin.of_head));
        }
        if let Some((teacher, network)) = &self.teacher {
            let target = network.run(&batch.teacher.to_tensor(teacher.preprocessing(), &Device::Cpu)?)?;
            // The distance builds a graph of its own; the network's backward begins where it ends.
            let embedding = Var::from_tensor(&embedding)?;
            let distance = distillation_loss(&embedding, &target, self.distill.kind)?;
            report.distill_loss = f64::from(distance.to_scalar::<f32>()?);
            let grads = (distance * self.distill.lambda)?.backward()?;
            let Some(of_distance) = grads.get(&embedding) else {
                return Err(crate::Error::Training("the embeddings received no gradient".into()));
            };
            of_embedding = Some(of_embedding.map_or_else(|| Ok(of_distance.clone()), |sum| sum + of_distance)?);
        }
        let Some(of_embedding) = of_embedding else {
            return Err(crate::Error::Training("no loss has a weight".into()));
        };
        report.loss = report.margin_loss + self.distill.lambda * report.distill_loss;
        let of_student = recorded.backward(&of_embedding)?;
        report.grad_norm = grad_norm(&of_student)?;
        if !report.loss.is_finite() || !report.grad_norm.is_finite() {
            let what =
                format!("step {step}: loss {}, gradient norm {}; try a lower rate", report.loss, report.grad_norm);
            return Err(crate::Error::Training(what));
        }
        self.student_optim.step(&of_student, lr, clip_scale(report.grad_norm, self.clip_norm))?;
        if let Some(of_head) = of_head {
            self.head_optim.step(&of_head, lr, 1.0)?;
        }
        Ok(report)
    }
}
