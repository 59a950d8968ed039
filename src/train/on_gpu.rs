//! The training step on a GPU. Everything is queued, from the images to the update; the host waits where figures are read.

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

/// Steps between those whose figures are read.
const REPORT_EVERY: u64 = 20;

/// A student, its head and optimisers on a GPU, and the teacher it learns from.
pub(super) struct GpuTrainer {
    student: OnGpu,
    head: GpuHead,
    teacher: Option<OnGpu>,
    config: StepConfig,
    student_optim: GpuOptimizer,
    head_optim: GpuOptimizer,
    /// To the length of the teacher's embeddings, if that is another.
    projection: Option<(GpuProjection, GpuOptimizer)>,
    ema: Option<GpuEma>,
    /// Where the gradients of a batch's parts before the last are added up, if it has several.
    sums: Vec<Array>,
    guard: Guard,
    /// Steps so far.
    num_steps: u64,
    last: Option<Last>,
    /// The trained parameters to which the first step gave no gradient at all: they do not learn.
    pub without_gradient: Option<Vec<String>>,
}

/// What the last step left on the device.
struct Last {
    parts: Vec<Part>,
    step: u64,
    lr: f64,
}

/// What a part of a batch left on the device.
struct Part {
    embeddings: Array,
    margin: Option<OfBatch>,
    distance: Option<Array>,
    labels: Vec<i64>,
}

impl GpuTrainer {
    /// Copies all that training needs to the student's machine.
    pub fn new(student: &Model, head: &MarginHead, teacher: Option<&Model>, config: &StepConfig) -> Result<Self> {
        let Some(gpu) = student.machine().gpu() else {
            return Err(Error::Training(format!("the student's machine is {}", student.machine())));
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

    /// Where the gradients of the student, the head and the projection are.
    fn gradients(&self) -> Vec<&Array> {
        let of_head = self.trains_head().then(|| self.head.flat().grad);
        let of_projection = self.projection.as_ref().map(|(projection, _)| projection.flat().grad);
        [self.student.network().params().flat().grad].into_iter().chain(of_head).chain(of_projection).collect()
    }

    /// What later steps depend on beside the student and the head, by the file that it is kept in; as that of a trainer on the CPU.
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

    /// Goes on with [`Self::state`] of another trainer of the same kind, on a GPU or not.
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

    /// The average of the student's weights, if one is kept, as a network's state; waits for the device.
    pub fn averages(&self, student: &Model) -> Result<Option<BTreeMap<String, Tensor>>> {
        let Some(ema) = &self.ema else { return Ok(None) };
        let mut averages = Ema::new(student.params(), self.config.ema)?;
        averages.load(&ema.state(self.student.network().params())?)?;
        averages.weights(student.params()).map(Some)
    }

    /// Trains on one batch; the figures of every [`REPORT_EVERY`]th step are read. `model` is the student that was uploaded.
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
        if self.num_steps % REPORT_EVERY == 1 { self.report().map(Some) } else { Ok(None) }
    }

    /// Writes the gradients of a part of a batch, each weighing as much as its images do; returns its objective too, one f32, for the guard.
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
            (None, None) => return Err(Error::Training("no loss has a weight".into())),
        };
        recording.backward(&gradient)?;
        let distance = distilled.map(|distilled| distilled.distance);
        Ok((Part { embeddings, margin, distance, labels: batch.labels }, total))
    }

    /// The trained parameters whose gradients are zero everywhere, by name; waits for the device.
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

    /// The figures of the last step; waits for the device.
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
                "{} of the steps up to {} had a loss or gradient that is not finite, and changed nothing: loss {}, gradient \
                 norm {}; try a lower rate",
                state.num_skipped, last.step, report.loss, state.norm
            );
            return Err(Error::Training(what));
        }
        Ok(StepReport { grad_norm: f64::from(state.norm), lr: last.lr, ..report })
    }

    /// Copies weights and running statistics back, and returns the figures of the last step; waits for the device.
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
