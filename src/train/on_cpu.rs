//! The training step on the CPU.

use candle_core::{Device, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::step::StepReport;
use crate::data::Batch;
use crate::losses::{DistillConfig, MarginHead, distillation_loss};
use crate::models::{Inference, Model, Training};
use crate::optim::{OptimConfig, Optimizer, clip_scale, grad_norm};

/// Images that the teacher sees at once are at least about so many.
const TEACHER_BATCH: usize = 16;

/// What training keeps from step to step beside the student and its head.
pub(super) struct CpuTrainer<'a> {
    training: Training,
    teacher: Option<(&'a Model, Inference<'a>)>,
    distill: DistillConfig,
    student_optim: Optimizer,
    head_optim: Optimizer,
    clip_norm: f64,
    seed: u64,
}

impl<'a> CpuTrainer<'a> {
    pub fn new(
        student: &Model,
        head: &MarginHead,
        teacher: Option<&'a Model>,
        distill: &DistillConfig,
        optim: &OptimConfig,
        seed: u64,
    ) -> crate::Result<Self> {
        let teacher = match teacher {
            Some(teacher) => Some((teacher, teacher.inference(TEACHER_BATCH)?)),
            None => None,
        };
        Ok(Self {
            training: student.training(),
            teacher,
            distill: distill.clone(),
            student_optim: Optimizer::new(student.params(), optim),
            head_optim: Optimizer::new(head.params(), optim),
            clip_norm: optim.clip_norm,
            seed,
        })
    }

    /// What the optimisers of the student and the head remember.
    pub fn optimizers(&self) -> [&Optimizer; 2] {
        [&self.student_optim, &self.head_optim]
    }

    /// The same, to be changed.
    pub fn optimizers_mut(&mut self) -> [&mut Optimizer; 2] {
        [&mut self.student_optim, &mut self.head_optim]
    }

    /// Trains the student and the head, those of [`Self::new`], on one batch.
    pub fn step(
        &mut self,
        student: &Model,
        head: &MarginHead,
        batch: &Batch,
        step: u64,
        lr: f64,
    ) -> crate::Result<StepReport> {
        // As one of the workers: from outside, every parallel loop would wake them and put this thread to sleep.
        rayon::scope(|_| self.step_as_worker(student, head, batch, step, lr))
    }

    fn step_as_worker(
        &mut self,
        student: &Model,
        head: &MarginHead,
        batch: &Batch,
        step: u64,
        lr: f64,
    ) -> crate::Result<StepReport> {
        let images = batch.student.to_tensor(student.preprocessing(), &Device::Cpu)?;
        let statistics = student.params().buffers()?;
        let (embedding, recorded) = self.training.record(student, &images)?;
        let mut report = StepReport { lr, ..StepReport::default() };
        let (mut of_embedding, mut of_head) = (None, None);
        if self.distill.margin_weight > 0.0 {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(step);
            let margin = head.step(&embedding, &batch.labels, self.distill.margin_weight, &mut rng)?;
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
            student.params().restore_buffers(&statistics)?;
            report.is_skipped = true;
            return Ok(report);
        }
        self.student_optim.step(&of_student, lr, clip_scale(report.grad_norm, self.clip_norm))?;
        if let Some(of_head) = of_head {
            self.head_optim.step(&of_head, lr, 1.0)?;
        }
        Ok(report)
    }
}
