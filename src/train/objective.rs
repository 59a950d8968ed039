//! The objective of a training step: its losses, their gradient with respect to the student's embeddings, and what they
//! train besides the student.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;

use super::class_head::ClassHead;
use super::shared_rows::SharedRows;
use super::step_config::StepConfig;
use super::targets::Targets;
use crate::data::Batch;
use crate::dist::Ranks;
use crate::error::{Error, Result};
use crate::losses::{
    CentreKind, DistillConfig, MarginHead, Projection, RankRows, RankThresholds, rank_loss_with_gradient,
};
use crate::models::Model;
use crate::ops::backend::{Backend, Kernels};
use crate::optim::Component;
use crate::records::StepReport;

/// Tensors of a trainer's state by file, then by name.
pub type State = BTreeMap<String, BTreeMap<String, Tensor>>;

/// Files of the objective's state.
pub(super) const HEADER: &str = "header";
/// Prefix of the names of the moments of the class centres in the state of the optimisers.
pub(super) const HEAD_MOMENTS: &str = "head.";
const PROJECTION: &str = "projection";
const RANK: &str = "rank";
const THRESHOLDS: &str = "thresholds";

/// The losses of a training step, with the teacher and the trained parameters that they need.
pub(super) struct Objective<B: Kernels> {
    backend: B,
    ranks: Ranks,
    distill: DistillConfig,
    /// Share of a mini-batch in its batch.
    share: f64,
    targets: Option<Targets<B>>,
    head: ClassHead<B>,
    /// Length of the student's embeddings.
    embedding_size: usize,
    /// Map to the length of the teacher's embeddings, if it differs from the student's.
    projection: Option<(Projection, Component<B>)>,
    /// The teacher's thresholds of the rank loss.
    thresholds: RankThresholds,
}

/// Losses of a mini-batch, without their weights, on the device; those without a weight are absent. [`Objective::share`]
/// makes those of this rank's images those of all ranks'.
pub(super) struct Losses<B: Kernels> {
    /// Embeddings of this rank's images.
    embeddings: B::Array,
    /// Labels of the embeddings on all ranks.
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

impl<B: Kernels> Objective<B> {
    /// Returns the objective for a student whose embeddings have length `embedding_size`.
    pub fn new(
        backend: &B,
        ranks: &Ranks,
        embedding_size: usize,
        head: MarginHead,
        teacher: Option<&Model>,
        config: &StepConfig,
    ) -> Result<Self> {
        let distill = &config.distill;
        // Centres that are the teacher's have the length of its embeddings.
        let of_centres = distill.has_teacher_centres().then(|| head.embedding_size()).transpose()?;
        let of_teacher = teacher.map(|teacher| teacher.config().embedding_size);
        let to = of_teacher.or(of_centres).filter(|to| *to != embedding_size);
        let projection = to.map(|to| {
            let projection = Projection { from: embedding_size, to };
            let params = projection.params(backend, config.projection_seed())?;
            Ok::<_, Error>((projection, Component::new(PROJECTION, params, &config.optim, config.accumulate)?))
        });
        Ok(Self {
            ranks: ranks.clone(),
            targets: teacher.map(|teacher| Targets::new(backend, teacher, config)).transpose()?,
            head: ClassHead::new(backend, head, ranks, config)?,
            embedding_size,
            projection: projection.transpose()?,
            thresholds: RankThresholds::default(),
            share: 1.0 / config.accumulate as f64,
            distill: distill.clone(),
            backend: backend.clone(),
        })
    }

    /// Components that the losses train besides the student, and all of whose parameters get a gradient.
    pub fn trained(&mut self) -> impl Iterator<Item = &mut Component<B>> {
        self.head.trained().into_iter().chain(self.projection.as_mut().map(|(_, component)| component))
    }

