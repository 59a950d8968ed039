//! The training step on the CPU.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::ema::Ema;
use super::figures::Figures;
use super::others::{EMA, HEAD, OPTIMIZER, Others, PROJECTION, STUDENT, file, named, optimizer};
use super::step::{StepConfig, StepReport};
use crate::data::Batch;
use crate::losses::{MarginHead, Projection, distillation_loss};
use crate::models::{Inference, Model, Training};
use crate::nn::Gradients;
use crate::ops::slice::Values;
use crate::optim::{Optimizer, clip_scale, grad_norm};

/// Batch size that the teacher's inference is planned for.
const TEACHER_BATCH: usize = 16;

/// State of training on the CPU, apart from the student and its head.
pub(super) struct CpuTrainer<'a> {
    pub training: Training,
    teacher: Option<(&'a Model, Inference<'a>)>,
    config: StepConfig,
    student_optim: Optimizer,
    head_optim: Optimizer,
    /// Projection to the length of the teacher's embeddings, if it differs from the student's.
    projection: Option<(Projection, Optimizer)>,
    ema: Option<Ema>,
    /// Trained parameters whose gradient was zero everywhere in the first step: they do not learn.
    pub without_gradient: Option<Vec<String>>,
}

/// Gradients of a batch or a mini-batch.
struct Found {
    of_student: Gradients,
    of_head: Option<Gradients>,
    of_projection: Option<Gradients>,
}

impl<'a> CpuTrainer<'a> {
    pub fn new(
        student: &Model,
        head: &MarginHead,
        teacher: Option<&'a Model>,
        config: &StepConfig,
    ) -> crate::Result<Self> {
        let teacher = match teacher {
            Some(teacher) => Some((teacher, teacher.inference(TEACHER_BATCH)?)),
            None => None,
        };
        let size = student.config().embedding_size;
        let other = teacher.as_ref().map(|(teacher, _)| teacher.config().embedding_size).filter(|other| *other != size);
        let projection = other.map(|other| -> crate::Result<_> {
            let projection = Projection::new(size, other, &Device::Cpu, config.projection_seed())?;
            let optim = Optimizer::new(projection.params(), &config.optim);
            Ok((projection, optim))
        });
        let ema = (config.ema > 0.0).then(|| Ema::new(student.params(), config.ema));
        Ok(Self {
            training: if config.recompute { student.recomputing()? } else { student.training() },
            teacher,
            config: config.clone(),
            student_optim: Optimizer::new(student.params(), &config.optim),
            head_optim: Optimizer::new(head.params(), &config.optim),
            projection: projection.transpose()?,
            ema: ema.transpose()?,
            without_gradient: None,
        })
    }

    /// Returns everything that later steps depend on apart from the student and the head, by file.
    pub fn state(&self) -> crate::Result<Others> {
        let (student, head) = (self.student_optim.state()?, self.head_optim.state()?);
        let mut optimizers: BTreeMap<String, Tensor> = named(STUDENT, student).chain(named(HEAD, head)).collect();
        let mut state = Others::new();
        if let Some((projection, optim)) = &self.projection {
            optimizers.extend(named(PROJECTION, optim.state()?));
            state.insert(PROJECTION.to_owned(), projection.params().state()?);
        }
        if let Some(ema) = &self.ema {
            state.insert(EMA.to_owned(), ema.state()?);
        }
        state.insert(OPTIMIZER.to_owned(), optimizers);
        Ok(state)
    }

    /// Returns the moving average of the student's weights as a network's state, if one is kept.
    pub fn averages(&self, student: &Model) -> crate::Result<Option<BTreeMap<String, Tensor>>> {
        self.ema.as_ref().map(|ema| ema.weights(student.params())).transpose()
    }

    /// Restores the [`Self::state`] of a trainer with the same settings, on the CPU or a GPU.
    pub fn load_state(&mut self, state: &Others) -> crate::Result<()> {
        self.student_optim.load(&optimizer(state, STUDENT)?)?;
        self.head_optim.load(&optimizer(state, HEAD)?)?;
        if let Some((projection, optim)) = &mut self.projection {
            projection.params().load(file(state, PROJECTION)?)?;
            optim.load(&optimizer(state, PROJECTION)?)?;
        }
        if let Some(ema) = &mut self.ema {
            ema.load(file(state, EMA)?)?;
        }
        Ok(())
    }

    /// Trains the student and the head that were passed to [`Self::new`] on one batch.
    pub fn step(
        &mut self,
        student: &Model,
        head: &MarginHead,
        batch: Batch,
        step: u64,
        lr: f64,
    ) -> crate::Result<StepReport> {
        // Run on a worker thread: from outside the pool, every parallel loop would wake the workers and put this
        // thread to sleep.
        rayon::scope(|_| self.step_as_worker(student, head, batch, step, lr))
    }

