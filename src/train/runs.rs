//! Trainings that lie in folders: what they were to do and how far they came.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::arm::Arm;
use super::config::Config;
use super::outcome::{ArmOutcome, Finished, RESULTS_FILE};
use super::records::{StepRecord, read_steps};
use super::run::CONFIG_FILE;
use crate::error::{Error, Result};

/// A training that ran or runs.
#[derive(Debug, Serialize)]
pub struct Run {
    /// Its folder.
    pub folder: PathBuf,
    /// Its settings.
    pub config: Config,
    /// What it was computed with: version and commit of this crate, the machine. None before the first arm is finished.
    pub provenance: Option<Provenance>,
    /// The arms of the settings, in their order, and how far each is.
    pub arms: Vec<(Arm, Progressed)>,
}

/// What computed the results.
#[derive(Debug, Serialize)]
pub struct Provenance {
    /// Of this crate.
    pub version: String,
    /// Of its source.
    pub commit: String,
    /// The machine.
    pub device: String,
    /// Whose faces it was tested on.
    pub test_set: String,
}

/// How far an arm is.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progressed {
    /// Trained and evaluated.
    Finished(Box<ArmOutcome>),
    /// In training, or stopped: its last recorded step.
    Begun(Box<StepRecord>),
    /// Not begun.
    Waiting,
}

impl Run {
    /// Whether a training's results lie in `folder`.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(CONFIG_FILE).is_file()
    }

    /// Reads a training's folder.
    ///
    /// # Errors
    /// When its settings or records are missing or broken.
    pub fn read(folder: &Path) -> Result<Self> {
        let config = Config::read(&folder.join(CONFIG_FILE))?;
        let path = folder.join(RESULTS_FILE);
        let results: Option<Finished> = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let wrong = |what: String| Error::Format { path, offset: 0, what };
                Some(serde_json::from_str(&text).map_err(|e| wrong(format!("no results of a training: {e}")))?)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(&path)(e)),
        };
        let (mut finished, provenance) = match results {
            Some(Finished { arms, version, commit, device, test_set, .. }) => {
                (arms, Some(Provenance { version, commit, device, test_set }))
            }
            None => (BTreeMap::new(), None),
        };
        let mut arms: Vec<Arm> = config.train.arms.clone();
        // A teacher that was given was evaluated too.
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
        Ok(Self { folder: folder.to_owned(), config, provenance, arms })
    }

    /// The arms that are finished, with what came out.
    pub fn finished(&self) -> impl Iterator<Item = (Arm, &ArmOutcome)> {
        self.arms.iter().filter_map(|(arm, progressed)| match progressed {
            Progressed::Finished(outcome) => Some((*arm, outcome.as_ref())),
            _ => None,
        })
    }
}
