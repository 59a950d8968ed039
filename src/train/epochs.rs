//! The epoch loop of one arm: steps, training checkpoints, stopping and resuming.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use candle_core::Device;

use super::arm::Arm;
use super::checkpoint::{Checkpoint, KERNEL, save_checkpoint};
use super::config::{Config, Start};
use super::guards::Guards;
use super::outcome::Event;
use super::records::{Records, Speed, StepRecord};
use super::run::Experiment;
use super::state::{Position, TrainState, states_folder};
use super::step::StepReport;
use super::trainer::Trainer;
use crate::data::{AugmentConfig, Dataset, Loader, Transform};
use crate::error::{Error, Result};
use crate::models::Model;

impl Experiment {
    /// Returns the newest intact training checkpoint of an arm, if training resumes and there is one.
    pub(super) fn state(&self, arm: Arm, inputs: &str, on: &mut dyn FnMut(Event)) -> Result<Option<TrainState>> {
        let folder = states_folder(&self.arm_folder(arm));
        if !self.resumes {
            // Left by an earlier training in the same folder.
            remove_states(&self.arm_folder(arm))?;
            return Ok(None);
        }
        let (state, problems) = TrainState::newest(&folder)?;
        if state.is_none() && Records::is_in(&self.arm_folder(arm)) {
            let what = "no training checkpoint is left, so it begins anew";
            on(Event::Notice(format!("{}: {what} ({})", arm.title(), folder.display())));
        }
        problems.into_iter().for_each(|problem| on(Event::Notice(problem)));
        if let Some(TrainState { position, settings, inputs: of_state, .. }) = &state {
            // Compared as settings, not as text, because a later version may know more settings.
            let differences = Config::parse(settings)
                .map_err(|what| Error::Data {
                    path: folder.clone(),
                    what: format!("settings of a checkpoint: {what}"),
                })?
                .differences(&self.config)?;
            if !differences.is_empty() {
                let found = differences.join(", ");
                let what = format!("expected checkpoints of a training with the same settings, found {found}");
                return Err(Error::Data { path: folder, what });
            }
            self.check_state(of_state.as_deref(), inputs)?;
            on(Event::Notice(format!("{}: resumes after step {}", arm.title(), position.step)));
        }
        Ok(state)
    }

    /// Saves a training checkpoint.
    fn save_state(
        &self,
        trainer: &Trainer,
        inputs: &str,
        position: &mut Position,
        records: &mut Records,
    ) -> Result<()> {
        position.last_loss = Some(trainer.report()?.loss).filter(|loss| loss.is_finite()).or(position.last_loss);
        position.dropout_words = trainer.dropout_words();
        let state = TrainState {
            position: position.clone(),
            settings: self.config.to_toml()?,
            inputs: Some(inputs.to_owned()),
            tensors: trainer.state()?,
        };
        records.flush()?;
        let folder = states_folder(&self.arm_folder(position.arm));
        state.save(&folder, self.config.train.keep_states)
    }

    /// Returns the loader of an arm's batches.
    ///
    /// # Errors
    /// When there are fewer images than a batch, or a mask template is missing or corrupt.
    pub fn loader(&self, arm: Arm) -> Result<Loader> {
        let config = &self.config;
        let augment = match arm {
            Arm::Teacher => AugmentConfig { flip: config.augment.flip, mask: 0.0, ..AugmentConfig::default() },
            _ => config.augment.clone(),
        };
        let transform = Transform::new(&augment, &config.mask)?;
        let train = self.train_set(arm).clone();
        let loader = Loader::new(train, transform, &config.loader, config.model.input_size, config.train.seed)?;
        Ok(loader.on_broken(config.data.on_broken))
    }

