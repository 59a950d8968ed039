//! The trainer: the student's forward and backward pass, updates, on any device.

use std::collections::BTreeMap;

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::buckets::Buckets;
use super::checkpoint::Header;
use super::objective::{Losses, Objective, State, file};
use super::step_config::StepConfig;
use crate::data::Batch;
use crate::dist::{Ranks, RowOrder};
use crate::error::{Error, Result};
use crate::losses::MarginHead;
use crate::machine::Work;
use crate::models::{Arch, Model, Outline, Trainable};
use crate::nn::Group;
use crate::nn::engine::{Activations, SharedBatch};
use crate::ops::backend::{GuardState, Kernels};
use crate::optim::{Average, Component};
use crate::records::StepReport;

/// Files of a trainer's state, beside those of its objective.
const BACKBONE: &str = "backbone";
pub(super) const OPTIMIZER: &str = "optimizer";
const EMA: &str = "ema";

/// Trains a student and its head, optionally with a teacher to distil from.
///
/// ```
/// use candle_core::Device;
/// use maskinv::data::{Loader, Transform};
/// use maskinv::losses::MarginHead;
/// use maskinv::models::Model;
/// use maskinv::train::{Arm, Trainer, preset};
///
/// # fn main() -> maskinv::Result<()> {
/// let mut config = preset("procedural")?;
/// for setting in ["data.procedural.num_identities=4", "loader.batch_size=8", "model.width=0.125"] {
///     config.set(setting)?;
/// }
/// let faces = config.data.open_train()?;
/// let student = Model::new(&config.model, &Device::Cpu, 0)?;
/// let size = config.model.embedding_size;
/// let head = MarginHead::new(&config.loss, size, faces.num_identities(), &Device::Cpu, 1)?;
/// let transform = Transform::new(&config.augment, &config.mask)?;
/// let loader = Loader::new(faces, transform, &config.loader, config.model.input_size, 0)?;
/// let mut trainer = Trainer::new(student, head, None, &config.step(Arm::Aug))?;
/// for (step, batch) in loader.epoch(0).take(2).enumerate() {
///     let report = trainer.step(batch?, step as u64, 0.01)?;
///     println!("{:?}", report.map(|report| report.loss));
/// }
/// # Ok(())
/// # }
/// ```
pub struct Trainer {
    engine: Box<dyn DeviceTrainer>,
    outline: Outline,
    has_margin: bool,
}

/// A trainer on a device.
trait DeviceTrainer: Send {
    fn step(&mut self, batch: Batch, step: u64, lr: f64) -> Result<Option<StepReport>>;
    fn report(&self) -> Result<StepReport>;
    fn without_gradient(&self) -> &[String];
    fn activation_bytes(&self, n: usize) -> Option<usize>;
    fn num_elements(&self) -> [usize; 3];
    fn backbone(&self) -> Result<BTreeMap<String, Tensor>>;
    fn header(&self) -> Result<BTreeMap<String, Tensor>>;
    /// The student's parameters, whether or not all steps were finite.
    #[cfg(test)]
    fn student_params(&self) -> Result<BTreeMap<String, Tensor>>;
    fn average(&self) -> Result<Option<BTreeMap<String, Tensor>>>;
    fn state(&self) -> Result<State>;
    fn load_state(&mut self, state: &State) -> Result<()>;
}

impl Trainer {
    /// Returns a trainer on the student's machine, where the teacher must be too. The teacher is used if the
    /// distillation loss has a weight. If its embeddings have a different length from the student's, a projection to
    /// that length is trained with the student.
    ///
    /// # Errors
    /// When memory for the optimisers cannot be allocated, the teacher is missing or has a different input size, or the
    /// machine does not support a network or a setting of `config`.
    pub fn new(student: Model, head: MarginHead, teacher: Option<&Model>, config: &StepConfig) -> Result<Self> {
        let wrong = |what: String| Err(Error::Training(what));
        let distill = &config.distill;
        let teacher = match (teacher, distill.embeds_teacher()) {
            (_, false) => None,
            (None, true) => return wrong("distillation needs a teacher".into()),
            (Some(teacher), true) => Some(teacher),
        };
        if let Some(teacher) = teacher {
            let (t, s) = (teacher.config().input_size, student.config().input_size);
            if t != s {
                return wrong(format!("the teacher sees images of {t} pixels, the student of {s}"));
            }
            let (t, s) = (teacher.machine(), student.machine());
            // The runtime of other architectures has no other device.
            if !s.is_cpu() && t.is_cpu() && teacher.config().arch != Arch::Onnx {
                return wrong(format!("the teacher is not on the student's machine: {t}, {s}"));
            }
        }
        if distill.lambda == 0.0 && distill.margin_weight == 0.0 {
            return wrong("all loss weights are 0".into());
        }
        let (outline, machine) = (Outline::of(&student), student.machine().clone());
        let engine = machine.run(New { student, head, teacher, config: config.clone() })?;
        Ok(Self { engine, outline, has_margin: config.distill.has_margin() })
    }

