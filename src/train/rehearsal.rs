//! Dry runs: a few steps of an arm, to estimate the time and memory of its training. Nothing is saved.

use std::time::Instant;

use candle_core::{Device, Tensor};
use serde::Serialize;

use super::arm::Arm;
use super::checkpoint::Checkpoint;
use super::experiment::Experiment;
use super::given_weights::Origin;
use super::outcome::Event;
use super::start::Centres;
use super::steps::Steps;
use super::trainer::Trainer;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::optim::OptimKind;

/// Warm-up steps before the measurement; they allocate memory and pack filters.
const WARM_UP: usize = 2;

/// Result of a dry run of one arm.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Rehearsal {
    /// The arm.
    pub arm: Arm,
    /// Steps in its complete training.
    pub num_steps: usize,
    /// Steps measured.
    pub num_measured: usize,
    /// Mean wall-clock seconds per step.
    pub step_s: f64,
    /// Share of that time spent waiting for data.
    pub wait_share: f64,
    /// Trained parameters whose gradient was zero everywhere in the first step.
    pub without_gradient: Vec<String>,
    /// Computed memory of the training.
    pub memory: MemoryEstimate,
}

/// Computed memory of a training, in bytes, for f32. Not included: the teacher's packed filters and reusable buffers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct MemoryEstimate {
    /// The student's parameters and running statistics, and their moving average if one is kept.
    pub weights: usize,
    /// Gradients of the student's parameters, twice with gradient accumulation.
    pub gradients: usize,
    /// Optimiser state of the student's parameters.
    pub optimizer: usize,
    /// Class centres with their gradients and optimiser state.
    pub head: usize,
    /// The teacher's weights.
    pub teacher: usize,
    /// The teacher's embeddings of the training images, as many as are kept.
    pub targets: usize,
    /// Peak size of the activations of a mini-batch and their gradients. None on a GPU.
    pub activations: Option<usize>,
    /// Prefetched batches, with the teacher's and the student's crops.
    pub images: usize,
}

impl Experiment {
    /// Runs and measures `num_steps` steps of an arm on its first batches, at its first learning rates, after a
    /// warm-up, and discards the result. Random weights replace those of an arm that is not yet trained; steps take the
    /// same time with them.
    ///
    /// # Errors
    /// The errors of a training.
    pub fn rehearse(&self, arm: Arm, num_steps: usize, on: &mut dyn FnMut(Event)) -> Result<Rehearsal> {
        self.check_ranks()?;
        let stand_in = self.stand_in()?;
        let teacher = self.given().teacher.as_ref().unwrap_or(&stand_in);
        let mut steps = self.rehearsed(arm, teacher, &stand_in, on)?;
        let mut began = Instant::now();
        let mut without_gradient = Vec::new();
        for taken in 0..WARM_UP + num_steps {
            if taken == WARM_UP {
                steps.trainer.report()?;
                steps.restart_clock();
                began = Instant::now();
            }
            if let Some(record) = steps.step_of_any_epoch(None)?.record {
                on(Event::Step(&record));
            }
            if taken == 0 {
                without_gradient = steps.trainer.without_gradient().to_vec();
            }
        }
        steps.trainer.report()?;
        let elapsed = began.elapsed().as_secs_f64();
        Ok(Rehearsal {
            arm,
            num_steps: steps.epochs().len() * steps.per_epoch(),
            num_measured: num_steps,
            step_s: elapsed / num_steps as f64,
            wait_share: steps.waited() / elapsed,
            without_gradient,
            memory: self.memory(arm, &steps.trainer, teacher),
        })
    }

    /// Returns random weights of the student's network.
    fn stand_in(&self) -> Result<Checkpoint> {
        let config = self.config();
        let state = Model::new(&config.model, &Device::Cpu, config.train.seed)?.params().state()?;
        let backbone = Model::frozen(&config.model, state, &Device::Cpu)?.on(self.machine());
        Ok(Checkpoint { name: "stand-in".to_owned(), backbone, header: None })
    }

    fn rehearsed(
        &self,
        arm: Arm,
        teacher: &Checkpoint,
        stand_in: &Checkpoint,
        on: &mut dyn FnMut(Event),
    ) -> Result<Steps> {
        if !arm.is_trained() {
            return Err(Error::Training(format!("{} is averaged, not trained: it has no steps", arm.name())));
        }
        let given = self.given();
        let start = given.origin(self.config(), arm).map(|origin| {
            let weights = match origin {
                Origin::Given => given.start.as_ref().unwrap_or(stand_in),
                Origin::Teacher => teacher,
                Origin::Lg => stand_in,
            };
            (origin, weights)
        });
        let mut centres = Centres::new();
        // Random centres, because embedding the training set is not part of the dry run.
        let size = (self.config().model.embedding_size, self.train_set(arm).num_classes());
        let of_teacher = (teacher.backbone.config().embedding_size, size.1);
        if let Some((origin, _)) = start {
            centres.insert(origin, Tensor::randn(0f32, 0.01, size, &Device::Cpu)?);
        }
        centres.insert(Origin::Teacher, Tensor::randn(0f32, 0.01, of_teacher, &Device::Cpu)?);
        self.steps(&self.arm_start(arm, Some(teacher), start), None, &mut centres, on)
    }

    fn memory(&self, arm: Arm, trainer: &Trainer, teacher: &Checkpoint) -> MemoryEstimate {
        let config = self.config();
        let [all, trained, centres] = trainer.num_elements();
        let moments = match config.optim.kind {
            OptimKind::Sgd => 1,
            OptimKind::AdamW => 2,
        };
        let parts = config.train.accumulate;
        let views = if config.augment.paired && arm != Arm::Teacher { 2 } else { 1 };
        let batch_size = config.loader.batch_size / self.machine().ranks().size();
        let num_images = views * batch_size / parts;
        let waiting = config.loader.threads * (config.loader.prefetch + 1) + 1;
        let image = 3 * config.model.input_size * config.model.input_size;
        let sums = if parts > 1 { 2 } else { 1 };
        let sample = config.loss.sample_rate;
        let of_sample = 4.0 * sample * centres as f64;
        let (has_teacher, of_teacher) = (config.distill.of(arm).embeds_teacher(), &teacher.backbone);
        let num_views = if self.machine().is_cpu() { 2 * self.train_set(arm).len() } else { 0 };
        let targets = 4 * of_teacher.config().embedding_size * num_views;
        MemoryEstimate {
            weights: 4 * all * if config.train.ema > 0.0 { 2 } else { 1 },
            gradients: 4 * trained * sums,
            optimizer: 4 * trained * moments,
            head: match config.distill.of(arm).trains_head() {
                false => 4 * centres,
                // Of a sample: its centres, moments and gradients.
                true if sample < 1.0 => 4 * centres * (1 + moments) + (of_sample * (2 + moments) as f64) as usize,
                true => 4 * centres * (1 + sums + moments),
            },
            teacher: if has_teacher { 4 * of_teacher.params().num_parameters() } else { 0 },
            targets: if has_teacher { targets.min(config.step(arm).max_kept_bytes) } else { 0 },
            activations: trainer.activation_bytes(num_images),
            images: (1 + views) * image * batch_size * waiting,
        }
    }
}

impl MemoryEstimate {
    /// Returns the total in bytes.
    pub fn total(&self) -> usize {
        let Self { weights, gradients, optimizer, head, teacher, targets, activations, images } = self;
        weights + gradients + optimizer + head + teacher + targets + activations.unwrap_or_default() + images
    }
}
