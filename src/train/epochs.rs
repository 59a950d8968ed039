//! The epochs of one arm: its steps, the states that are saved on the way, and where it stops and goes on.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::arm::Arm;
use super::checkpoint::{Checkpoint, save_checkpoint};
use super::config::Start;
use super::outcome::Event;
use super::run::{Experiment, frozen};
use super::state::{Position, TrainState, states_folder};
use super::step::{StepReport, Trainer};
use crate::data::{AugmentConfig, Dataset, Loader, Transform};
use crate::error::{Error, Result};
use crate::models::Model;

impl Experiment {
    /// The newest state of an arm that is whole, if there is one and training is to go on from it.
    pub(super) fn state(&self, arm: Arm, on: &mut dyn FnMut(Event)) -> Result<Option<TrainState>> {
        let folder = states_folder(&self.out.join(arm.name()));
        if !self.resumes {
            // Of an earlier training in the same folder.
            remove_states(&self.out.join(arm.name()))?;
            return Ok(None);
        }
        let (state, problems) = TrainState::newest(&folder)?;
        problems.into_iter().for_each(|problem| on(Event::Notice(problem)));
        if let Some(TrainState { position, settings, .. }) = &state {
            if *settings != self.config.to_toml()? {
                let what = "expected states of the same settings, found other settings".to_owned();
                return Err(Error::Data { path: folder, what });
            }
            on(Event::Notice(format!("{}: goes on after step {}", arm.title(), position.step)));
        }
        Ok(state)
    }

    /// Saves all that later steps depend on.
    fn save_state(&self, trainer: &mut Trainer, position: &mut Position) -> Result<()> {
        position.last_loss = Some(trainer.synchronise()?.loss).filter(|loss| loss.is_finite()).or(position.last_loss);
        position.dropout_words = trainer.student.dropout().map_or(0, |dropout| dropout.num_words());
        let state = TrainState {
            position: position.clone(),
            settings: self.config.to_toml()?,
            backbone: trainer.student.params().state()?,
            head: trainer.any_head().params().state()?,
            optimizer: trainer.optimizers()?,
        };
        let folder = states_folder(&self.out.join(position.arm.name()));
        state.save(&folder, self.config.train.keep_states)
    }

