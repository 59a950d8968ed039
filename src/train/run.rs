//! Reads the results folders of trainings: settings, progress and results.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::arm::Arm;
use super::config::{CONFIG_FILE, Config};
use super::inputs::Inputs;
use super::outcome::{ArmOutcome, Finished, PairedTest, RESULTS_FILE};
use crate::data::TestFingerprint;
use crate::error::{Error, Result};
use crate::records::{StepRecord, read_steps};

/// A training, finished or not, as read from its results folder.
#[derive(Debug, Serialize)]
pub struct Run {
    /// The results folder.
    pub folder: PathBuf,
    /// The settings.
    pub config: Config,
    /// Origin of the results; none before the first arm is finished.
    pub provenance: Option<Provenance>,
    /// Progress of each arm: the arms of the settings in their order, then a given teacher if it was evaluated.
    pub arms: Vec<(Arm, Progressed)>,
    /// Paired tests between the arms; empty before all are finished.
    pub paired_tests: Vec<PairedTest>,
    /// Fingerprint of the test set; none if the training did not record it.
    #[serde(skip)]
    pub test_data: Option<TestFingerprint>,
}

/// Origin of results: crate version and commit, machine, test set.
#[derive(Debug, Serialize)]
pub struct Provenance {
    /// Version of this crate.
    pub version: String,
    /// Commit that the crate was built from.
    pub commit: String,
    /// Machine that the training ran on.
    pub device: String,
    /// Description of the test set.
    pub test_set: String,
}

/// Progress of an arm.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progressed {
    /// Trained and evaluated.
    Finished(Box<ArmOutcome>),
    /// In training, or stopped; holds the last recorded step.
    Begun(Box<StepRecord>),
    /// Not started.
    Waiting,
}

impl Run {
    /// Whether `folder` is the results folder of a training.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(CONFIG_FILE).is_file()
    }

    /// Reads the results folder of a training.
    ///
    /// # Errors
    /// When the settings are missing, or settings, results or records are corrupt.
    pub fn read(folder: &Path) -> Result<Self> {
        let config = Config::read(&folder.join(CONFIG_FILE))?;
        let path = folder.join(RESULTS_FILE);
        let results: Option<Finished> = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let wrong = |what: String| Error::Format { path, offset: 0, what };
                Some(serde_json::from_str(&text).map_err(|e| wrong(format!("not the results of a training: {e}")))?)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(&path)(e)),
        };
        let (mut finished, paired_tests, provenance) = match results {
            Some(Finished { arms, paired_tests, version, commit, device, test_set, .. }) => {
                (arms, paired_tests, Some(Provenance { version, commit, device, test_set }))
            }
            None => (BTreeMap::new(), Vec::new(), None),
        };
        let mut arms: Vec<Arm> = config.train.arms.clone();
        // A given teacher is evaluated too, but is not an arm of the settings.
        arms.extend(finished.keys().filter(|arm| !config.train.arms.contains(arm)));
        let progressed = |arm: Arm| -> Result<(Arm, Progressed)> {
            let progressed = match finished.remove(&arm) {
                Some(outcome) => Progressed::Finished(Box::new(outcome)),
                None => match read_steps(&folder.join(arm.name()))?.pop() {
                    Some(step) => Progressed::Begun(Box::new(step)),
                    None => Progressed::Waiting,
                },
            };
            Ok((arm, progressed))
        };
        let arms = arms.into_iter().map(progressed).collect::<Result<_>>()?;
        let test_data = Inputs::read(folder)?.map(Inputs::into_test);
        Ok(Self { folder: folder.to_owned(), config, provenance, arms, paired_tests, test_data })
    }

    /// Returns the finished arms with their results.
    pub fn finished(&self) -> impl Iterator<Item = (Arm, &ArmOutcome)> {
        self.arms.iter().filter_map(|(arm, progressed)| match progressed {
            Progressed::Finished(outcome) => Some((*arm, outcome.as_ref())),
            _ => None,
        })
    }
}
