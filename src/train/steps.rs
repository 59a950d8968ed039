//! An arm in training, from one step to the next.

use std::ops::Range;
use std::time::Instant;

use super::config::Config;
use super::state::Position;
use super::trainer::Trainer;
use crate::data::{Batches, Loader};
use crate::error::Result;
use crate::records::{Speed, StepRecord, StepReport};

/// An arm in training: its trainer, its batches and its learning rates.
pub(super) struct Steps {
    pub trainer: Trainer,
    /// Position after the last step.
    pub at: Position,
    config: Config,
    loader: Loader,
    /// Batches of the epoch, once its first step was asked for.
    batches: Option<Batches>,
    clock: Clock,
}

/// Time since the arm started or resumed.
#[derive(Default)]
struct Clock {
    first_step: usize,
    seconds_before: f64,
    elapsed: f64,
    waited: f64,
    waited_for_ranks: f64,
}

/// What [`Steps::next_step`] did.
pub(super) enum Next {
    /// Trained on a batch.
    Step(Box<StepResult>),
    /// Came to the end of an epoch; these images were broken, and others took their places.
    EndOfEpoch { broken: Vec<String> },
}

/// Result of a step.
pub(super) struct StepResult {
    /// Indices of the images; of a skipped step, those of all ranks.
    pub images: Vec<u32>,
    /// The step's figures, if they are known.
    pub record: Option<StepRecord>,
}

impl Steps {
    /// Returns the steps of an arm from a position on.
    pub fn new(config: Config, loader: Loader, trainer: Trainer, at: Position) -> Self {
        let clock = Clock { first_step: at.step, seconds_before: at.seconds, ..Clock::default() };
        Self { trainer, at, config, loader, batches: None, clock }
    }

    /// The arm's epochs in the schedule.
    pub fn epochs(&self) -> Range<usize> {
        self.config.epochs(self.at.arm)
    }

    /// Steps in an epoch.
    pub fn per_epoch(&self) -> usize {
        self.loader.num_batches()
    }

    /// Images that each epoch leaves out because they do not fill a batch.
    pub fn num_left_out(&self) -> usize {
        self.loader.num_left_out()
    }

    /// Whether the last step was the first since the arm started or resumed.
    pub fn is_first(&self) -> bool {
        self.at.step == self.clock.first_step + 1
    }

    /// Trains on the next batch, with the schedule's learning rate unless `lr` is given; or ends the epoch, after which
    /// the next call begins another.
    ///
    /// # Errors
    /// When an image cannot be read, or the step fails.
    pub fn next_step(&mut self, lr: Option<f64>) -> Result<Next> {
        let asked = Instant::now();
        let Self { loader, at, .. } = self;
        let batches = self.batches.get_or_insert_with(|| loader.epoch_from(at.epoch as u64, at.batch));
        let Some(batch) = batches.next() else {
            let broken = batches.broken();
            self.batches = None;
            (self.at.epoch, self.at.batch) = (self.at.epoch + 1, 0);
            return Ok(Next::EndOfEpoch { broken });
        };
        self.clock.waited += asked.elapsed().as_secs_f64();
        let batch = batch?;
        let mut images = batch.images.clone();
        let (epochs, per_epoch) = (self.epochs(), self.per_epoch());
        let scheduled = epochs.start * per_epoch + self.at.step;
        let rate = || self.config.base_lr() * self.config.schedule.factor(scheduled, per_epoch, epochs.end);
        let waited_before = self.trainer.ranks().seconds_waited();
        let report = self.trainer.step(batch, scheduled as u64, lr.unwrap_or_else(rate))?;
        self.clock.waited_for_ranks += self.trainer.ranks().seconds_waited() - waited_before;
        if report.as_ref().is_some_and(|report| report.is_skipped) {
            let numbers: Vec<f64> = images.iter().map(|image| f64::from(*image)).collect();
            images = self.trainer.ranks().gather_f64(&numbers)?.concat().into_iter().map(|n| n as u32).collect();
        }
        let at = &mut self.at;
        (at.step, at.batch) = (at.step + 1, at.batch + 1);
        self.clock.elapsed += asked.elapsed().as_secs_f64();
        at.seconds = self.clock.seconds_before + self.clock.elapsed;
        let record = report.map(|report| {
            let skipped_images = if report.is_skipped { images.clone() } else { Vec::new() };
            StepRecord { skipped_images, ..self.record(report) }
        });
        Ok(Next::Step(Box::new(StepResult { images, record })))
    }

    /// Like [`Self::next_step`], across the ends of epochs.
    ///
    /// # Errors
    /// Same as [`Self::next_step`].
    pub fn step_of_any_epoch(&mut self, lr: Option<f64>) -> Result<StepResult> {
        loop {
            if let Next::Step(taken) = self.next_step(lr)? {
                return Ok(*taken);
            }
        }
    }

    /// Returns the last step with its figures.
    pub fn record(&self, report: StepReport) -> StepRecord {
        let Position { step, epoch, .. } = self.at;
        StepRecord { step, epoch, speed: self.speed(), report, skipped_images: Vec::new() }
    }

    fn speed(&self) -> Speed {
        let Clock { first_step, elapsed, waited, waited_for_ranks, .. } = self.clock;
        let num_images = (self.at.step - first_step) * self.config.loader.batch_size;
        Speed {
            seconds: self.at.seconds,
            images_per_s: num_images as f64 / elapsed,
            wait_share: waited / elapsed,
            ranks_wait_share: waited_for_ranks / elapsed,
        }
    }

    /// Measures speeds from here on.
    pub fn restart_clock(&mut self) {
        self.clock = Clock { first_step: self.at.step, seconds_before: self.at.seconds, ..Clock::default() };
    }

    /// Seconds that the steps have waited for data.
    pub fn waited(&self) -> f64 {
        self.clock.waited
    }
}
