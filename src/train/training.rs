//! The training of one arm: epochs of steps, evaluations between them, training checkpoints, records, stopping and
//! resuming.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::arm::Arm;
use super::checkpoint::{Checkpoint, Header, KERNEL, save_checkpoint};
use super::config::{Config, Start};
use super::guards::Guards;
use super::mask_head::head_of_arm;
use super::outcome::Event;
use super::soup::average;
use super::state::{Position, TrainState, states_folder};
use super::steps::{Next, StepResult, Steps};
use super::watch::Best;
use crate::data::{Dataset, TestSet};
use crate::dist::Ranks;
use crate::error::{Error, Result};
use crate::eval::evaluate;
use crate::machine::Machine;
use crate::models::Model;
use crate::records::{EvaluationRecord, Records, StepRecord, StepReport};

/// What the training of an arm needs besides its steps.
pub(super) struct Context<'a> {
    pub config: &'a Config,
    pub machine: &'a Machine,
    pub train: &'a dyn Dataset,
    /// Test set of the evaluations between epochs.
    pub watch: &'a TestSet,
    /// The arm's folder in the results folder.
    pub folder: PathBuf,
    /// Digest of the training's data, for its checkpoints.
    pub inputs: &'a str,
    /// Weights that the arm started from.
    pub start: Option<&'a Checkpoint>,
    /// Stops the training when it is set.
    pub stop: Option<&'a Arc<AtomicBool>>,
}

impl Context<'_> {
    /// The ranks that train together.
    fn ranks(&self) -> &Ranks {
        self.machine.ranks()
    }
}

/// An arm in training, with what is written of it.
pub(super) struct Training<'a> {
    context: Context<'a>,
    steps: Steps,
    /// None on ranks other than the first.
    records: Option<Records>,
    guards: Guards,
    skipped_in_a_row: usize,
}

/// A trained arm.
pub(super) struct Trained {
    pub position: Position,
    pub checkpoint: Checkpoint,
    /// The LG student at HG's first epoch, if HG starts from it.
    pub lg: Option<Checkpoint>,
}

impl<'a> Training<'a> {
    /// Opens the records of an arm that stands at the position of its steps.
    pub fn new(context: Context<'a>, steps: Steps) -> Result<Self> {
        let records = context.ranks().first_does(|| Records::open(&context.folder, steps.at.step))?;
        let guards = Guards::new(context.train.num_classes());
        Ok(Self { context, steps, records, guards, skipped_in_a_row: 0 })
    }

    /// Trains the arm to its end, and saves its weights.
    ///
    /// # Errors
    /// [`Error::Stopped`] when it was stopped, after saving a training checkpoint; when a step, an evaluation or saving
    /// fails.
    pub fn run(mut self, on: &mut dyn FnMut(Event)) -> Result<Trained> {
        let (config, arm, epochs) = (self.context.config, self.steps.at.arm, self.steps.epochs());
        let (train, per_epoch) = (self.context.train, self.steps.per_epoch());
        on(Event::Start {
            arm,
            num_steps: epochs.len() * per_epoch,
            num_images: train.len(),
            num_left_out: self.steps.num_left_out(),
            num_identities: train.num_identities(),
            num_skipped_identities: train.num_skipped_identities(),
        });
        let keeps_lg = arm == Arm::Lg && config.train.hg_start == Start::Lg;
        let lg_folder = lg_folder(&self.context.folder, config);
        let first_of_hg = (config.train.hg_first_epoch, 0);
        let mut lg = match keeps_lg && (self.steps.at.epoch, self.steps.at.batch) > first_of_hg {
            true => Some(Checkpoint::saved(&lg_folder, self.context.machine)?),
            false => None,
        };
        loop {
            let at = &self.steps.at;
            if at.is_watch_due(&config.watch, &epochs) {
                self.watch(on)?;
            }
            let at = &self.steps.at;
            if at.epoch >= epochs.end || at.stops_early(&config.watch) {
                break;
            }
            if keeps_lg && (at.epoch, at.batch) == first_of_hg {
                // Saved so that a later run can start HG from it.
                self.save_weights(&lg_folder, &self.steps.trainer.evaluated()?, self.header()?.as_ref())?;
                lg = Some(Checkpoint::saved(&lg_folder, self.context.machine)?);
            }
            self.epoch(on)?;
        }
        let mut checkpoint = self.conclude(on)?;
        if let Some(start) = self.context.start.filter(|_| config.train.start_share > 0.0) {
            let share = config.train.start_share;
            checkpoint.backbone = average((1.0 - share, &checkpoint.backbone), &[(share, &start.backbone)])?;
        }
        self.save_weights(&self.context.folder, &checkpoint.backbone, checkpoint.header.as_ref())?;
        self.flush_records()?;
        if let Some(head) = head_of_arm(arm, &checkpoint.backbone, train, config, on) {
            checkpoint.backbone = checkpoint.backbone.with_mask_head(Some(head));
            self.save_weights(&self.context.folder, &checkpoint.backbone, checkpoint.header.as_ref())?;
        }
        Ok(Trained { position: self.steps.at, checkpoint, lg })
    }

