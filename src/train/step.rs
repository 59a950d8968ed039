//! One training step: both networks forward, the objective, the gradients, the update.

use candle_core::{Device, ModuleT, Result, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::data::Batch;
use crate::losses::{DistillConfig, MarginHead, distillation_loss};
use crate::models::Model;
use crate::optim::{Sgd, SgdConfig, clip_scale, grad_norm};

/// A student with its head and optimisers, and the teacher it learns from.
pub struct Trainer<'a> {
    /// The backbone in training.
    pub student: Model,
    /// The classification head in training.
    pub head: MarginHead,
    teacher: Option<&'a Model>,
    distill: DistillConfig,
    sgd_student: Sgd,
    sgd_head: Sgd,
    clip_norm: f64,
    seed: u64,
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    /// The objective: `margin_loss + lambda * distill_loss`.
    pub loss: f64,
    /// Cross-entropy under the margin.
    pub margin_loss: f64,
    /// Distance to the teacher's embeddings before its weight; 0 without a teacher.
    pub distill_loss: f64,
    /// Norm of the backbone's gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
}

impl<'a> Trainer<'a> {
    /// Returns a trainer; `teacher` is used if `distill` has a weight.
    ///
    /// # Errors
    /// When memory for the optimisers cannot be had, or a teacher is missing or of another embedding or input size.
    pub fn new(
        student: Model,
        head: MarginHead,
        teacher: Option<&'a Model>,
        distill: &DistillConfig,
        optim: &SgdConfig,
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
        let (sgd_student, sgd_head) = (Sgd::new(student.params(), optim)?, Sgd::new(head.params(), optim)?);
        let (distill, clip_norm) = (distill.clone(), optim.clip_norm);
        Ok(Self { student, head, teacher, distill, sgd_student, sgd_head, clip_norm, seed })
    }

    /// Trains on one batch with learning rate `lr`; `step` counts from 0 and decides the margins drawn.
    ///
    /// # Errors
    /// When the loss is not finite, a trainable parameter receives no gradient, or a tensor operation fails; no
    /// parameter was updated then, only the running statistics.
    pub fn step(&mut self, batch: Batch, step: u64, lr: f64) -> crate::Result<StepReport> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(step);
        let embedding = self.student.forward_t(&batch.student.into_tensor(&Device::Cpu)?, true)?;
        let margin_loss = self.head.forward(&embedding, &batch.labels, &mut rng)?;
        let (loss, distill_loss) = match self.teacher {
            Some(teacher) => {
                let target = teacher.forward_t(&batch.teacher.into_tensor(&Device::Cpu)?, false)?;
                let distance = distillation_loss(&embedding, &target, self.distill.kind)?;
                ((&margin_loss + (&distance * self.distill.lambda)?)?, scalar(&distance)?)
            }
            None => (margin_loss.clone(), 0.0),
        };
        let mut report =
            StepReport { loss: scalar(&loss)?, margin_loss: scalar(&margin_loss)?, distill_loss, grad_norm: 0.0, lr };
        let grads = loss.backward()?;
        let (of_student, of_head) = (self.sgd_student.gradients(&grads)?, self.sgd_head.gradients(&grads)?);
        report.grad_norm = grad_norm(&of_student)?;
        if !report.loss.is_finite() || !report.grad_norm.is_finite() {
            let what =
                format!("step {step}: loss {}, gradient norm {}; try a lower rate", report.loss, report.grad_norm);
            return Err(crate::Error::Training(what));
        }
        self.sgd_student.step(&of_student, lr, clip_scale(report.grad_norm, self.clip_norm))?;
        self.sgd_head.step(&of_head, lr, 1.0)?;
        Ok(report)
    }
}

fn scalar(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}