    /// Computes the losses of a mini-batch and their gradient with respect to the student's embeddings of its views,
    /// and sets the gradients of the [`Self::trained`] components; all gradients are weighted by the mini-batch's share
    /// of the batch.
    pub fn gradient(
        &mut self,
        embeddings: B::Array,
        batch: &Batch,
        rng: &mut ChaCha8Rng,
    ) -> Result<(Losses<B>, B::Array)> {
        let (n, num_views) = (batch.student.num_images, batch.num_views());
        let target = self.target(batch)?;
        let weights = self.row_weights(&batch.covered)?;
        let Self { backend, ranks, distill, share, head, projection, embedding_size, thresholds, .. } = self;
        let rows = SharedRows::new(backend, ranks, n, num_views);
        let labels = rows.labels(batch.labels.repeat(num_views))?;
        // Of a mean over the rows of all ranks, and of one over those of this rank.
        let (share, own_share) = (*share, *share / ranks.size() as f64);
        let forward =
            |(map, component): &mut (Projection, Component<B>)| map.forward(&component.params, &embeddings, n);
        let projected = projection.as_mut().map(forward).transpose()?;
        // In the space of the teacher.
        let compared = projected.as_ref().unwrap_or(&embeddings);
        let (mut of_embeddings, mut of_compared) = (Sum::new(backend), Sum::new(backend));
        let (mut margin_loss, mut distance, mut rank, mut agreement) = (None, None, None, None);
        if distill.has_margin() {
            let of_teacher = distill.has_teacher_centres();
            let of_compared_rows = projection.as_ref().map_or(*embedding_size, |(projection, _)| projection.to);
            let (own, width) = if of_teacher { (compared, of_compared_rows) } else { (&embeddings, *embedding_size) };
            let all = rows.all(own, width)?;
            let all = all.as_ref().unwrap_or(own);
            if let (CentreKind::Adaptive, Some(target)) = (distill.centres, &target) {
                let all_targets = rows.all(target, width)?;
                head.pull(all, all_targets.as_ref().unwrap_or(target), &labels)?;
            }
            let found = head.loss(all, &labels, distill.margin_weight * share, rng)?;
            let gradient = rows.own_of_sum(found.of_embeddings, width)?;
            if of_teacher { &mut of_compared } else { &mut of_embeddings }.add(gradient)?;
            margin_loss = Some((found.loss, found.target_cosines));
        }
        if let Some(target) = target.as_ref().filter(|_| distill.lambda > 0.0) {
            let weight = distill.lambda * own_share;
            let (found, gradient) = backend.distance(compared, target, n, distill.kind, weight, weights.as_deref())?;
            of_compared.add(gradient)?;
            distance = Some(found);
        }
        if let Some(target) = target.as_ref().filter(|_| distill.rank_weight > 0.0) {
            let of_rows = RankRows { labels: &labels, num_images: labels.len() / num_views };
            let (student, teacher) = (rows.all_values(compared)?, rows.all_values(target)?);
            let weight = distill.rank_weight * share;
            let (found, gradient) = rank_loss_with_gradient(&student, &teacher, of_rows, thresholds, weight)?;
            of_compared.add(backend.upload(rows.own(gradient))?)?;
            rank = Some(backend.scalar(found)?);
        }
        if distill.agreement > 0.0 && num_views == 2 {
            let (half, weight) = (n / 2, distill.agreement * own_share);
            let len = half * *embedding_size;
            let [a, b] = [0..len, len..2 * len].map(|part| backend.part(&embeddings, part));
            let (a, b) = (a?, b?);
            let (found, of_a) = backend.distance(&a, &b, half, distill.kind, weight, None)?;
            let (_, of_b) = backend.distance(&b, &a, half, distill.kind, weight, None)?;
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
        Ok((Losses { embeddings, labels, margin: margin_loss, distance, rank, agreement }, gradient))
    }

    /// Adds the projection's gradients over all ranks, and makes the losses of this rank's images the means over all.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn share(&mut self, parts: &mut [Losses<B>]) -> Result<()> {
        let (backend, ranks) = (&self.backend, &self.ranks);
        if let Some((_, component)) = &mut self.projection {
            let params = &mut component.params;
            let bucket = backend.send(params.grads(), params.ranges_of_grads().collect(), ranks)?;
            backend.receive(bucket, params.grads_mut())?;
        }
        let mut numbers: Vec<&mut B::Scalar> = Vec::new();
        for Losses { distance, agreement, .. } in parts {
            numbers.extend(distance.iter_mut().chain(agreement));
        }
        if !numbers.is_empty() {
            backend.average_scalars(&mut numbers, ranks)?;
        }
        Ok(())
    }

    /// Returns the weights of this rank's rows, which are covered to these shares, 1 on average over all ranks; none if
    /// all are 1.
    fn row_weights(&self, covered: &[f32]) -> Result<Option<Vec<f32>>> {
        let factor = self.distill.covered_weight;
        if factor == 0.0 {
            return Ok(None);
        }
        let weights: Vec<f64> = covered.iter().map(|share| 1.0 + factor * f64::from(*share)).collect();
        let mut sums = [weights.iter().sum::<f64>(), weights.len().max(1) as f64];
        self.ranks.total(&mut sums)?;
        let mean = sums[0] / sums[1];
        Ok(Some(weights.into_iter().map(|weight| (weight / mean) as f32).collect()))
    }

    /// Returns the teacher's embedding of each of the student's views, if there is a teacher.
    fn target(&mut self, batch: &Batch) -> Result<Option<B::Array>> {
        let Some(targets) = &mut self.targets else { return Ok(None) };
        let target = targets.of(batch)?;
        let num_views = batch.num_views();
        Ok(Some(if num_views > 1 { self.backend.join(&vec![&target; num_views])? } else { target }))
    }

