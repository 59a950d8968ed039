//! Events of a running experiment, and its results.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::config::Config;
use super::watch::Best;
use crate::eval::{Difference, Evaluation, SettingResult};
use crate::records::StepRecord;

/// An event of a running experiment, for progress displays.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The training of an arm starts.
    Start {
        /// The arm.
        arm: Arm,
        /// Steps in all its epochs.
        num_steps: usize,
        /// Images in the training set.
        num_images: usize,
        /// Images that each epoch leaves out because they do not fill a batch.
        num_left_out: usize,
        /// Identities in the training set.
        num_identities: usize,
        /// Identities left out of the training set because they have too few images.
        num_skipped_identities: usize,
    },
    /// A message for the user.
    Notice(String),
    /// A step whose figures were read: every step on the CPU, every 20th on a GPU.
    Step(&'a StepRecord),
    /// Progress of embedding images.
    Embedded {
        /// Images embedded so far.
        done: usize,
        /// Images to embed.
        total: usize,
    },
    /// An evaluation between two epochs.
    Watched {
        /// The arm.
        arm: Arm,
        /// Epochs before the evaluation, counted from the start of the schedule.
        epoch: usize,
        /// The figures.
        evaluation: &'a Evaluation,
        /// Whether this is the best evaluation so far.
        is_best: bool,
    },
    /// An arm was trained and evaluated.
    Finished {
        /// The arm.
        arm: Arm,
        /// The figures on the test set.
        evaluation: &'a Evaluation,
    },
}

/// File name of the results in the results folder.
pub(super) const RESULTS_FILE: &str = "results.json";

/// The part of `results.json` that a later run reads.
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
    #[serde(default)]
    pub paired_tests: Vec<PairedTest>,
}

/// The results of an experiment, with the settings and versions needed to repeat it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Outcome {
    /// Version of this crate.
    pub version: &'static str,
    /// Commit that the crate was built from.
    pub commit: &'static str,
    /// Machine that the experiment ran on.
    pub device: String,
    /// Number of worker threads.
    pub threads: usize,
    /// Description of the test set.
    pub test_set: String,
    /// All settings, including the seed.
    pub config: Config,
    /// Name of the given teacher; none if the teacher was trained.
    pub teacher: Option<String>,
    /// Name of the weights that training was given to start from.
    pub start: Option<String>,
    /// Result of each arm.
    pub arms: BTreeMap<Arm, ArmOutcome>,
    /// Students against augmentation alone, once all arms are finished.
    pub paired_tests: Vec<PairedTest>,
}

/// The result of one arm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ArmOutcome {
    /// Steps taken; 0 for a given teacher.
    pub num_steps: usize,
    /// Steps that were skipped because their loss or gradient was not finite.
    pub num_skipped: usize,
    /// Wall-clock seconds of training, without evaluations.
    pub seconds: f64,
    /// Loss of the last step whose loss is known and finite.
    pub last_loss: Option<f64>,
    /// The best evaluation between epochs, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// The figures on the test set.
    #[serde(flatten)]
    pub evaluation: Evaluation,
    /// The figures on photos with real masks, if the settings name any.
    pub real_masks: Option<SettingResult>,
}

impl Outcome {
    /// Returns the arms' names and figures, the rows of [`table`](crate::eval::table).
    pub fn rows(&self) -> Vec<(&str, &Evaluation)> {
        self.arms.iter().map(|(arm, outcome)| (arm.title(), &outcome.evaluation)).collect()
    }
}

/// A metric of two arms on the same pairs, and whether they differ by more than chance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PairedTest {
    /// The arm.
    pub arm: Arm,
    /// The arm that it is compared with.
    pub baseline: Arm,
    /// `U-U`, `U-M`, `M-U`, `M-M` or `real-masks`.
    pub setting: String,
    /// The metric: `EER`, `FMR100`, `FMR1000`, `FDR` or `AUC`.
    pub metric: String,
    /// Value of the arm less that of the baseline, with its interval and p value, from a bootstrap over people.
    #[serde(flatten)]
    pub difference: Difference,
}