    /// Trains on one batch with learning rate `lr`; `step` counts from 0 and seeds the margins. Returns the step's
    /// figures; on a GPU, which runs asynchronously, only in the first step and every [`StepConfig::log_every`]th after
    /// it.
    ///
    /// # Errors
    /// When a tensor operation fails; running statistics may have been updated by then, parameters have not. On a GPU
    /// also when a loss or gradient was not finite, which is detected when figures are read: no such step updated a
    /// parameter, but the running statistics are corrupt.
    pub fn step(&mut self, batch: Batch, step: u64, lr: f64) -> Result<Option<StepReport>> {
        self.engine.step(batch, step, lr)
    }

    /// Returns the figures of the last step; waits for a GPU. Of several ranks, all must call it.
    ///
    /// # Errors
    /// On a GPU, when a step since the start had a loss or gradient that was not finite.
    pub fn report(&self) -> Result<StepReport> {
        self.engine.report()
    }

    /// Returns the names of the trained parameters whose gradient was zero everywhere in the first step: they do not
    /// learn. Empty before the first step.
    pub fn without_gradient(&self) -> &[String] {
        self.engine.without_gradient()
    }

    /// Returns the approximate peak size, in bytes, of the activations of a mini-batch of `n` images and their
    /// gradients; none on a GPU.
    pub fn activation_bytes(&self, n: usize) -> Option<usize> {
        self.engine.activation_bytes(n)
    }

    /// The ranks that train together.
    pub(super) fn ranks(&self) -> &Ranks {
        self.outline.ranks()
    }

    /// Numbers of elements: the student's parameters and buffers, its trained parameters, the head's parameters.
    pub(super) fn num_elements(&self) -> [usize; 3] {
        self.engine.num_elements()
    }

    /// Returns the student with its current weights, frozen.
    ///
    /// # Errors
    /// As [`Self::report`], and when memory for the copy cannot be allocated.
    pub fn student(&self) -> Result<Model> {
        self.outline.model(self.engine.backbone()?)
    }

    /// Returns the weights that are evaluated: the moving average of the student's if one is kept, else the student's.
    ///
    /// # Errors
    /// As [`Self::student`].
    pub fn evaluated(&self) -> Result<Model> {
        match self.engine.average()? {
            Some(average) => Ok(self.outline.model(average)?),
            None => self.student(),
        }
    }

    /// Returns the class centres of `identities`; none if the margin loss has weight 0.
    ///
    /// # Errors
    /// As [`Self::student`].
    pub fn header(&self, identities: Vec<String>) -> Result<Option<Header>> {
        let header = |tensors| Header { tensors, identities: Some(identities) };
        self.has_margin.then(|| self.engine.header()).transpose().map(|tensors| tensors.map(header))
    }

    /// Words drawn so far from dropout's random number generator.
    pub(super) fn dropout_words(&self) -> u64 {
        self.outline.dropout().map_or(0, |dropout| dropout.num_words())
    }

    /// Returns everything that later steps depend on: student, head, optimisers, and the projection and the moving
    /// average if there are any.
    ///
    /// # Errors
    /// As [`Self::student`].
    pub fn state(&self) -> Result<State> {
        self.engine.state()
    }

    /// Restores the [`Self::state`] of a trainer with the same settings, on any machine.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or has the wrong shape.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        self.engine.load_state(state)
    }
}

/// What a trainer is made of.
struct New<'a> {
    student: Model,
    head: MarginHead,
    teacher: Option<&'a Model>,
    config: StepConfig,
}

impl Work for New<'_> {
    type Output = Result<Box<dyn DeviceTrainer>>;

    fn on<B: Kernels>(self, backend: &B) -> Self::Output {
        Ok(Box::new(TrainerOn::new(backend, self)?))
    }
}

