//! What happens while an experiment runs, and what came out of it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::config::Config;
use super::step::StepReport;
use super::watch::Best;
use crate::eval::{Evaluation, SettingResult};

/// What happens while an experiment runs, for whoever shows it.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// The training of an arm begins.
    Start {
        /// Which arm.
        arm: Arm,
        /// Steps it will take.
        num_steps: usize,
        /// Images in the training set, and how many each epoch leaves out because they fill no batch.
        num_images: usize,
        /// See `num_images`.
        num_left_out: usize,
        /// Identities in the training set, and how many it leaves out for having too few images.
        num_identities: usize,
        /// See `num_identities`.
        num_skipped_identities: usize,
    },
    /// Something that the user should know of.
    Notice(String),
    /// A step was taken.
    Step {
        /// Its number, from 1.
        step: usize,
        /// The epoch, from 0.
        epoch: usize,
        /// Its figures.
        report: &'a StepReport,
        /// Images per second since the arm began.
        images_per_s: f64,
        /// Share of that time spent waiting for data.
        wait_share: f64,
    },
    /// Images were embedded for the evaluation.
    Embedded {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// The weights were evaluated between two epochs.
    Watched {
        /// Which arm.
        arm: Arm,
        /// Epochs of training before it, from the schedule's start.
        epoch: usize,
        /// The figures.
        evaluation: &'a Evaluation,
        /// Whether they are the best so far.
        is_best: bool,
    },
    /// An arm is trained and evaluated.
    Finished {
        /// Which arm.
        arm: Arm,
        /// Its figures.
        evaluation: &'a Evaluation,
    },
}

/// Name of the record of results in the folder of an experiment.
pub(super) const RESULTS_FILE: &str = "results.json";

/// What a later run needs of that record.
#[derive(Debug, Deserialize)]
pub(super) struct Finished {
    #[serde(default)]
    pub version: String,
    #[serde(default)]
    pub commit: String,
    #[serde(default)]
    pub device: String,
    #[serde(default)]
    pub test_set: String,
    pub config: Config,
    pub arms: BTreeMap<Arm, ArmOutcome>,
}

/// The results of an experiment, with what is needed to repeat it.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Version of this crate.
    pub version: &'static str,
    /// Commit it was built from.
    pub commit: &'static str,
    /// Where it ran.
    pub device: String,
    /// Threads of the computation.
    pub threads: usize,
    /// Whose faces it was tested on.
    pub test_set: String,
    /// Every setting, the seed among them.
    pub config: Config,
    /// The teacher that was given instead of trained.
    pub teacher: Option<PathBuf>,
    /// The weights that were given to start from.
    pub start: Option<PathBuf>,
    /// By arm, in the order they ran.
    pub arms: BTreeMap<Arm, ArmOutcome>,
}

/// The result of one arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArmOutcome {
    /// Steps taken; 0 for a given teacher.
    pub num_steps: usize,
    /// Steps of them that changed nothing, because their loss or gradient was not finite.
    pub num_skipped: usize,
    /// Wall-clock seconds of the training, without the evaluation.
    pub seconds: f64,
    /// The loss of the last step.
    pub last_loss: Option<f64>,
    /// The best of the evaluations in between, if there were some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// The figures on the test set.
    #[serde(flatten)]
    pub evaluation: Evaluation,
    /// The figures on photos with real masks, if the settings name some.
    pub real_masks: Option<SettingResult>,
}

impl Outcome {
    /// Returns the arms' names and figures as the table wants them.
    pub fn rows(&self) -> Vec<(&str, &Evaluation)> {
        self.arms.iter().map(|(arm, outcome)| (arm.title(), &outcome.evaluation)).collect()
    }
}