    /// Trains from `position` on; returns where it ended and, if HG needs it, the LG student at HG's first epoch.
    pub(super) fn train(
        &self,
        arm: Arm,
        trainer: &mut Trainer,
        start: Option<&Checkpoint>,
        position: Option<Position>,
        on: &mut dyn FnMut(Event),
    ) -> Result<(Position, Option<Checkpoint>)> {
        let config = &self.config;
        let augment = match arm {
            Arm::Teacher => AugmentConfig { flip: config.augment.flip, mask: 0.0, ..AugmentConfig::default() },
            _ => config.augment.clone(),
        };
        let transform = Transform::new(&augment, &config.mask)?;
        let train = self.splits.train.clone();
        let loader = Loader::new(train.clone(), transform, &config.loader, config.model.input_size, config.train.seed)?
            .on_broken(config.data.on_broken);
        let (epochs, per_epoch) = (config.epochs(arm), loader.num_batches());
        on(Event::Start {
            arm,
            num_steps: epochs.len() * per_epoch,
            num_images: train.len(),
            num_left_out: loader.num_left_out(),
            num_identities: train.num_identities(),
            num_skipped_identities: train.num_skipped_identities(),
        });
        let mut at = position.unwrap_or_else(|| Position::start(arm, epochs.start));
        let (before, first) = (at.seconds, at.step);
        let base_lr = config.optim.lr * config.loader.batch_size as f64 / config.optim.lr_batch as f64;
        let (began, mut waited) = (Instant::now(), 0.0);
        let keeps_lg = arm == Arm::Lg && config.train.hg_start == Start::Lg;
        let mut lg = match keeps_lg && (at.epoch, at.batch) > (config.train.hg_first_epoch, 0) {
            true => Some(self.saved(&self.lg_folder())?),
            false => None,
        };
        let mut skipped_in_a_row = 0;
        while at.epoch < epochs.end {
            if keeps_lg && (at.epoch, at.batch) == (config.train.hg_first_epoch, 0) {
                // Kept, so that a later run can start HG from it.
                trainer.synchronise()?;
                save_checkpoint(&self.lg_folder(), &trainer.student, trainer.head())?;
                lg = Some(frozen(trainer)?);
            }
            let mut batches = loader.epoch_from(at.epoch as u64, at.batch);
            loop {
                let asked = Instant::now();
                let Some(batch) = batches.next() else { break };
                waited += asked.elapsed().as_secs_f64();
                let batch = batch?;
                let (images, scheduled) = (batch.images.clone(), epochs.start * per_epoch + at.step);
                let lr = base_lr * config.schedule.factor(scheduled, per_epoch, epochs.end);
                let report = trainer.step(batch, scheduled as u64, lr)?;
                at.step += 1;
                at.batch += 1;
                let elapsed = began.elapsed().as_secs_f64();
                at.seconds = before + elapsed;
                if let Some(report) = report {
                    if report.is_skipped {
                        at.num_skipped += 1;
                        skipped_in_a_row += 1;
                        on(Event::Notice(skipped(at.step, &report, &images, train.as_ref())));
                        if skipped_in_a_row >= config.train.max_skipped.max(1) {
                            return Err(Error::Training(diagnosis(skipped_in_a_row, at.step, &report)));
                        }
                    } else {
                        skipped_in_a_row = 0;
                        at.last_loss = Some(report.loss);
                    }
                    let images_per_s = ((at.step - first) * config.loader.batch_size) as f64 / elapsed;
                    let (step, epoch, wait_share) = (at.step, at.epoch, waited / elapsed);
                    on(Event::Step { step, epoch, report: &report, images_per_s, wait_share });
                }
                let stops = self.is_stopped();
                let is_due = config.train.save_every > 0 && at.step.is_multiple_of(config.train.save_every);
                // At the end of an epoch it is saved below.
                if (stops || is_due) && at.batch < per_epoch {
                    self.save_state(trainer, &mut at)?;
                }
                if stops && at.batch < per_epoch {
                    return Err(Error::Stopped { arm: arm.name().to_owned(), step: at.step });
                }
            }
            if let [first, ..] = &batches.broken()[..] {
                let (num, epoch) = (batches.broken().len(), at.epoch);
                on(Event::Notice(format!("epoch {epoch}: others took the place of {num} broken images: {first}")));
            }
            (at.epoch, at.batch) = (at.epoch + 1, 0);
            self.save_state(trainer, &mut at)?;
            if at.epoch < epochs.end {
                save_checkpoint(&self.out.join(arm.name()), &trainer.student, trainer.head())?;
                if self.is_stopped() {
                    return Err(Error::Stopped { arm: arm.name().to_owned(), step: at.step });
                }
            }
        }
        trainer.synchronise()?;
        if let Some(start) = start.filter(|_| config.train.start_share > 0.0) {
            average(&trainer.student, &start.backbone, config.train.start_share)?;
        }
        save_checkpoint(&self.out.join(arm.name()), &trainer.student, trainer.head())?;
        Ok((at, lg))
    }

    /// Whether the training is to stop after this step.
    fn is_stopped(&self) -> bool {
        self.stop.is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

/// Removes the states of an arm, if it has any.
pub(super) fn remove_states(arm_folder: &Path) -> Result<()> {
    let folder = states_folder(arm_folder);
    if folder.exists() { std::fs::remove_dir_all(&folder).map_err(Error::io(&folder)) } else { Ok(()) }
}

/// What is said of a step that changed nothing.
fn skipped(step: usize, report: &StepReport, images: &[u32], train: &dyn Dataset) -> String {
    let names: Vec<String> = images.iter().take(3).map(|&image| train.name(image as usize)).collect();
    format!(
        "step {step} left out: loss {}, gradient norm {}; its images, by number, are {images:?}, the first ones {}",
        report.loss,
        report.grad_norm,
        names.join(", ")
    )
}

/// What may be wrong where no step is finite any more.
fn diagnosis(num: usize, step: usize, report: &StepReport) -> String {
    let StepReport { margin_loss, distill_loss, grad_norm, lr, .. } = report;
    let cause = match (margin_loss.is_finite(), distill_loss.is_finite(), grad_norm.is_finite()) {
        (true, true, false) => "the losses are finite, their gradient is not: the network's own values overflow",
        (false, true, _) => "the margin loss is not finite: the embeddings or class centres are not",
        (true, false, _) => {
            "the distance to the teacher is not finite: the teacher's or the student's embeddings are not"
        }
        _ => "no loss is finite: the student's embeddings are not",
    };
    format!(
        "{num} steps in a row up to step {step} were not finite; {cause}. Try a lower rate than {lr}, or start earlier"
    )
}

/// Moves the weights of `model` towards those of `start`, of which they become `share`; counters stay.
fn average(model: &Model, start: &Model, share: f64) -> Result<()> {
    let (mut state, start) = (model.params().state()?, start.params().state()?);
    for (name, weights) in state.iter_mut().filter(|(_, t)| t.dtype().is_float()) {
        *weights = ((&*weights * (1.0 - share))? + (&start[name] * share)?)?;
    }
    Ok(model.params().load(&state)?)
}