struct TrainerOn<B: Kernels> {
    backend: B,
    config: StepConfig,
    ranks: Ranks,
    network: Trainable<B>,
    student: Component<B>,
    objective: Objective<B>,
    average: Option<Average<B>>,
    guard: B::Guard,
    /// Number of steps so far.
    num_steps: u64,
    last: Option<Last<B>>,
    without_gradient: Option<Vec<String>>,
}

/// Results of the last step, on the device.
struct Last<B: Kernels> {
    parts: Vec<Losses<B>>,
    step: u64,
    lr: f64,
}

impl<B: Kernels> TrainerOn<B> {
    fn new(backend: &B, New { student, head, teacher, config }: New) -> Result<Self> {
        let ranks = student.machine().ranks().clone();
        let objective = Objective::new(backend, &ranks, student.config().embedding_size, head, teacher, &config)?;
        let activations = if config.recompute { Activations::Recomputed } else { Activations::Kept };
        let (network, params) = Trainable::new(backend, student, activations)?;
        let average = (config.ema > 0.0).then(|| Average::new(&params, config.ema)).transpose()?;
        Ok(Self {
            network,
            ranks,
            student: Component::new("student", params, &config.optim, config.accumulate)?,
            objective,
            average,
            guard: backend.guard()?,
            num_steps: 0,
            last: None,
            without_gradient: None,
            backend: backend.clone(),
            config,
        })
    }

    /// Components that the losses train.
    fn trained(&mut self) -> impl Iterator<Item = &mut Component<B>> {
        [&mut self.student].into_iter().chain(self.objective.trained())
    }

    fn step_inside(&mut self, batch: Batch, step: u64, lr: f64) -> Result<Option<StepReport>> {
        let buffers = if B::IS_SYNCHRONOUS { Some(self.student.params.buffers()?) } else { None };
        let mut rng = ChaCha8Rng::seed_from_u64(self.config.seed);
        rng.set_stream(step);
        let (batches, mut parts) = (batch.parts(self.config.accumulate)?, Vec::new());
        let num = batches.len();
        let (backend, ranks) = (self.backend.clone(), self.ranks.clone());
        let mut buckets = Buckets::new(&backend, &ranks);
        for (i, batch) in batches.into_iter().enumerate() {
            let rows = RowOrder::new(&self.ranks, batch.student.num_images, batch.num_views());
            let shares_statistics = self.config.sync_batch_norm;
            let shared = SharedBatch { ranks: &self.ranks, rows, shares_statistics };
            let shared = (!self.ranks.is_single()).then_some(shared);
            let (embeddings, recording) = self.network.record(&mut self.student.params, &batch.student, shared)?;
            let (losses, gradient) = self.objective.gradient(embeddings, &batch, &mut rng)?;
            if num == 1 && shared.is_some() {
                let mut sent = Ok(());
                recording.backward_with(&mut self.student.params, &gradient, &mut |grads, range| {
                    if sent.is_ok() {
                        sent = buckets.add(grads, range);
                    }
                })?;
                sent?;
            } else {
                recording.backward(&mut self.student.params, &gradient)?;
            }
            parts.push(losses);
            self.trained().try_for_each(|component| component.accumulate(i, num))?;
        }
        if !ranks.is_single() {
            self.share_step(buckets, num, &mut parts)?;
        }
        let losses: Vec<_> = parts.iter().flat_map(|part| self.objective.weighted(part)).collect();
        self.student.params.measure(&mut self.guard, self.config.optim.clip_norm, &losses)?;
        self.last = Some(Last { parts, step, lr });
        if let Some(buffers) = buffers
            && !self.backend.read_guard(&self.guard)?.is_finite
        {
            self.student.params.restore_buffers(buffers)?;
            return self.report().map(Some);
        }
        if self.without_gradient.is_none() {
            self.without_gradient = Some(self.zeros()?);
        }
        self.update(lr)?;
        self.num_steps += 1;
        let every = if B::IS_SYNCHRONOUS { 1 } else { self.config.log_every.max(1) as u64 };
        if self.num_steps % every == 1 % every { self.report().map(Some) } else { Ok(None) }
    }

    /// Adds the gradients and losses of a step over all ranks. If there was one mini-batch, `buckets` has the student's
    /// gradients on their way.
    fn share_step(&mut self, mut buckets: Buckets<B>, num_parts: usize, parts: &mut [Losses<B>]) -> Result<()> {
        let Self { student, objective, ranks, config, .. } = self;
        if num_parts > 1 {
            let params = &student.params;
            params.ranges_of_grads().try_for_each(|range| buckets.add(params.grads(), range))?;
        }
        buckets.finish(student.params.grads_mut())?;
        objective.share(parts)?;
        if !config.sync_batch_norm {
            // Each rank has updated the running statistics by its own batch.
            student.params.take_buffers_of_first(ranks)?;
        }
        Ok(())
    }

