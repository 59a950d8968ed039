//! The training step on a GPU. All work from image upload to update is queued; the host waits only when it reads
//! figures.

use std::collections::BTreeMap;

use candle_core::{Device as Candle, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::ema::Ema;
use super::figures::Figures;
use super::gpu_ema::GpuEma;
use super::others::{EMA, HEAD, OPTIMIZER, Others, PROJECTION, STUDENT, file, named, optimizer};
use super::step::{StepConfig, StepReport};
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::gpu::batch_norm::{Seen, apply};
use crate::gpu::distill::Distilled;
use crate::gpu::margin::OfBatch;
use crate::gpu::update::{Guard, blend};
use crate::gpu::{Array, Element};
use crate::losses::{DistillConfig, GpuHead, GpuProjection, MarginHead, Projection};
use crate::machine::Precision;
use crate::models::{Model, OnGpu};
use crate::nn::engine::gpu::Group;
use crate::ops::slice::Values;
use crate::optim::GpuOptimizer;

/// A student, its head and optimisers on a GPU, and the teacher it learns from.
pub(super) struct GpuTrainer {
    student: OnGpu,
    head: GpuHead,
    teacher: Option<OnGpu>,
    config: StepConfig,
    student_optim: GpuOptimizer,
    head_optim: GpuOptimizer,
    /// Projection to the length of the teacher's embeddings, if it differs from the student's.
    projection: Option<(GpuProjection, GpuOptimizer)>,
    ema: Option<GpuEma>,
    /// Gradient sums over the mini-batches before the last; empty without gradient accumulation.
    sums: Vec<Array>,
    guard: Guard,
    /// Number of steps so far.
    num_steps: u64,
    last: Option<Last>,
    /// Trained parameters whose gradient was zero everywhere in the first step: they do not learn.
    pub without_gradient: Option<Vec<String>>,
}

/// Results of the last step, on the device.
struct Last {
    parts: Vec<Part>,
    step: u64,
    lr: f64,
}

/// Results of one mini-batch, on the device.
struct Part {
    embeddings: Array,
    margin: Option<OfBatch>,
    distance: Option<Array>,
    labels: Vec<i64>,
}

impl GpuTrainer {
    /// Copies the networks, the head and the optimisers to the student's GPU.
    pub fn new(student: &Model, head: &MarginHead, teacher: Option<&Model>, config: &StepConfig) -> Result<Self> {
        let Some(gpu) = student.machine().gpu() else {
            return Err(Error::Training(format!("expected a student on a GPU, found {}", student.machine())));
        };
        if gpu.precision == Precision::F16 {
            let what = "f16's range is too small for gradients: train in bf16, tf32 or f32";
            return Err(Error::Training(what.into()));
        }
        let device = &gpu.device;
        let optimizer = |flat: &Array| GpuOptimizer::new(&config.optim, device, flat.len());
        let size = student.config().embedding_size;
        let other = teacher.map(|teacher| teacher.config().embedding_size).filter(|other| *other != size);
        let projection = other.map(|other| -> Result<_> {
            let projection = Projection::new(size, other, &Candle::Cpu, config.projection_seed())?;
            let projection = GpuProjection::upload(&projection, device)?;
            let optim = optimizer(projection.flat().param)?;
            Ok((projection, optim))
        });
        let projection = projection.transpose()?;
        let on_gpu = OnGpu::upload(student)?;
        let on_gpu = if config.recompute { on_gpu.recomputing(student) } else { on_gpu };
        let teacher = teacher
            .map(|teacher| match teacher.machine().gpu() {
                Some(_) => Ok(OnGpu::upload(teacher)?),
                None => Err(Error::Training("the teacher is not on the student's machine".into())),
            })
            .transpose()?;
        let head = GpuHead::upload(head, device, gpu.element())?;
        let params = on_gpu.network().params();
        let (student_optim, head_optim) = (optimizer(params.flat().param)?, optimizer(head.flat().param)?);
        let ema = (config.ema > 0.0).then(|| GpuEma::new(params, config.ema)).transpose()?;
        let mut trainer = Self {
            student: on_gpu,
            head,
            teacher,
            config: config.clone(),
            student_optim,
            head_optim,
            projection,
            ema,
            sums: Vec::new(),
            guard: Guard::new(device)?,
            num_steps: 0,
            last: None,
            without_gradient: None,
        };
        if config.accumulate > 1 {
            let sum = |grads: &Array| device.array(Element::F32, grads.len());
            trainer.sums = trainer.gradients().into_iter().map(sum).collect::<candle_core::Result<_>>()?;
        }
        Ok(trainer)
    }

    fn trains_head(&self) -> bool {
        self.config.distill.margin_weight > 0.0
    }

    /// Gradient buffers of the student, the head and the projection.
    fn gradients(&self) -> Vec<&Array> {
        let of_head = self.trains_head().then(|| self.head.flat().grad);
        let of_projection = self.projection.as_ref().map(|(projection, _)| projection.flat().grad);
        [self.student.network().params().flat().grad].into_iter().chain(of_head).chain(of_projection).collect()
    }

    /// Returns everything that later steps depend on apart from the student and the head, by file, in the same form as
    /// a trainer on the CPU.
    pub fn state(&self) -> Result<Others> {
        let params = self.student.network().params();
        let student = self.student_optim.state(|moment| params.restored(moment, Group::Updated))?;
        let head = self.head_optim.state(|moment| self.head.restored(moment))?;
        let mut optimizers: BTreeMap<String, Tensor> = named(STUDENT, student).chain(named(HEAD, head)).collect();
        let mut state = Others::new();
        if let Some((projection, optim)) = &self.projection {
            optimizers.extend(named(PROJECTION, optim.state(|moment| projection.restored(moment))?));
            state.insert(PROJECTION.to_owned(), projection.restored(projection.flat().param)?);
        }
        if let Some(ema) = &self.ema {
            state.insert(EMA.to_owned(), ema.state(params)?);
        }
        state.insert(OPTIMIZER.to_owned(), optimizers);
        Ok(state)
    }

    /// Restores the [`Self::state`] of a trainer with the same settings, on the CPU or a GPU.
    pub fn load_state(&mut self, state: &Others) -> Result<()> {
        let params = self.student.network().params();
        self.student_optim.load(&optimizer(state, STUDENT)?, |get| params.laid_out(Group::Updated, get))?;
        self.head_optim.load(&optimizer(state, HEAD)?, |get| self.head.laid_out(get))?;
        if let Some((projection, optim)) = &mut self.projection {
            projection.load(file(state, PROJECTION)?)?;
            optim.load(&optimizer(state, PROJECTION)?, |get| projection.laid_out(get))?;
        }
        if let Some(ema) = &mut self.ema {
            ema.load(file(state, EMA)?, params)?;
        }
        Ok(())
    }

    /// Returns the moving average of the student's weights as a network's state, if one is kept. Waits for the device.
    pub fn averages(&self, student: &Model) -> Result<Option<BTreeMap<String, Tensor>>> {
        let Some(ema) = &self.ema else { return Ok(None) };
        let mut averages = Ema::new(student.params(), self.config.ema)?;
        averages.load(&ema.state(self.student.network().params())?)?;
        averages.weights(student.params()).map(Some)
    }

    /// Trains on one batch; returns the figures of the first step and of every [`StepConfig::log_every`]th after it.
    /// `model` is the student that was uploaded.
    ///
    /// If the loss or the gradient is not finite, the guard stops the update of parameters, moments and moving average.
    /// Running statistics that are not frozen have been updated by the forward pass by then.
    pub fn step(&mut self, model: &Model, batch: Batch, step: u64, lr: f64) -> Result<Option<StepReport>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.config.seed);
        rng.set_stream(step);
        let (mut parts, mut total) = (Vec::new(), None::<Array>);
        let batches = batch.parts(self.config.accumulate)?;
        let last = batches.len().saturating_sub(1);
        for (i, batch) in batches.into_iter().enumerate() {
            let (part, loss) = self.part(model, batch, &mut rng)?;
            total = Some(match total {
                None => loss,
                Some(before) => {
                    let sum = before.device().array(Element::F32, 1)?;
                    blend(&sum, &before, [0.0, 1.0], None)?;
                    blend(&sum, &loss, [1.0, 1.0], None)?;
                    sum
                }
            });
            for (grads, sum) in self.gradients().into_iter().zip(&self.sums) {
                if i < last {
                    blend(sum, grads, [if i == 0 { 0.0 } else { 1.0 }, 1.0], None)?;
                } else {
                    blend(grads, sum, [1.0, 1.0], None)?;
                }
            }
            parts.push(part);
        }
        let flat = self.student.network().params().flat();
        self.guard.measure(flat.grad, self.config.optim.clip_norm as f32, total.as_ref())?;
        self.student_optim.step(&flat, lr, &self.guard, true)?;
        if self.trains_head() {
            self.head_optim.step(&self.head.flat(), lr, &self.guard, false)?;
        }
        if let Some((projection, optim)) = &mut self.projection {
            optim.step(&projection.flat(), lr, &self.guard, false)?;
        }
        if let Some(ema) = &mut self.ema {
            ema.update(self.student.network().params(), &self.guard)?;
        }
        if self.without_gradient.is_none() {
            self.without_gradient = Some(self.zeros()?);
        }
        self.last = Some(Last { parts, step, lr });
        self.num_steps += 1;
        let every = self.config.log_every.max(1) as u64;
        if self.num_steps % every == 1 % every { self.report().map(Some) } else { Ok(None) }
    }

    /// Computes the gradients of a mini-batch, weighted by its share of the batch. Also returns its objective, one f32,
    /// for the guard.
    fn part(&self, model: &Model, batch: Batch, rng: &mut ChaCha8Rng) -> Result<(Part, Array)> {
        let (distill, share) = (&self.config.distill, 1.0 / self.config.accumulate as f64);
        let images = self.student.images(&batch.student.values)?;
        let (embeddings, recording) = self.student.record(model, &images)?;
        let n = batch.labels.len();
        let size = embeddings.len() / n.max(1);
        let weight = distill.margin_weight * share;
        let margin = (weight > 0.0).then(|| self.head.step(&embeddings, &batch.labels, weight, rng)).transpose()?;
        let distilled = match &self.teacher {
            Some(teacher) => {
                let target = teacher.infer(&teacher.images(&batch.teacher.values)?)?;
                let projected = match &self.projection {
                    Some((projection, _)) => projection.forward(&embeddings)?,
                    None => embeddings.clone(),
                };
                let weighted = DistillConfig { lambda: distill.lambda * share, ..distill.clone() };
                let distance = weighted.on_gpu(n, target.len() / n.max(1));
                let margin = margin.as_ref().map(|margin| (&margin.loss, weight as f32));
                let found = distance.with_gradient(&projected, &target, n, margin)?;
                Some(match &self.projection {
                    Some((projection, _)) => {
                        Distilled { gradient: projection.backward(&embeddings, &found.gradient)?, ..found }
                    }
                    None => found,
                })
            }
            None => None,
        };
        let (gradient, total) = match (&margin, &distilled) {
            (Some(margin), None) => (margin.gradient.clone(), margin.loss.clone()),
            (None, Some(distilled)) => (distilled.gradient.clone(), distilled.total.clone()),
            (Some(margin), Some(distilled)) => {
                let sum = embeddings.device().array(Element::F32, embeddings.len())?;
                let seen = |x| Seen { x, norm: None };
                apply(seen(&margin.gradient), Some(seen(&distilled.gradient)), size, &sum)?;
                (sum, distilled.total.clone())
            }
            (None, None) => return Err(Error::Training("all loss weights are 0".into())),
        };
        recording.backward(&gradient)?;
        let distance = distilled.map(|distilled| distilled.distance);
        Ok((Part { embeddings, margin, distance, labels: batch.labels }, total))
    }

    /// Returns the names of the trained parameters whose gradient is zero everywhere. Waits for the device.
    fn zeros(&self) -> Result<Vec<String>> {
        let params = self.student.network().params();
        let mut all = params.restored(params.flat().grad, Group::Updated)?;
        if self.trains_head() {
            all.extend(named(HEAD, self.head.restored(self.head.flat().grad)?));
        }
        if let Some((projection, _)) = &self.projection {
            all.extend(named(PROJECTION, projection.restored(projection.flat().grad)?));
        }
        let mut zeros = Vec::new();
        for (name, gradient) in all {
            if Values::of("gradient", &gradient)?.iter().all(|g| *g == 0.0) {
                zeros.push(name);
            }
        }
        Ok(zeros)
    }

    /// Returns the figures of the last step. Waits for the device.
    ///
    /// # Errors
    /// When a step since the start had a loss or gradient that was not finite.
    fn report(&self) -> Result<StepReport> {
        let Some(last) = &self.last else { return Ok(StepReport::default()) };
        let (distill, share) = (&self.config.distill, 1.0 / self.config.accumulate as f64);
        let (mut figures, mut num_images) = (Figures::default(), 0);
        for Part { embeddings, margin, distance, labels } in &last.parts {
            num_images += labels.len();
            figures.add_directions(&embeddings.read()?, embeddings.len() / labels.len().max(1));
            if let Some(margin) = margin {
                figures.margin_loss += distill.margin_weight * share * f64::from(margin.loss.read::<f32>()?[0]);
                let cosines = margin.targets.read::<f32>()?.into_iter().zip(labels);
                let known = cosines.map(|(cosine, label)| if *label < 0 { f64::NAN } else { cosine.into() });
                figures.target_cosines.extend(known);
            }
            if let Some(distance) = distance {
                figures.distill_loss += share * f64::from(distance.read::<f32>()?[0]);
            }
        }
        let (report, state) = (figures.report(num_images, distill.lambda), self.guard.read()?);
        if state.num_skipped > 0 {
            let what = format!(
                "{} of the steps up to {} had a non-finite loss or gradient and updated no parameters: loss {}, \
                 gradient norm {}; try a lower learning rate",
                state.num_skipped, last.step, report.loss, state.norm
            );
            return Err(Error::Training(what));
        }
        Ok(StepReport { grad_norm: f64::from(state.norm), lr: last.lr, ..report })
    }

    /// Copies weights and running statistics to the student and the head, and returns the figures of the last step.
    /// Waits for the device.
    pub fn synchronise(&self, student: &Model, head: &MarginHead) -> Result<StepReport> {
        let report = self.report()?;
        self.student.network().download(student.params())?;
        if self.trains_head() {
            self.head.download(head)?;
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests;