    /// Updates what the losses train besides the student with the gradients of a batch, which are not clipped.
    pub fn update(&mut self, lr: f64, guard: &B::Guard) -> Result<()> {
        self.head.update(lr, guard)?;
        let mut projection = self.projection.iter_mut();
        projection.try_for_each(|(_, component)| Ok(component.update(lr, guard, false)?))
    }

    /// Losses with their weights in the objective.
    pub fn weighted<'a>(&self, losses: &'a Losses<B>) -> impl Iterator<Item = (f64, &'a B::Scalar)> + use<'a, B> {
        let (distill, share) = (&self.distill, self.share);
        [
            (distill.margin_weight * share, losses.margin.as_ref().map(|(loss, _)| loss)),
            (distill.lambda * share, losses.distance.as_ref()),
            (distill.rank_weight * share, losses.rank.as_ref()),
            (distill.agreement * share, losses.agreement.as_ref()),
        ]
        .into_iter()
        .filter_map(|(weight, loss)| loss.map(|loss| (weight, loss)))
    }

    /// Reads the figures of a step from the losses of its mini-batches; waits for a GPU. All ranks must call it.
    ///
    /// # Errors
    /// When the ranks cannot exchange what they know.
    pub fn report(&self, parts: &[Losses<B>], lr: f64) -> Result<StepReport> {
        let (distill, share, backend) = (&self.distill, self.share, &self.backend);
        let read = |loss: Option<&B::Scalar>| loss.map_or(Ok(0.0), |loss| backend.read_scalar(loss));
        let mut report = StepReport { lr, ..StepReport::default() };
        let (mut directions, mut num_images) = (Vec::new(), 0);
        for Losses { embeddings, labels, margin, distance, rank, agreement } in parts {
            num_images += labels.len();
            add_directions(&mut directions, &backend.read(embeddings)?, labels.len() / self.ranks.size());
            if let Some((_, cosines)) = margin {
                let cosines = backend.read(cosines)?;
                let known = cosines.iter().zip(labels);
                let known = known.map(|(cosine, label)| if *label < 0 { f64::NAN } else { f64::from(*cosine) });
                report.target_cosines.extend(known);
                report.labels.extend(labels);
            }
            report.margin_loss += distill.margin_weight * share * read(margin.as_ref().map(|(loss, _)| loss))?;
            report.distill_loss += share * read(distance.as_ref())?;
            report.rank_loss += distill.rank_weight * share * read(rank.as_ref())?;
            report.agreement_loss += distill.agreement * share * read(agreement.as_ref())?;
        }
        self.ranks.total(&mut directions)?;
        report.conclude(&directions, num_images, distill.lambda);
        Ok(report)
    }

    /// Number of the head's parameters.
    pub fn num_in_head(&self) -> usize {
        self.head.len()
    }

    /// Returns the class centres of all ranks.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn header(&self) -> Result<BTreeMap<String, Tensor>> {
        self.head.whole()
    }

    /// Adds the objective's part, with the class centres of this rank, to a trainer's state, and the state of its optimisers to `optimizers`.
    pub fn add_state(&self, state: &mut State, optimizers: &mut BTreeMap<String, Tensor>) -> Result<()> {
        state.insert(HEADER.to_owned(), self.head.state()?);
        optimizers.extend(self.head.optimizer_state()?);
        if let Some((_, component)) = &self.projection {
            state.insert(PROJECTION.to_owned(), component.params.state()?);
            optimizers.extend(component.optimizer_state()?);
        }
        if let Some(values) = self.thresholds.values {
            let values = Tensor::new(&values, &Device::Cpu)?;
            state.insert(RANK.to_owned(), BTreeMap::from([(THRESHOLDS.to_owned(), values)]));
        }
        Ok(())
    }

    /// Restores what [`Self::add_state`] has added.
    pub fn load_state(&mut self, state: &State, optimizers: &BTreeMap<String, Tensor>) -> Result<()> {
        self.head.load(file(state, HEADER)?, optimizers)?;
        if let Some((_, component)) = &mut self.projection {
            component.params.load(file(state, PROJECTION)?)?;
            component.load_optimizer(optimizers)?;
        }
        if let Some(values) = state.get(RANK).and_then(|file| file.get(THRESHOLDS)) {
            let values = values.to_vec1::<f64>()?;
            let what = || Error::Training(format!("the training checkpoint has {} thresholds of ranks", values.len()));
            self.thresholds.values = Some(values.as_slice().try_into().map_err(|_| what())?);
        }
        Ok(())
    }
}

/// Returns a file of a trainer's state.
pub(super) fn file<'a>(state: &'a State, name: &str) -> Result<&'a BTreeMap<String, Tensor>> {
    state.get(name).ok_or_else(|| Error::Training(format!("the training checkpoint has no {name}")))
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