    fn step_as_worker(
        &mut self,
        student: &Model,
        head: &MarginHead,
        batch: Batch,
        step: u64,
        lr: f64,
    ) -> crate::Result<StepReport> {
        let statistics = student.params().buffers()?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.config.seed);
        rng.set_stream(step);
        let (num_images, mut figures, mut all) = (batch.labels.len(), Figures::default(), None::<Found>);
        for part in batch.parts(self.config.accumulate)? {
            let found = self.gradients(student, head, &part, &mut rng, &mut figures)?;
            match &mut all {
                None => all = Some(found),
                Some(all) => all.add(&found)?,
            }
        }
        let Some(found) = all else { return Err(crate::Error::Training("the batch is empty".into())) };
        let mut report = figures.report(num_images, self.config.distill.lambda);
        (report.lr, report.grad_norm) = (lr, grad_norm(&found.of_student)?);
        if !report.loss.is_finite() || !report.grad_norm.is_finite() {
            student.params().restore_buffers(&statistics)?;
            report.is_skipped = true;
            return Ok(report);
        }
        if self.without_gradient.is_none() {
            self.without_gradient = Some(found.without_gradient()?);
        }
        self.student_optim.step(&found.of_student, lr, clip_scale(report.grad_norm, self.config.optim.clip_norm))?;
        if let Some(of_head) = found.of_head {
            self.head_optim.step(&of_head, lr, 1.0)?;
        }
        if let (Some((_, optim)), Some(gradients)) = (&mut self.projection, found.of_projection) {
            optim.step(&gradients, lr, 1.0)?;
        }
        if let Some(ema) = &mut self.ema {
            ema.update(student.params())?;
        }
        Ok(report)
    }

    /// Returns the gradients of a mini-batch, weighted by its share of the batch.
    fn gradients(
        &self,
        student: &Model,
        head: &MarginHead,
        part: &Batch,
        rng: &mut ChaCha8Rng,
        figures: &mut Figures,
    ) -> crate::Result<Found> {
        let (distill, share) = (&self.config.distill, 1.0 / self.config.accumulate as f64);
        let images = part.student.to_tensor(student.preprocessing(), &Device::Cpu)?;
        let (embedding, recorded) = self.training.record(student, &images)?;
        let (_, size) = embedding.dims2()?;
        figures.add_directions(&Values::of("embedding", &embedding)?, size);
        let (mut of_embedding, mut of_head, mut of_projection) = (None, None, None);
        if distill.margin_weight > 0.0 {
            let margin = head.step(&embedding, &part.labels, distill.margin_weight * share, rng)?;
            figures.margin_loss += distill.margin_weight * share * margin.loss;
            figures.target_cosines.extend(margin.target_cosines.iter().map(|cosine| cosine.unwrap_or(f64::NAN)));
            (of_embedding, of_head) = (Some(margin.of_embedding), Some(margin.of_head));
        }
        if let Some((teacher, network)) = &self.teacher {
            let target = network.run(&part.teacher.to_tensor(teacher.preprocessing(), &Device::Cpu)?)?;
            // candle differentiates the distillation loss up to the embeddings; the network's backward pass continues
            // from there.
            let embedding = Var::from_tensor(&embedding)?;
            let projected = match &self.projection {
                Some((projection, _)) => projection.forward(&embedding)?,
                None => embedding.as_tensor().clone(),
            };
            let distance = distillation_loss(&projected, &target, distill.kind)?;
            figures.distill_loss += share * f64::from(distance.to_scalar::<f32>()?);
            let grads = (distance * (distill.lambda * share))?.backward()?;
            let Some(of_distance) = grads.get(&embedding) else {
                return Err(crate::Error::Training("the embeddings received no gradient".into()));
            };
            of_embedding = Some(of_embedding.map_or_else(|| Ok(of_distance.clone()), |sum| sum + of_distance)?);
            if let Some((projection, _)) = &self.projection {
                of_projection = Some(Gradients::of(projection.params(), &grads)?);
            }
        }
        let Some(of_embedding) = of_embedding else {
            return Err(crate::Error::Training("all loss weights are 0".into()));
        };
        Ok(Found { of_student: recorded.backward(&of_embedding)?, of_head, of_projection })
    }
}

impl Found {
    fn without_gradient(&self) -> crate::Result<Vec<String>> {
        let mut names = self.of_student.zeros()?;
        for (part, gradients) in [("head", &self.of_head), ("projection", &self.of_projection)] {
            let zeros = gradients.as_ref().map(Gradients::zeros).transpose()?.unwrap_or_default();
            names.extend(zeros.into_iter().map(|name| format!("{part}.{name}")));
        }
        Ok(names)
    }

    fn add(&mut self, other: &Self) -> crate::Result<()> {
        self.of_student.add(&other.of_student)?;
        for (sum, other) in [(&mut self.of_head, &other.of_head), (&mut self.of_projection, &other.of_projection)] {
            if let (Some(sum), Some(other)) = (sum, other) {
                sum.add(other)?;
            }
        }
        Ok(())
    }
}
