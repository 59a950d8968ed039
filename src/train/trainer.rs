//! The trainer: forward passes of teacher and student, losses, gradients, updates, on any device.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::checkpoint::Header;
use super::step_config::StepConfig;
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::losses::{
    CentreKind, MarginConfig, MarginHead, Projection, RankRows, RankThresholds, rank_loss_with_gradient,
};
use crate::machine::Work;
use crate::models::{Arch, Embedder, Model, Outline, Trainable};
use crate::nn::Group;
use crate::nn::engine::Activations;
use crate::ops::backend::{Backend, Kernels};
use crate::optim::{Average, Component};
use crate::records::StepReport;

/// Batch size that the teacher's inference is prepared for.
const TEACHER_BATCH: usize = 16;

/// Tensors of a trainer's state by file, then by name.
pub type State = BTreeMap<String, BTreeMap<String, Tensor>>;

/// Files of a trainer's state.
pub(super) const BACKBONE: &str = "backbone";
pub(super) const HEADER: &str = "header";
const OPTIMIZER: &str = "optimizer";
const EMA: &str = "ema";
const PROJECTION: &str = "projection";
const RANK: &str = "rank";
const THRESHOLDS: &str = "thresholds";

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

    /// Returns the figures of the last step; waits for a GPU.
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
    margin: MarginConfig,
    network: Trainable<B>,
    teacher: Option<Embedder<B>>,
    student: Component<B>,
    head: Component<B>,
    /// Length of the student's embeddings.
    embedding_size: usize,
    /// Map to the length of the teacher's embeddings, if it differs from the student's.
    projection: Option<(Projection, Component<B>)>,
    average: Option<Average<B>>,
    /// The teacher's thresholds of the rank loss.
    thresholds: RankThresholds,
    guard: B::Guard,
    /// Number of steps so far.
    num_steps: u64,
    last: Option<Last<B>>,
    without_gradient: Option<Vec<String>>,
}

/// Results of the last step, on the device.
struct Last<B: Kernels> {
    parts: Vec<Part<B>>,
    step: u64,
    lr: f64,
}

/// Results of one mini-batch, on the device.
struct Part<B: Kernels> {
    embeddings: B::Array,
    labels: Vec<i64>,
    /// Margin loss and target cosines.
    margin: Option<(B::Scalar, B::Array)>,
    distance: Option<B::Scalar>,
    rank: Option<B::Scalar>,
    /// Distance between the views of pairs.
    agreement: Option<B::Scalar>,
}

/// A sum of gradients, of which there may be none.
struct Sum<'a, B: Backend> {
    backend: &'a B,
    sum: Option<B::Array>,
}

impl<'a, B: Backend> Sum<'a, B> {
    fn new(backend: &'a B) -> Self {
        Self { backend, sum: None }
    }

    fn add(&mut self, gradient: B::Array) -> Result<()> {
        match &mut self.sum {
            Some(sum) => self.backend.add(sum, &gradient)?,
            None => self.sum = Some(gradient),
        }
        Ok(())
    }
}