    fn header(&self) -> Result<Option<Header>> {
        self.steps.trainer.header(self.context.train.class_names())
    }

    /// Runs the remaining steps of an epoch, and saves a training checkpoint and, unless it was the last epoch, the
    /// weights.
    fn epoch(&mut self, on: &mut dyn FnMut(Event)) -> Result<()> {
        let (config, epoch, per_epoch) = (self.context.config, self.steps.at.epoch, self.steps.per_epoch());
        loop {
            match self.steps.next_step(None)? {
                Next::EndOfEpoch { broken } => {
                    if let [first, ..] = &broken[..] {
                        let num = broken.len();
                        let what = format!("other images replaced {num} broken images: {first}");
                        on(Event::Notice(format!("epoch {epoch}: {what}")));
                    }
                    break;
                }
                Next::Step(taken) => self.taken(&taken, on)?,
            }
            let (step, is_last) = (self.steps.at.step, self.steps.at.batch == per_epoch);
            let stops = self.is_stopped()?;
            let is_due = config.train.save_every > 0 && step.is_multiple_of(config.train.save_every);
            // The checkpoint at the end of an epoch is saved below.
            if (stops || is_due) && !is_last {
                self.save_state()?;
            }
            if stops && !is_last {
                return Err(self.stopped());
            }
        }
        self.save_state()?;
        let header = self.header()?;
        let centres = header.as_ref().and_then(|header| header.tensors.get(KERNEL));
        let (train, epochs) = (self.context.train, self.steps.epochs());
        let name = |class: usize| train.identity_name(class as u32);
        for said in self.guards.epoch(centres, epoch == epochs.start, name)? {
            on(Event::Notice(format!("epoch {epoch}: {said}")));
        }
        if self.steps.at.epoch < epochs.end {
            self.save_weights(&self.context.folder, &self.steps.trainer.evaluated()?, header.as_ref())?;
            if self.is_stopped()? {
                return Err(self.stopped());
            }
        }
        Ok(())
    }

    /// Records a step if its figures are known, and reports notices and warnings about it.
    fn taken(&mut self, StepResult { images, record }: &StepResult, on: &mut dyn FnMut(Event)) -> Result<()> {
        let Some(record) = record else { return Ok(()) };
        let StepRecord { step, report, .. } = record;
        self.records.as_mut().map_or(Ok(()), |records| records.step(record))?;
        let without_gradient = self.steps.trainer.without_gradient();
        if let [first, ..] = without_gradient
            && self.steps.is_first()
        {
            let num = without_gradient.len();
            on(Event::Notice(format!("{num} parameters had a zero gradient in the first step, {first} among them")));
        }
        self.context.machine.take_notices().into_iter().for_each(|said| on(Event::Notice(said)));
        if let Some(said) = self.guards.step(report) {
            on(Event::Notice(format!("step {step}: {said}")));
        }
        if report.is_skipped {
            self.steps.at.num_skipped += 1;
            self.skipped_in_a_row += 1;
            on(Event::Notice(skipped(*step, report, images, self.context.train)));
            if self.skipped_in_a_row >= self.context.config.train.max_skipped.max(1) {
                self.flush_records()?;
                return Err(Error::Training(diagnosis(self.skipped_in_a_row, *step, report)));
            }
        } else {
            self.skipped_in_a_row = 0;
            self.steps.at.last_loss = Some(report.loss);
        }
        on(Event::Step(record));
        Ok(())
    }