    /// Trains an arm from `position`, or from its first step. Returns the final position and weights and, if HG starts
    /// from it, the LG student at HG's first epoch.
    pub(super) fn train(
        &self,
        arm: Arm,
        inputs: &str,
        trainer: &mut Trainer,
        start: Option<&Checkpoint>,
        position: Option<Position>,
        on: &mut dyn FnMut(Event),
    ) -> Result<(Position, Checkpoint, Option<Checkpoint>)> {
        let (config, train, loader) = (&self.config, self.train_set(arm), self.loader(arm)?);
        let (epochs, per_epoch) = (config.epochs(arm), loader.num_batches());
        on(Event::Start {
            arm,
            num_steps: epochs.len() * per_epoch,
            num_images: train.len(),
            num_left_out: loader.num_left_out(),
            num_identities: train.num_identities(),
            num_skipped_identities: train.num_skipped_identities(),
        });
        let header = |trainer: &Trainer| trainer.header(train.identity_names());
        let mut at = position.unwrap_or_else(|| Position::start(arm, epochs.start));
        let folder = self.arm_folder(arm);
        let mut records = Records::open(&folder, at.step)?;
        let keeps_lg = arm == Arm::Lg && config.train.hg_start == Start::Lg;
        let mut lg = match keeps_lg && (at.epoch, at.batch) > (config.train.hg_first_epoch, 0) {
            true => Some(self.saved(&self.lg_folder())?),
            false => None,
        };
        let mut session = Session::new(arm, inputs, train.num_identities(), &at);
        loop {
            if config.watch.is_due(&at, epochs.start, epochs.end) {
                self.watch(trainer, &mut at, &mut records, on)?;
            }
            if at.epoch >= epochs.end || config.watch.stops(&at) {
                break;
            }
            if keeps_lg && (at.epoch, at.batch) == (config.train.hg_first_epoch, 0) {
                // Saved so that a later run can start HG from it.
                save_checkpoint(&self.lg_folder(), &trainer.evaluated()?, header(trainer)?.as_ref())?;
                lg = Some(self.saved(&self.lg_folder())?);
            }
            self.epoch(trainer, &loader, (&mut session, &mut at, &mut records), on)?;
            (at.epoch, at.batch) = (at.epoch + 1, 0);
            self.save_state(trainer, inputs, &mut at, &mut records)?;
            let found = header(trainer)?;
            let centres = found.as_ref().and_then(|header| header.tensors.get(KERNEL));
            let name = |class: usize| train.identity_name(class as u32);
            for said in session.guards.epoch(centres, at.epoch == epochs.start + 1, name)? {
                on(Event::Notice(format!("epoch {}: {said}", at.epoch - 1)));
            }
            if at.epoch < epochs.end {
                save_checkpoint(&folder, &trainer.evaluated()?, found.as_ref())?;
                if self.is_stopped() {
                    return Err(Error::Stopped { arm: arm.name().to_owned(), step: at.step });
                }
            }
        }
        let mut last = self.conclude(trainer, &at, on)?;
        if let Some(start) = start.filter(|_| config.train.start_share > 0.0) {
            last.backbone = blend(&last.backbone, &start.backbone, config.train.start_share)?;
        }
        save_checkpoint(&folder, &last.backbone, last.header.as_ref())?;
        records.flush()?;
        Ok((at, last, lg))
    }

    /// Runs the remaining steps of an epoch.
    fn epoch(
        &self,
        trainer: &mut Trainer,
        loader: &Loader,
        (session, at, records): (&mut Session, &mut Position, &mut Records),
        on: &mut dyn FnMut(Event),
    ) -> Result<()> {
        let config = &self.config;
        let (epochs, per_epoch) = (config.epochs(session.arm), loader.num_batches());
        let mut batches = loader.epoch_from(at.epoch as u64, at.batch);
        loop {
            let asked = Instant::now();
            let Some(batch) = batches.next() else { break };
            session.waited += asked.elapsed().as_secs_f64();
            let batch = batch?;
            let (images, labels) = (batch.images.clone(), batch.labels.clone());
            let scheduled = epochs.start * per_epoch + at.step;
            let lr = config.base_lr() * config.schedule.factor(scheduled, per_epoch, epochs.end);
            let report = trainer.step(batch, scheduled as u64, lr)?;
            at.step += 1;
            at.batch += 1;
            session.elapsed += asked.elapsed().as_secs_f64();
            at.seconds = session.seconds_before + session.elapsed;
            if let Some(report) = report {
                self.reported(trainer, &report, (session, at), (&images, &labels), records, on)?;
            }
            let stops = self.is_stopped();
            let is_due = config.train.save_every > 0 && at.step.is_multiple_of(config.train.save_every);
            // `train` saves the checkpoint at the end of an epoch.
            if (stops || is_due) && at.batch < per_epoch {
                self.save_state(trainer, session.inputs, at, records)?;
            }
            if stops && at.batch < per_epoch {
                return Err(Error::Stopped { arm: session.arm.name().to_owned(), step: at.step });
            }
        }
        if let [first, ..] = &batches.broken()[..] {
            let (num, epoch) = (batches.broken().len(), at.epoch);
            on(Event::Notice(format!("epoch {epoch}: other images replaced {num} broken images: {first}")));
        }
        Ok(())
    }

