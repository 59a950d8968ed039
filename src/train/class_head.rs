//! The class centres of a training: those of this rank's classes, all or a sample of them in each step.

use std::collections::BTreeMap;

use candle_core::Tensor;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::step_config::StepConfig;
use crate::dist::{ClassShard, ELSEWHERE, Ranks};
use crate::error::Result;
use crate::losses::{MarginConfig, MarginHead, sample_classes};
use crate::nn::Group;
use crate::ops::backend::{Backend, MarginLoss};
use crate::ops::margin_loss::{MarginTask, Rows};
use crate::optim::{Component, SampledCentres};

/// Class centres, their margin loss and their updates. Several ranks share the classes.
pub(super) struct ClassHead<B: Backend> {
    config: MarginConfig,
    /// Centres of this rank's classes.
    centres: Component<B>,
    /// Length of a centre.
    size: usize,
    shard: ClassShard,
    is_trained: bool,
    /// Seed of the sampled classes.
    seed: u64,
    /// Centres that the step's softmax was over, until their update, if they are a sample.
    sample: Option<SampledCentres<B>>,
}

impl<B: Backend> ClassHead<B> {
    /// Returns the centres of this rank's classes.
    ///
    /// # Errors
    /// When there are fewer classes than ranks, or the device has no memory for them.
    pub fn new(backend: &B, head: MarginHead, ranks: &Ranks, config: &StepConfig) -> Result<Self> {
        let (is_trained, margin, size) = (config.distill.trains_head(), head.config().clone(), head.embedding_size()?);
        let shard = ClassShard::new(ranks, head.num_classes())?;
        let mut params = head.on(backend, shard.classes.clone())?;
        if is_trained && margin.sample_rate < 1.0 {
            // Those of a sample have a place of their own.
            params.drop_grads()?;
        }
        let parts = if is_trained { config.accumulate } else { 1 };
        let centres = Component::new("head", params, &config.optim, parts)?;
        let seed = config.sample_seed(ranks.rank());
        Ok(Self { config: margin, centres, size, shard, is_trained, seed, sample: None })
    }

    /// Whether the softmax of a step is over a sample of the classes.
    fn samples_classes(&self) -> bool {
        self.is_trained && self.config.sample_rate < 1.0
    }

    /// The centres, if an update changes all of them.
    pub fn trained(&mut self) -> Option<&mut Component<B>> {
        (self.is_trained && !self.samples_classes()).then_some(&mut self.centres)
    }

    /// Pulls the centres towards the teacher's embeddings `(N, size)` of all rows, as [`Backend::pull_centres`] does.
    ///
    /// # Errors
    /// When a label is out of range.
    pub fn pull(&mut self, student: &B::Array, teacher: &B::Array, labels: &[i64]) -> Result<()> {
        let (backend, mut own) = (self.centres.params.backend().clone(), self.shard.own(labels)?);
        // Their ranks pull these.
        own.iter_mut().filter(|label| **label == ELSEWHERE).for_each(|label| *label = -1);
        Ok(backend.pull_centres(self.centres.params.values_mut(), student, teacher, &own)?)
    }

    /// Returns the margin loss of the embeddings `(N, size)` of all rows, and `weight` times its gradient with respect to
    /// them, which has to be added over all ranks; keeps that of the centres for [`Self::update`].
    ///
    /// # Errors
    /// When a label is out of range, or the ranks cannot exchange their sums.
    pub fn loss(
        &mut self,
        embeddings: &B::Array,
        labels: &[i64],
        weight: f64,
        rng: &mut ChaCha8Rng,
    ) -> Result<MarginLoss<B>> {
        let (samples_classes, own) = (self.samples_classes(), self.shard.own(labels)?);
        let Self { config, centres, size, shard, .. } = self;
        let margins = config.draw(labels.len(), rng);
        let ranks = (!shard.ranks.is_single()).then_some(&shard.ranks);
        let task = |labels| MarginTask { rows: Rows { labels, margins: &margins }, config: config.op(), weight, ranks };
        let backend = centres.params.backend().clone();
        let (values, gradient) = centres.params.values_and_grads();
        if !samples_classes {
            return Ok(backend.margin_loss(embeddings, values, task(&own), gradient)?);
        }
        // The stream is the step.
        let mut sampler = ChaCha8Rng::seed_from_u64(self.seed);
        sampler.set_stream(rng.get_stream());
        let classes = sample_classes(&own, shard.classes.len(), config.sample_rate, &mut sampler);
        // The sample has all classes of this rank's labels.
        let place = |class: u32| classes.binary_search(&class).map_or(ELSEWHERE, |place| place as i64);
        let own: Vec<i64> = own.iter().map(|label| u32::try_from(*label).map_or(*label, place)).collect();
        let values = backend.select_classes(values, *size, &classes)?;
        let mut gradient = backend.zeros(*size * classes.len())?;
        let found = backend.margin_loss(embeddings, &values, task(&own), &mut gradient)?;
        self.sample = Some(SampledCentres { size: *size, classes, gradient });
        Ok(found)
    }

    /// Updates the centres with the gradients of a batch, which are not clipped.
    ///
    /// # Errors
    /// When an operation of the device fails.
    pub fn update(&mut self, lr: f64, guard: &B::Guard) -> Result<()> {
        match (self.sample.take(), self.is_trained) {
            (Some(sample), _) => self.centres.update_sample(&sample, lr, guard)?,
            (None, true) => self.centres.update(lr, guard, false)?,
            (None, false) => {}
        }
        Ok(())
    }

    /// Number of elements of this rank's centres.
    pub fn len(&self) -> usize {
        self.centres.params.len(Group::Trained)
    }

    /// Returns the centres of all ranks.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn whole(&self) -> Result<BTreeMap<String, Tensor>> {
        let own = self.state()?;
        if self.shard.ranks.is_single() {
            return Ok(own);
        }
        own.into_iter().map(|(name, tensor)| Ok((name, self.shard.join(&tensor)?))).collect()
    }

    /// Returns the centres of this rank.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        Ok(self.centres.params.state()?)
    }

    /// Returns the state of their optimiser.
    pub fn optimizer_state(&self) -> Result<impl Iterator<Item = (String, Tensor)>> {
        Ok(self.centres.optimizer_state()?)
    }

    /// Restores [`Self::state`] and [`Self::optimizer_state`].
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or of another shape.
    pub fn load(&mut self, state: &BTreeMap<String, Tensor>, optimizers: &BTreeMap<String, Tensor>) -> Result<()> {
        self.centres.params.load(state)?;
        Ok(self.centres.load_optimizer(optimizers)?)
    }
}
