//! Evaluations between epochs: the best weights so far, and early stopping.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::checkpoint::{Checkpoint, save_checkpoint};
use super::outcome::Event;
use super::records::{EvaluationRecord, Records};
use super::run::Experiment;
use super::state::Position;
use super::trainer::Trainer;
use crate::error::{Error, Result};
use crate::eval::{Evaluation, Setting, evaluate};

/// Settings of evaluations between epochs and of early stopping. By default both are off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchConfig {
    /// Epochs between evaluations; 0 for none before the end.
    pub every: usize,
    /// The setting whose equal error rate decides.
    pub setting: Setting,
    /// Early stopping: number of evaluations in a row without a lower error rate after which an arm stops. The arm then
    /// ends with the weights that had the lowest error rate. 0 turns early stopping off: the arm ends with its last
    /// weights, or their moving average if one is kept.
    pub patience: usize,
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self { every: 0, setting: Setting::UM, patience: 0 }
    }
}

/// The evaluation with the lowest error rate so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Epochs before the evaluation, counted from the start of the schedule.
    pub epoch: usize,
    /// Training steps before the evaluation.
    pub step: usize,
    /// Equal error rate in the setting [`WatchConfig::setting`], in `[0, 1]`.
    pub eer: f64,
}

impl WatchConfig {
    /// Checks that the settings are consistent.
    ///
    /// # Errors
    /// When `patience` is set without `every`.
    pub fn validate(&self) -> Result<()> {
        if self.patience > 0 && self.every == 0 {
            let what = "watch.patience: expected watch.every (epochs between evaluations) of 1 or more, found 0";
            return Err(Error::Config(what.to_owned()));
        }
        Ok(())
    }

    /// Whether to evaluate before the next step of an arm with the epochs `first..end`.
    pub(super) fn is_due(&self, at: &Position, first: usize, end: usize) -> bool {
        let is_new = at.batch == 0 && at.epoch > first && at.watched < at.epoch;
        self.every > 0 && is_new && ((at.epoch - first).is_multiple_of(self.every) || at.epoch == end)
    }

    /// Records an evaluation in the position; returns whether it is the best so far.
    pub(super) fn note(&self, evaluation: &Evaluation, at: &mut Position) -> bool {
        at.watched = at.epoch;
        let eer = evaluation.get(self.setting).metrics.eer;
        let is_best = at.best.is_none_or(|best| eer < best.eer);
        if is_best {
            at.best = Some(Best { epoch: at.epoch, step: at.step, eer });
        }
        at.num_worse = if is_best { 0 } else { at.num_worse + 1 };
        is_best
    }

    /// Whether to stop the arm early.
    pub(super) fn stops(&self, at: &Position) -> bool {
        self.patience > 0 && at.num_worse >= self.patience
    }
}

impl Experiment {
    /// Evaluates the weights between two epochs. With early stopping, saves them if they are the best so far.
    pub(super) fn watch(
        &self,
        trainer: &Trainer,
        at: &mut Position,
        records: &mut Records,
        on: &mut dyn FnMut(Event),
    ) -> Result<()> {
        let model = trainer.evaluated()?;
        let (watch, mut config) = (&self.config.watch, self.config.eval.clone());
        // Confidence intervals are computed only at the end of training.
        config.bootstrap.replicates = 0;
        let test = self.splits.watch.as_ref().unwrap_or(&self.splits.test);
        let evaluation = evaluate(&model, test, &config, |done, total| on(Event::Embedded { done, total }))?;
        let is_best = watch.note(&evaluation, at);
        if is_best && watch.patience > 0 {
            let header = trainer.header(self.train_set(at.arm).identity_names())?;
            save_checkpoint(&self.best_folder(at.arm), &model, header.as_ref())?;
        }
        on(Event::Watched { arm: at.arm, epoch: at.epoch, evaluation: &evaluation, is_best });
        records.evaluation(&EvaluationRecord { step: at.step, epoch: at.epoch, evaluation })
    }

    /// Returns an arm's final weights: the best, the moving average, or the last.
    pub(super) fn conclude(&self, trainer: &Trainer, at: &Position, on: &mut dyn FnMut(Event)) -> Result<Checkpoint> {
        let name = at.arm.name().to_owned();
        let Some(best) = at.best.filter(|_| self.config.watch.patience > 0) else {
            let header = trainer.header(self.train_set(at.arm).identity_names())?;
            return Ok(Checkpoint { name, backbone: trainer.evaluated()?, header });
        };
        let Best { epoch, step, eer } = best;
        let setting = self.config.watch.setting.name();
        on(Event::Notice(format!(
            "{}: ends with the weights after epoch {epoch}, step {step}: {setting} EER {:.2} %",
            at.arm.title(),
            100.0 * eer
        )));
        Ok(Checkpoint { name, ..self.saved(&self.best_folder(at.arm))? })
    }

    /// Folder of the weights with the lowest error rate so far.
    fn best_folder(&self, arm: Arm) -> PathBuf {
        self.arm_folder(arm).join("best")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluations_are_due_at_ends_of_epochs_once_each() {
        let watch = WatchConfig { every: 2, ..WatchConfig::default() };
        let mut at = Position::start(Arm::Lg, 3);
        let mut due = Vec::new();
        for epoch in 3..=10 {
            at.epoch = epoch;
            if watch.is_due(&at, 3, 10) {
                due.push(epoch);
                at.watched = epoch;
                assert!(!watch.is_due(&at, 3, 10));
            }
        }
        assert_eq!(due, [5, 7, 9, 10]);
        at.watched = 0;
        at.batch = 1;
        assert!(!watch.is_due(&at, 3, 10), "only between epochs");
        assert!(!WatchConfig::default().is_due(&Position { batch: 0, ..at }, 3, 10));
    }

    #[test]
    fn patience_needs_evaluations() {
        let config = WatchConfig { patience: 1, ..WatchConfig::default() };
        assert!(config.validate().unwrap_err().to_string().contains("watch.patience"));
    }
}