    /// Records a step whose figures are known, and reports notices and warnings about it.
    fn reported(
        &self,
        trainer: &Trainer,
        report: &StepReport,
        (session, at): (&mut Session, &mut Position),
        (images, labels): (&[u32], &[i64]),
        records: &mut Records,
        on: &mut dyn FnMut(Event),
    ) -> Result<()> {
        let batch_size = self.config.loader.batch_size;
        let speed = Speed {
            seconds: at.seconds,
            images_per_s: ((at.step - session.first_step) * batch_size) as f64 / session.elapsed,
            wait_share: session.waited / session.elapsed,
        };
        records.step(&StepRecord::new(at.step, at.epoch, report, speed, images))?;
        if let [first, ..] = trainer.without_gradient()
            && at.step == session.first_step + 1
        {
            let num = trainer.without_gradient().len();
            on(Event::Notice(format!("{num} parameters had a zero gradient in the first step, {first} among them")));
        }
        self.tell_of_machine(on);
        session
            .guards
            .step(labels, report)
            .into_iter()
            .for_each(|said| on(Event::Notice(format!("step {}: {said}", at.step))));
        if report.is_skipped {
            at.num_skipped += 1;
            session.skipped_in_a_row += 1;
            on(Event::Notice(skipped(at.step, report, images, self.train_set(at.arm).as_ref())));
            if session.skipped_in_a_row >= self.config.train.max_skipped.max(1) {
                records.flush()?;
                return Err(Error::Training(diagnosis(session.skipped_in_a_row, at.step, report)));
            }
        } else {
            session.skipped_in_a_row = 0;
            at.last_loss = Some(report.loss);
        }
        let (step, epoch) = (at.step, at.epoch);
        on(Event::Step { step, epoch, report, images_per_s: speed.images_per_s, wait_share: speed.wait_share });
        Ok(())
    }

    /// Whether training should stop after this step.
    fn is_stopped(&self) -> bool {
        self.stop.is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

/// Counters of an arm's training since it started or resumed.
struct Session<'a> {
    arm: Arm,
    /// Digest of the training's data, for its checkpoints.
    inputs: &'a str,
    guards: Guards,
    first_step: usize,
    seconds_before: f64,
    elapsed: f64,
    waited: f64,
    skipped_in_a_row: usize,
}

impl<'a> Session<'a> {
    fn new(arm: Arm, inputs: &'a str, num_classes: usize, at: &Position) -> Self {
        Self {
            arm,
            inputs,
            guards: Guards::new(num_classes),
            first_step: at.step,
            seconds_before: at.seconds,
            elapsed: 0.0,
            waited: 0.0,
            skipped_in_a_row: 0,
        }
    }
}

/// Removes the training checkpoints of an arm, if it has any.
pub(super) fn remove_states(arm_folder: &Path) -> Result<()> {
    let folder = states_folder(arm_folder);
    if folder.exists() { std::fs::remove_dir_all(&folder).map_err(Error::io(&folder)) } else { Ok(()) }
}

/// Returns the notice about a skipped step.
fn skipped(step: usize, report: &StepReport, images: &[u32], train: &dyn Dataset) -> String {
    let names: Vec<String> = images.iter().take(3).map(|&image| train.name(image as usize)).collect();
    format!(
        "step {step} skipped: loss {}, gradient norm {}; its images have the indices {images:?}, the first are {}",
        report.loss,
        report.grad_norm,
        names.join(", ")
    )
}

/// Returns the error after too many skipped steps in a row, with a likely cause.
fn diagnosis(num: usize, step: usize, report: &StepReport) -> String {
    let StepReport { margin_loss, distill_loss, grad_norm, lr, .. } = report;
    let cause = match (margin_loss.is_finite(), distill_loss.is_finite(), grad_norm.is_finite()) {
        (true, true, false) => "the losses are finite but the gradient is not: values inside the network overflow",
        (false, true, _) => "the margin loss is not finite: the embeddings or class centres are not",
        (true, false, _) => "the distillation loss is not finite: the teacher's or the student's embeddings are not",
        _ => "no loss is finite: the student's embeddings are not",
    };
    format!(
        "{num} steps in a row up to step {step} were not finite; {cause}. Try a lower learning rate than {lr}, or go \
         back to an earlier checkpoint"
    )
}

/// Returns `model` with the float weights `(1 - share) * model + share * start`; counters stay unchanged.
fn blend(model: &Model, start: &Model, share: f64) -> Result<Model> {
    let (mut state, start) = (model.params().state()?, start.params().state()?);
    for (name, weights) in state.iter_mut().filter(|(_, t)| t.dtype().is_float()) {
        *weights = ((&*weights * (1.0 - share))? + (&start[name] * share)?)?;
    }
    let blended = Model::frozen(model.config(), state, &Device::Cpu)?;
    Ok(blended.with_preprocessing(model.preprocessing().clone()).on(model.machine()))
}