    /// Updates all components with the gradients of a batch. Only the student's are clipped.
    fn update(&mut self, lr: f64) -> Result<()> {
        self.student.update(lr, &self.guard, true)?;
        self.objective.update(lr, &self.guard)?;
        if let Some(average) = &mut self.average {
            average.update(&self.student.params, &self.guard)?;
        }
        Ok(())
    }

    /// Returns what was measured of the last step.
    ///
    /// # Errors
    /// On a GPU, when a step was not finite.
    fn check(&self) -> Result<GuardState> {
        let state = self.backend.read_guard(&self.guard)?;
        let Some(last) = self.last.as_ref().filter(|_| state.num_skipped > 0 && !B::IS_SYNCHRONOUS) else {
            return Ok(state);
        };
        let losses = last.parts.iter().flat_map(|part| self.objective.weighted(part));
        let loss = losses.map(|(weight, loss)| Ok(weight * self.backend.read_scalar(loss)?)).sum::<Result<f64>>()?;
        Err(Error::Training(format!(
            "{} of the steps up to {} had a non-finite loss or gradient and updated no parameters: loss {loss}, \
             gradient norm {}; try a lower learning rate",
            state.num_skipped, last.step, state.norm as f32
        )))
    }

    /// Names of the trained parameters whose gradient is zero everywhere. Waits for the device.
    fn zeros(&mut self) -> Result<Vec<String>> {
        let mut zeros = Vec::new();
        for (i, component) in self.trained().enumerate() {
            let names = component.params.without_gradient()?.into_iter();
            zeros.extend(names.map(|name| if i == 0 { name } else { format!("{}.{name}", component.name) }));
        }
        Ok(zeros)
    }
}

impl<B: Kernels> DeviceTrainer for TrainerOn<B> {
    fn step(&mut self, batch: Batch, step: u64, lr: f64) -> Result<Option<StepReport>> {
        B::enter(|| self.step_inside(batch, step, lr))
    }

    fn report(&self) -> Result<StepReport> {
        let Some(last) = &self.last else { return Ok(StepReport::default()) };
        let report = self.objective.report(&last.parts, last.lr)?;
        let state = self.check()?;
        Ok(StepReport { grad_norm: state.norm, is_skipped: !state.is_finite, ..report })
    }

    fn without_gradient(&self) -> &[String] {
        self.without_gradient.as_deref().unwrap_or_default()
    }

    fn activation_bytes(&self, n: usize) -> Option<usize> {
        B::IS_SYNCHRONOUS.then(|| self.network.activation_bytes(n))
    }

    fn num_elements(&self) -> [usize; 3] {
        let trained = self.student.params.len(Group::Trained);
        [trained + self.student.params.len(Group::Fixed), trained, self.objective.num_in_head()]
    }

    fn backbone(&self) -> Result<BTreeMap<String, Tensor>> {
        self.check()?;
        Ok(self.student.params.state()?)
    }

    fn header(&self) -> Result<BTreeMap<String, Tensor>> {
        self.objective.header()
    }

    #[cfg(test)]
    fn student_params(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(self.student.params.state()?)
    }

    fn average(&self) -> Result<Option<BTreeMap<String, Tensor>>> {
        self.check()?;
        Ok(self.average.as_ref().map(|average| average.weights(&self.student.params)).transpose()?)
    }

    fn state(&self) -> Result<State> {
        let mut optimizers = self.student.optimizer_state()?.collect();
        let mut state = State::from([(BACKBONE.to_owned(), self.backbone()?)]);
        self.objective.add_state(&mut state, &mut optimizers)?;
        state.insert(OPTIMIZER.to_owned(), optimizers);
        if let Some(average) = &self.average {
            state.insert(EMA.to_owned(), average.state(&self.student.params)?);
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &State) -> Result<()> {
        let optimizers = file(state, OPTIMIZER)?;
        self.student.params.load(file(state, BACKBONE)?)?;
        self.student.load_optimizer(optimizers)?;
        self.objective.load_state(state, optimizers)?;
        if let Some(average) = &mut self.average {
            average.load(file(state, EMA)?, &self.student.params)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod rank_tests;
#[cfg(test)]
mod tests;