    /// Saves a training checkpoint.
    fn save_state(&mut self) -> Result<()> {
        let Steps { trainer, at, .. } = &mut self.steps;
        at.last_loss = Some(trainer.report()?.loss).filter(|loss| loss.is_finite()).or(at.last_loss);
        at.dropout_words = trainer.dropout_words();
        let state = TrainState {
            position: at.clone(),
            settings: self.context.config.to_toml()?,
            inputs: Some(self.context.inputs.to_owned()),
            tensors: trainer.state()?,
        };
        self.flush_records()?;
        let keep = self.context.config.train.keep_states;
        state.save(&states_folder(&self.context.folder), keep, self.context.ranks())
    }

    /// Writes the records to disk, on the rank that has them.
    fn flush_records(&mut self) -> Result<()> {
        self.records.as_mut().map_or(Ok(()), Records::flush)
    }

    /// Saves weights, on the first rank.
    fn save_weights(&self, folder: &Path, backbone: &Model, header: Option<&Header>) -> Result<()> {
        self.context.ranks().first_does(|| save_checkpoint(folder, backbone, header)).map(drop)
    }

    /// Evaluates the weights between two epochs. With early stopping, saves them if they are the best so far.
    fn watch(&mut self, on: &mut dyn FnMut(Event)) -> Result<()> {
        let model = self.steps.trainer.evaluated()?;
        let (watch, mut config) = (&self.context.config.watch, self.context.config.eval.clone());
        // Confidence intervals are computed only at the end of training.
        config.bootstrap.replicates = 0;
        let evaluation =
            evaluate(&model, self.context.watch, &config, |done, total| on(Event::Embedded { done, total }))?;
        let is_best = self.steps.at.watched(watch, &evaluation)?;
        if is_best && watch.patience > 0 {
            self.save_weights(&self.best_folder(), &model, self.header()?.as_ref())?;
        }
        let Position { arm, step, epoch, .. } = self.steps.at;
        on(Event::Watched { arm, epoch, evaluation: &evaluation, is_best });
        let record = EvaluationRecord::new(step, epoch, evaluation);
        self.records.as_mut().map_or(Ok(()), |records| records.evaluation(&record))
    }

    /// Returns the arm's final weights: the best, the moving average, or the last.
    fn conclude(&self, on: &mut dyn FnMut(Event)) -> Result<Checkpoint> {
        let (at, watch) = (&self.steps.at, &self.context.config.watch);
        let name = at.arm.name().to_owned();
        let Some(best) = at.best.filter(|_| watch.patience > 0) else {
            return Ok(Checkpoint { name, backbone: self.steps.trainer.evaluated()?, header: self.header()? });
        };
        let Best { epoch, step, eer } = best;
        let setting = watch.setting.name();
        on(Event::Notice(format!(
            "{}: ends with the weights after epoch {epoch}, step {step}: {setting} EER {:.2} %",
            at.arm.title(),
            100.0 * eer
        )));
        Ok(Checkpoint { name, ..Checkpoint::saved(&self.best_folder(), self.context.machine)? })
    }

    /// Folder of the weights with the lowest error rate so far.
    fn best_folder(&self) -> PathBuf {
        self.context.folder.join("best")
    }

    /// Whether training should stop after this step, as any rank was asked to.
    fn is_stopped(&self) -> Result<bool> {
        self.context.ranks().any(self.context.stop.is_some_and(|flag| flag.load(Ordering::Relaxed)))
    }

    fn stopped(&self) -> Error {
        let Position { arm, step, .. } = self.steps.at;
        Error::Stopped { arm: arm.name().to_owned(), step }
    }
}

/// Folder of the LG student's weights at the epoch from which HG continues it, inside LG's folder.
pub(super) fn lg_folder(folder: &Path, config: &Config) -> PathBuf {
    folder.join(format!("epoch-{}", config.train.hg_first_epoch))
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