impl<B: Kernels> TrainerOn<B> {
    fn new(backend: &B, New { student, head, teacher, config }: New) -> Result<Self> {
        let component = |name, params| Component::new(name, params, &config.optim, config.accumulate);
        let from = student.config().embedding_size;
        // Centres that are the teacher's have the length of its embeddings.
        let of_centres = config.distill.has_teacher_centres().then(|| head.embedding_size()).transpose()?;
        let of_teacher = teacher.map(|teacher| teacher.config().embedding_size);
        let to = of_teacher.or(of_centres).filter(|to| *to != from);
        let projection = to.map(|to| {
            let projection = Projection { from, to };
            let params = projection.params(backend, config.projection_seed())?;
            Ok::<_, Error>((projection, component(PROJECTION, params)?))
        });
        let activations = if config.recompute { Activations::Recomputed } else { Activations::Kept };
        let (network, params) = Trainable::new(backend, student, activations)?;
        let trains_head = config.distill.trains_head();
        let average = (config.ema > 0.0).then(|| Average::new(&params, config.ema)).transpose()?;
        Ok(Self {
            margin: head.config().clone(),
            embedding_size: from,
            network,
            teacher: teacher.map(|teacher| Embedder::new(backend, teacher, TEACHER_BATCH)).transpose()?,
            student: component("student", params)?,
            head: Component::new(
                "head",
                head.on(backend)?,
                &config.optim,
                if trains_head { config.accumulate } else { 1 },
            )?,
            projection: projection.transpose()?,
            average,
            thresholds: RankThresholds::default(),
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
        let head = self.config.distill.trains_head();
        let projection = self.projection.as_mut().map(|(_, component)| component);
        [&mut self.student].into_iter().chain(head.then_some(&mut self.head)).chain(projection)
    }

    fn step_inside(&mut self, batch: Batch, step: u64, lr: f64) -> Result<Option<StepReport>> {
        let buffers = if B::IS_SYNCHRONOUS { Some(self.student.params.buffers()?) } else { None };
        let mut rng = ChaCha8Rng::seed_from_u64(self.config.seed);
        rng.set_stream(step);
        let (batches, mut parts) = (batch.parts(self.config.accumulate)?, Vec::new());
        let num = batches.len();
        for (i, batch) in batches.into_iter().enumerate() {
            parts.push(self.part(batch, &mut rng)?);
            self.trained().try_for_each(|component| component.accumulate(i, num))?;
        }
        let losses: Vec<_> = parts.iter().flat_map(|part| part.losses(&self.config)).collect();
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

    /// Computes the gradients of a mini-batch, weighted by its share of the batch.
    fn part(&mut self, batch: Batch, rng: &mut ChaCha8Rng) -> Result<Part<B>> {
        let Self {
            backend,
            config,
            margin,
            network,
            teacher,
            student,
            head,
            projection,
            embedding_size,
            thresholds,
            ..
        } = self;
        let (distill, share) = (&config.distill, 1.0 / config.accumulate as f64);
        let (n, num_views) = (batch.student.num_images, batch.num_views());
        let labels = batch.labels.repeat(num_views);
        let (embeddings, recording) = network.record(&mut student.params, &batch.student)?;
        let target = match teacher {
            Some(teacher) => {
                let mut target = teacher.embed(&batch.teacher)?;
                if distill.mirror {
                    backend.add(&mut target, &teacher.embed(&batch.teacher.mirrored())?)?;
                }
                Some(if num_views > 1 { backend.join(&vec![&target; num_views])? } else { target })
            }
            None => None,
        };
        let forward =
            |(map, component): &mut (Projection, Component<B>)| map.forward(&component.params, &embeddings, n);
        let projected = projection.as_mut().map(forward).transpose()?;
        // In the space of the teacher.
        let compared = projected.as_ref().unwrap_or(&embeddings);
        let (mut of_embeddings, mut of_compared) = (Sum::new(backend), Sum::new(backend));
        let (mut margin_loss, mut distance, mut rank, mut agreement) = (None, None, None, None);
        if distill.has_margin() {
            if let (CentreKind::Adaptive, Some(target)) = (distill.centres, &target) {
                backend.pull_centres(head.params.values_mut(), compared, target, &labels)?;
            }
            let of_teacher = distill.has_teacher_centres();
            let rows = if of_teacher { compared } else { &embeddings };
            let weight = distill.margin_weight * share;
            let found = margin.loss_and_gradients(rows, &mut head.params, &labels, weight, rng)?;
            if of_teacher { &mut of_compared } else { &mut of_embeddings }.add(found.of_embeddings)?;
            margin_loss = Some((found.loss, found.target_cosines));
        }
        if let Some(target) = target.as_ref().filter(|_| distill.lambda > 0.0) {
            let weights = row_weights(&batch.covered, distill.covered_weight);
            let weight = distill.lambda * share;
            let (found, gradient) = backend.distance(compared, target, n, distill.kind, weight, weights.as_deref())?;
            of_compared.add(gradient)?;
            distance = Some(found);
        }
        if let Some(target) = target.as_ref().filter(|_| distill.rank_weight > 0.0) {
            let rows = RankRows { labels: &labels, num_images: n / num_views };
            let (student, teacher) = (backend.read(compared)?, backend.read(target)?);
            let weight = distill.rank_weight * share;
            let (found, gradient) = rank_loss_with_gradient(&student, &teacher, rows, thresholds, weight)?;
            of_compared.add(backend.upload(gradient)?)?;
            rank = Some(backend.scalar(found)?);
        }
        if distill.agreement > 0.0 && num_views == 2 {
            let (half, elements) = (n / 2, distill.agreement * share);
            let len = half * *embedding_size;
            let [a, b] = [0..len, len..2 * len].map(|part| backend.part(&embeddings, part));
            let (a, b) = (a?, b?);
            let (found, of_a) = backend.distance(&a, &b, half, distill.kind, elements, None)?;
            let (_, of_b) = backend.distance(&b, &a, half, distill.kind, elements, None)?;
            of_embeddings.add(backend.join(&[&of_a, &of_b])?)?;
            agreement = Some(found);
        }
        if let Some(gradient) = of_compared.sum {
            of_embeddings.add(match projection {
                Some((map, component)) => map.backward(&mut component.params, &embeddings, &gradient, n)?,
                None => gradient,
            })?;
        }
        let gradient = of_embeddings.sum.ok_or_else(|| Error::Training("all loss weights are 0".into()))?;
        recording.backward(&mut student.params, &gradient)?;
        Ok(Part { embeddings, labels, margin: margin_loss, distance, rank, agreement })
    }

    /// Updates all components with the gradients of a batch. Only the student's are clipped.
    fn update(&mut self, lr: f64) -> Result<()> {
        let (head, guard) = (self.config.distill.trains_head(), &self.guard);
        self.student.update(lr, guard, true)?;
        if head {
            self.head.update(lr, guard, false)?;
        }
        if let Some((_, component)) = &mut self.projection {
            component.update(lr, guard, false)?;
        }
        if let Some(average) = &mut self.average {
            average.update(&self.student.params, guard)?;
        }
        Ok(())
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

impl<B: Kernels> Part<B> {
    /// Losses with their weights in the objective.
    fn losses(&self, config: &StepConfig) -> impl Iterator<Item = (f64, &B::Scalar)> {
        let (distill, share) = (&config.distill, 1.0 / config.accumulate as f64);
        let margin = self.margin.as_ref().map(|(loss, _)| (distill.margin_weight * share, loss));
        let distance = self.distance.as_ref().map(|distance| (distill.lambda * share, distance));
        let rank = self.rank.as_ref().map(|loss| (distill.rank_weight * share, loss));
        let agreement = self.agreement.as_ref().map(|distance| (distill.agreement * share, distance));
        margin.into_iter().chain(distance).chain(rank).chain(agreement)
    }
}

impl<B: Kernels> DeviceTrainer for TrainerOn<B> {
    fn step(&mut self, batch: Batch, step: u64, lr: f64) -> Result<Option<StepReport>> {
        B::enter(|| self.step_inside(batch, step, lr))
    }

    fn report(&self) -> Result<StepReport> {
        let Some(last) = &self.last else { return Ok(StepReport::default()) };
        let (distill, share) = (&self.config.distill, 1.0 / self.config.accumulate as f64);
        let mut report = StepReport { lr: last.lr, ..StepReport::default() };
        let (mut directions, mut num_images) = (Vec::new(), 0);
        for Part { embeddings, labels, margin, distance, rank, agreement } in &last.parts {
            num_images += labels.len();
            add_directions(&mut directions, &self.backend.read(embeddings)?, labels.len());
            if let Some((loss, cosines)) = margin {
                report.margin_loss += distill.margin_weight * share * self.backend.read_scalar(loss)?;
                let cosines = self.backend.read(cosines)?;
                let known = cosines.iter().zip(labels);
                let known = known.map(|(cosine, label)| if *label < 0 { f64::NAN } else { f64::from(*cosine) });
                report.target_cosines.extend(known);
            }
            if let Some(distance) = distance {
                report.distill_loss += share * self.backend.read_scalar(distance)?;
            }
            if let Some(rank) = rank {
                report.rank_loss += distill.rank_weight * share * self.backend.read_scalar(rank)?;
            }
            if let Some(agreement) = agreement {
                report.agreement_loss += distill.agreement * share * self.backend.read_scalar(agreement)?;
            }
        }
        report.conclude(&directions, num_images, distill.lambda);
        let state = self.backend.read_guard(&self.guard)?;
        if state.num_skipped > 0 && !B::IS_SYNCHRONOUS {
            return Err(Error::Training(format!(
                "{} of the steps up to {} had a non-finite loss or gradient and updated no parameters: loss {}, \
                 gradient norm {}; try a lower learning rate",
                state.num_skipped, last.step, report.loss, state.norm as f32
            )));
        }
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
        [trained + self.student.params.len(Group::Fixed), trained, self.head.params.len(Group::Trained)]
    }

    fn backbone(&self) -> Result<BTreeMap<String, Tensor>> {
        self.report()?;
        Ok(self.student.params.state()?)
    }

    fn header(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(self.head.params.state()?)
    }

    #[cfg(test)]
    fn student_params(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(self.student.params.state()?)
    }

    fn average(&self) -> Result<Option<BTreeMap<String, Tensor>>> {
        self.report()?;
        Ok(self.average.as_ref().map(|average| average.weights(&self.student.params)).transpose()?)
    }

    fn state(&self) -> Result<State> {
        let components = [&self.student, &self.head].into_iter().chain(self.projection.as_ref().map(|(_, c)| c));
        let mut optimizers = BTreeMap::new();
        for component in components {
            optimizers.extend(component.optimizer_state()?);
        }
        let mut state = State::from([
            (BACKBONE.to_owned(), self.backbone()?),
            (HEADER.to_owned(), self.header()?),
            (OPTIMIZER.to_owned(), optimizers),
        ]);
        if let Some((_, component)) = &self.projection {
            state.insert(PROJECTION.to_owned(), component.params.state()?);
        }
        if let Some(values) = self.thresholds.values {
            let values = Tensor::new(&values, &Device::Cpu)?;
            state.insert(RANK.to_owned(), BTreeMap::from([(THRESHOLDS.to_owned(), values)]));
        }
        if let Some(average) = &self.average {
            state.insert(EMA.to_owned(), average.state(&self.student.params)?);
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &State) -> Result<()> {
        let file = |name: &str| {
            state.get(name).ok_or_else(|| Error::Training(format!("the training checkpoint has no {name}")))
        };
        self.student.params.load(file(BACKBONE)?)?;
        self.head.params.load(file(HEADER)?)?;
        if let Some((_, component)) = &mut self.projection {
            component.params.load(file(PROJECTION)?)?;
            component.load_optimizer(file(OPTIMIZER)?)?;
        }
        for component in [&mut self.student, &mut self.head] {
            component.load_optimizer(file(OPTIMIZER)?)?;
        }
        if let Some(values) = state.get(RANK).and_then(|file| file.get(THRESHOLDS)) {
            let values = values.to_vec1::<f64>()?;
            let what = || Error::Training(format!("the training checkpoint has {} thresholds of ranks", values.len()));
            self.thresholds.values = Some(values.as_slice().try_into().map_err(|_| what())?);
        }
        if let Some(average) = &mut self.average {
            average.load(file(EMA)?, &self.student.params)?;
        }
        Ok(())
    }
}

/// Returns the weights of rows that are covered to these shares, 1 on average; none if all are 1.
fn row_weights(covered: &[f32], covered_weight: f64) -> Option<Vec<f32>> {
    let weights: Vec<f64> = covered.iter().map(|share| 1.0 + covered_weight * f64::from(*share)).collect();
    let mean = weights.iter().sum::<f64>() / weights.len().max(1) as f64;
    (covered_weight > 0.0).then(|| weights.into_iter().map(|weight| (weight / mean) as f32).collect())
}

/// Adds the directions of `n` embeddings, given row by row, to their sum.
fn add_directions(sum: &mut Vec<f64>, embeddings: &[f32], n: usize) {
    let d = embeddings.len() / n.max(1);
    sum.resize(d, 0.0);
    for row in embeddings.chunks_exact(d.max(1)) {
        let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v) / norm);
    }
}

#[cfg(test)]
mod tests;
