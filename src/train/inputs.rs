//! What a training reads besides its settings: data sets and given weights, by their fingerprints.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::checkpoint::Checkpoint;
use super::given_weights::GivenWeights;
use super::outcome::Event;
use crate::data::{Dataset, Splits, SplitsFingerprint, TestFingerprint};
use crate::error::{Error, Result};
use crate::files::{hex, write_atomic};

/// File name of the fingerprint of the data in the results folder.
pub(super) const DATA_FILE: &str = "data.json";

/// Whether a training may go on with other data or given weights than it was begun with, or from class centres of
/// other people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChangedData {
    /// It is an error that names the first difference.
    #[default]
    Refuse,
    /// It is a notice.
    Accept,
}

/// Fingerprints of the data sets and the given weights of a training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Inputs {
    data: SplitsFingerprint,
    /// SHA-256 of the given teacher's weights.
    teacher: Option<String>,
    /// SHA-256 of the weights given to start from.
    start: Option<String>,
}

impl Inputs {
    /// Returns the inputs of an experiment; `teacher_train` is the teacher's training set if it is not the students'.
    pub fn of(splits: &Splits, teacher_train: Option<&dyn Dataset>, given: &GivenWeights) -> Result<Self> {
        let digest = |weights: &Option<Checkpoint>| {
            weights.as_ref().map(|weights| weights.backbone.weights_digest()).transpose()
        };
        Ok(Self {
            data: SplitsFingerprint::of(splits, teacher_train),
            teacher: digest(&given.teacher)?,
            start: digest(&given.start)?,
        })
    }

    /// Reads the record in a training's folder; none if there is none.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(DATA_FILE);
        let text = match std::fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(Error::io(&path))?,
        };
        serde_json::from_str(&text).map(Some).map_err(|e| {
            let what = format!("not the fingerprint of a training's data: {e}");
            Error::Format { path, offset: 0, what }
        })
    }

    /// Returns the fingerprint of the test set.
    pub fn into_test(self) -> TestFingerprint {
        self.data.into_test()
    }

    /// Describes the first difference; none if both are the same.
    fn difference(&self, now: &Self) -> Option<String> {
        let weights = |name: &str, before: &Option<String>, now: &Option<String>| {
            (before != now).then(|| format!("{name} has other weights than before"))
        };
        self.data
            .difference(&now.data)
            .or_else(|| weights("the teacher", &self.teacher, &now.teacher))
            .or_else(|| weights("the model to start from", &self.start, &now.start))
    }

    /// Returns the SHA-256 of these fingerprints, which training checkpoints hold.
    pub fn digest(&self) -> Result<String> {
        Ok(hex(&Sha256::digest(json(self)?)))
    }

    /// Records the inputs of a new training in its folder, or compares those of a resumed one with the record.
    ///
    /// # Errors
    /// When a resumed training finds other inputs and may not accept them, or the record cannot be read or written.
    pub fn check(&self, folder: &Path, resumes: bool, changed: ChangedData, on: &mut dyn FnMut(Event)) -> Result<()> {
        let path = folder.join(DATA_FILE);
        let before = if resumes { Self::read(folder)? } else { None };
        if let Some(before) = before {
            match (before.difference(self), changed) {
                (None, _) => return Ok(()),
                (Some(what), ChangedData::Refuse) => return Err(other_data(folder, &what)),
                (Some(what), ChangedData::Accept) => on(Event::Notice(format!("goes on with changed data: {what}"))),
            }
        } else if resumes {
            let what = "is not there: whether the data is still that of the beginning is not known";
            on(Event::Notice(format!("{}: {what}", path.display())));
        }
        write_atomic(&path, &json(self)?)
    }
}

/// Returns the error of a training in `folder` whose data is not that of its beginning.
pub(super) fn other_data(folder: &Path, what: &str) -> Error {
    let what = format!(
        "expected the data that it was begun with; {what}. --accept-changed-data goes on with the data as it is now"
    );
    Error::Data { path: folder.to_owned(), what }
}

fn json(inputs: &Inputs) -> Result<Vec<u8>> {
    serde_json::to_vec(inputs).map_err(|e| Error::Config(e.to_string()))
}
