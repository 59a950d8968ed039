//! A few steps of each arm that leave nothing behind: what a training will take.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::{Device, Tensor};
use serde::Serialize;

use super::arm::Arm;
use super::checkpoint::Checkpoint;
use super::outcome::Event;
use super::run::{Experiment, Origin};
use super::step::Trainer;
use crate::error::Result;
use crate::models::Model;
use crate::nn::Params;
use crate::optim::OptimKind;

/// Steps before those that are measured: memory is taken and filters are packed in them.
const WARM_UP: usize = 2;

/// What the steps of an arm take, as measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rehearsal {
    /// Which arm.
    pub arm: Arm,
    /// Steps that its training has.
    pub num_steps: usize,
    /// Steps that were measured.
    pub num_measured: usize,
    /// Mean wall-clock seconds of one.
    pub step_s: f64,
    /// Share of them spent waiting for data.
    pub wait_share: f64,
    /// Trained parameters to which the first step gave no gradient.
    pub without_gradient: Vec<String>,
    /// What was computed of the memory that it takes.
    pub memory: MemoryEstimate,
}

/// Bytes that a training takes, in f32. Beside them are the teacher's filters, packed anew, and some memory that goes round.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryEstimate {
    /// The student's parameters and running statistics, and their average if one is kept.
    pub weights: usize,
    /// The gradients of its parameters, twice for batches in parts.
    pub gradients: usize,
    /// What the optimiser remembers of them.
    pub optimizer: usize,
    /// The class centres with gradient and what the optimiser remembers.
    pub head: usize,
    /// The teacher's weights.
    pub teacher: usize,
    /// Activations of a batch, or a part of it, with their gradients, at the peak; none where the network goes layer by layer or is on a
    /// GPU.
    pub activations: Option<usize>,
    /// Batches of images that wait.
    pub images: usize,
}

impl Experiment {
    /// Takes `num_steps` steps of an arm on its first batches and forgets them. What it would get from an arm before it, random weights
    /// take the place of: they take as long.
    ///
    /// # Errors
    /// As a training.
    pub fn rehearse(&self, arm: Arm, num_steps: usize, on: &mut dyn FnMut(Event)) -> Result<Rehearsal> {
        let loader = self.loader(arm)?;
        let stand_in = self.stand_in()?;
        let teacher = self.teacher.as_ref().unwrap_or(&stand_in);
        let mut trainer = self.rehearsed(arm, teacher, &stand_in, on)?;
        let (epochs, per_epoch) = (self.config.epochs(arm), loader.num_batches());
        let (mut began, mut waited) = (Instant::now(), 0.0);
        let mut without_gradient = Vec::new();
        let mut batches = (0..).flat_map(|epoch| loader.epoch(epoch));
        for taken in 0..WARM_UP + num_steps {
            if taken == WARM_UP {
                trainer.synchronise()?;
                (began, waited) = (Instant::now(), 0.0);
            }
            let asked = Instant::now();
            let Some(batch) = batches.next() else { break };
            waited += asked.elapsed().as_secs_f64();
            let lr = self.config.base_lr() * self.config.schedule.factor(taken, per_epoch, epochs.end);
            if let Some(report) = trainer.step(batch?, taken as u64, lr)? {
                let elapsed = began.elapsed().as_secs_f64();
                let images_per_s = ((taken + 1) * self.config.loader.batch_size) as f64 / elapsed;
                let (step, epoch) = (taken + 1, taken / per_epoch);
                on(Event::Step { step, epoch, report: &report, images_per_s, wait_share: waited / elapsed });
            }
            if taken == 0 {
                without_gradient = trainer.without_gradient().to_vec();
            }
        }
        trainer.synchronise()?;
        let elapsed = began.elapsed().as_secs_f64();
        Ok(Rehearsal {
            arm,
            num_steps: epochs.len() * per_epoch,
            num_measured: num_steps,
            step_s: elapsed / num_steps as f64,
            wait_share: waited / elapsed,
            without_gradient,
            memory: self.memory(arm, &trainer, teacher),
        })
    }

    /// The weights of nobody.
    fn stand_in(&self) -> Result<Checkpoint> {
        let config = &self.config.model;
        let state = Model::new(config, &Device::Cpu, self.config.train.seed)?.params().state()?;
        let backbone = Model::frozen(config, state, &Device::Cpu)?.on(&self.machine);
        Ok(Checkpoint { path: None, backbone, header: None })
    }

    fn rehearsed<'a>(
        &self,
        arm: Arm,
        teacher: &'a Checkpoint,
        stand_in: &Checkpoint,
        on: &mut dyn FnMut(Event),
    ) -> Result<Trainer<'a>> {
        let start = self.origin(arm).map(|origin| {
            let weights = match origin {
                Origin::Given => self.start.as_ref().unwrap_or(stand_in),
                Origin::Teacher => teacher,
                Origin::Lg => stand_in,
            };
            (origin, weights)
        });
        let size = (self.config.model.embedding_size, self.splits.train.num_identities());
        let mut centres = BTreeMap::new();
        if let Some((origin, _)) = start {
            // Embedding the whole set is not what is rehearsed.
            centres.insert(origin, Tensor::randn(0f32, 0.01, size, &Device::Cpu)?);
        }
        self.trainer(arm, Some(&teacher.backbone), start, None, &mut centres, on)
    }

    fn memory(&self, arm: Arm, trainer: &Trainer, teacher: &Checkpoint) -> MemoryEstimate {
        let config = &self.config;
        let of = |params: &Params| -> (usize, usize) {
            let all = params.shapes().values().map(|shape| shape.iter().product::<usize>()).sum();
            (all, params.trainable().map(|(_, var)| var.elem_count()).sum())
        };
        let student = &trainer.student;
        let (all, trained) = of(student.params());
        let moments = match config.optim.kind {
            OptimKind::Sgd => 1,
            OptimKind::AdamW => 2,
        };
        let (centres, _) = of(trainer.any_head().params());
        let parts = config.train.accumulate;
        let num_images = config.loader.batch_size / parts;
        let waiting = config.loader.threads * (config.loader.prefetch + 1) + 1;
        let image = 3 * config.model.input_size * config.model.input_size;
        let sums = if parts > 1 { 2 } else { 1 };
        MemoryEstimate {
            weights: 4 * all * if config.train.ema > 0.0 { 2 } else { 1 },
            gradients: 4 * trained * sums,
            optimizer: 4 * trained * moments,
            head: if trainer.head().is_some() { 4 * centres * (1 + sums + moments) } else { 4 * centres },
            teacher: if config.distill.of(arm).lambda > 0.0 { 4 * of(teacher.backbone.params()).0 } else { 0 },
            activations: trainer.activation_bytes(num_images),
            images: 2 * image * config.loader.batch_size * waiting,
        }
    }
}

impl MemoryEstimate {
    /// Returns the sum.
    pub fn total(&self) -> usize {
        let Self { weights, gradients, optimizer, head, teacher, activations, images } = self;
        weights + gradients + optimizer + head + teacher + activations.unwrap_or_default() + images
    }
}
