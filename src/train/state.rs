//! Training checkpoints: everything that later steps depend on, in a folder that is written atomically.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::objective::State;
use super::watch::{Best, WatchConfig};
use crate::error::{Error, Result};
use crate::eval::Evaluation;
use crate::files::{UNFINISHED, remove_unfinished, sha256, sync_folder, write_atomic};
use crate::weights::{read_safetensors, write_safetensors};

/// File with the position, the settings and the SHA-256 of the other files; written last.
const STATE_FILE: &str = "state.json";
const EXTENSION: &str = "safetensors";
/// Prefix of a checkpoint's folder name; the step number follows.
const PREFIX: &str = "step-";
/// Format version; changes when older versions of this crate could no longer resume from a checkpoint.
const FORMAT: u32 = 1;

/// Position of an arm in its training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The arm.
    pub arm: Arm,
    /// Steps so far.
    pub step: usize,
    /// Epoch of the next step, from 0.
    pub epoch: usize,
    /// Batch of the next step within its epoch, from 0.
    pub batch: usize,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Steps skipped because their loss or gradient was not finite.
    pub num_skipped: usize,
    /// Loss of the last step whose loss is known and finite.
    pub last_loss: Option<f64>,
    /// Words drawn so far from dropout's random number generator.
    pub dropout_words: u64,
    /// Epoch at whose start the arm was last evaluated; the arm's first epoch if it was not.
    #[serde(default)]
    pub watched: usize,
    /// The best of these evaluations.
    #[serde(default)]
    pub best: Option<Best>,
    /// Evaluations since the best one.
    #[serde(default)]
    pub num_worse: usize,
}

impl Position {
    /// Returns the position before the first step of an arm whose first epoch is `epoch`.
    pub fn start(arm: Arm, epoch: usize) -> Self {
        Self {
            arm,
            step: 0,
            epoch,
            batch: 0,
            seconds: 0.0,
            num_skipped: 0,
            last_loss: None,
            dropout_words: 0,
            watched: epoch,
            best: None,
            num_worse: 0,
        }
    }

    /// Whether to evaluate before the next step of an arm with these epochs.
    pub(super) fn is_watch_due(&self, watch: &WatchConfig, epochs: &Range<usize>) -> bool {
        let is_new = self.batch == 0 && self.epoch > epochs.start && self.watched < self.epoch;
        let is_due = || (self.epoch - epochs.start).is_multiple_of(watch.every) || self.epoch == epochs.end;
        watch.every > 0 && is_new && is_due()
    }

    /// Records an evaluation; returns whether it is the best so far.
    ///
    /// # Errors
    /// When the test set has no pairs of the setting that decides.
    pub(super) fn watched(&mut self, watch: &WatchConfig, evaluation: &Evaluation) -> Result<bool> {
        let Some(decisive) = evaluation.get(watch.setting) else {
            let what = format!("watch.setting: expected a setting that has pairs, found {}", watch.setting.name());
            return Err(Error::Config(what));
        };
        self.watched = self.epoch;
        let eer = decisive.metrics.eer;
        let is_best = self.best.is_none_or(|best| eer < best.eer);
        if is_best {
            self.best = Some(Best { epoch: self.epoch, step: self.step, eer });
        }
        self.num_worse = if is_best { 0 } else { self.num_worse + 1 };
        Ok(is_best)
    }

    /// Whether to stop the arm early.
    pub(super) fn stops_early(&self, watch: &WatchConfig) -> bool {
        watch.patience > 0 && self.num_worse >= watch.patience
    }
}

/// A training checkpoint: everything needed to resume an arm.
#[derive(Debug)]
pub struct TrainState {
    /// Position in the training.
    pub position: Position,
    /// All settings, as TOML.
    pub settings: String,
    /// Digest of the data and given weights; none in checkpoints of versions that did not record it.
    pub inputs: Option<String>,
    /// State of the trainer.
    pub tensors: State,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    format: u32,
    version: String,
    position: Position,
    settings: String,
    #[serde(default)]
    inputs: Option<String>,
    /// SHA-256 of the other files.
    files: BTreeMap<String, String>,
}

/// Returns the folder of an arm's training checkpoints, inside the arm's results folder.
pub fn states_folder(arm_folder: &Path) -> PathBuf {
    arm_folder.join("states")
}

/// Removes the training checkpoints of an arm, if it has any.
pub(super) fn remove_states(arm_folder: &Path) -> Result<()> {
    let folder = states_folder(arm_folder);
    if folder.exists() { std::fs::remove_dir_all(&folder).map_err(Error::io(&folder)) } else { Ok(()) }
}

impl TrainState {
    /// Writes the checkpoint to a subfolder of `folder` named after its step, and removes all but the newest `keep`.
    /// The write is atomic: on a failure or crash the subfolder does not appear and older checkpoints are unchanged.
    ///
    /// # Errors
    /// When the checkpoint cannot be written; names the newest one that exists.
    pub fn save(&self, folder: &Path, keep: usize) -> Result<()> {
        self.write(folder).map_err(|error| {
            let newest = steps(folder).into_iter().next_back();
            let kept = newest.map_or("none".to_owned(), |(_, path)| path.display().to_string());
            Error::Training(format!(
                "cannot save the checkpoint of step {} (newest checkpoint: {kept}): {error}",
                self.position.step
            ))
        })?;
        let all = steps(folder);
        for (_, path) in all.iter().take(all.len().saturating_sub(keep.max(1))) {
            std::fs::remove_dir_all(path).map_err(Error::io(path))?;
        }
        Ok(())
    }

    fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let target = folder.join(format!("{PREFIX}{:09}", self.position.step));
        if target.exists() {
            return Ok(());
        }
        remove_unfinished(folder)?;
        let unfinished = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(folder).map_err(Error::io(folder))?;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let mut files = BTreeMap::new();
        for (name, tensors) in &self.tensors {
            let name = format!("{name}.{EXTENSION}");
            let path = unfinished.path().join(&name);
            write_safetensors(&path, tensors, &metadata)?;
            files.insert(name, sha256(&path)?);
        }
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let (position, settings, inputs) = (self.position.clone(), self.settings.clone(), self.inputs.clone());
        let state = StateFile { format: FORMAT, version, position, settings, inputs, files };
        let json = serde_json::to_vec_pretty(&state).map_err(|e| Error::Config(e.to_string()))?;
        write_atomic(&unfinished.path().join(STATE_FILE), &json)?;
        sync_folder(unfinished.path())?;
        std::fs::rename(unfinished.path(), &target).map_err(Error::io(&target))?;
        // The rename has moved the temporary folder, so there is nothing to remove.
        let _ = unfinished.keep();
        sync_folder(folder)
    }

    /// Returns the newest intact checkpoint in `folder`, if there is one, and a message for each newer, corrupt one.
    ///
    /// # Errors
    /// When a killed process's temporary folder cannot be removed.
    pub fn newest(folder: &Path) -> Result<(Option<Self>, Vec<String>)> {
        remove_unfinished(folder)?;
        let mut problems = Vec::new();
        for (_, path) in steps(folder).into_iter().rev() {
            match Self::read(&path) {
                Ok(state) => return Ok((Some(state), problems)),
                Err(error) => problems.push(format!("{error}; this training checkpoint is not used")),
            }
        }
        Ok((None, problems))
    }

    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let wrong = |what: String| Error::Format { path: path.clone(), offset: 0, what };
        let state: StateFile =
            serde_json::from_str(&text).map_err(|e| wrong(format!("not a training checkpoint: {e}")))?;
        if state.format != FORMAT {
            return Err(wrong(format!("expected format {FORMAT}, found {}, of another version", state.format)));
        }
        let part = |name: &str| {
            let path = folder.join(name);
            let found = sha256(&path)?;
            if state.files.get(name) != Some(&found) {
                let what = "SHA-256 mismatch: the file has changed since it was written".to_owned();
                return Err(Error::Checkpoint { path, what });
            }
            Ok(read_safetensors(&path)?.tensors)
        };
        let mut tensors = State::new();
        for file in state.files.keys() {
            match file.strip_suffix(EXTENSION).and_then(|name| name.strip_suffix('.')) {
                Some(name) if !name.contains(['/', '\\']) => tensors.insert(name.to_owned(), part(file)?),
                _ => return Err(wrong(format!("expected names of {EXTENSION} files in its folder, found {file}"))),
            };
        }
        let StateFile { position, settings, inputs, .. } = state;
        Ok(Self { position, settings, inputs, tensors })
    }
}

/// Returns the checkpoints in a folder by step, the newest last.
fn steps(folder: &Path) -> BTreeMap<usize, PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let step = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        Some((name.to_str()?.strip_prefix(PREFIX)?.parse().ok()?, entry.path()))
    };
    entries.filter_map(step).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::*;

    fn state(step: usize) -> TrainState {
        let tensors = |value: f64| {
            BTreeMap::from([("w".to_owned(), Tensor::full(value as f32, (2, 3), &Device::Cpu).expect("memory"))])
        };
        TrainState {
            position: Position {
                arm: Arm::Lg,
                step,
                epoch: 1,
                batch: step,
                seconds: 0.1 + 0.2,
                num_skipped: 0,
                last_loss: Some(1.0 / 3.0),
                dropout_words: 7,
                watched: 1,
                best: Some(Best { epoch: 1, step: 9, eer: 0.1 + 0.2 }),
                num_worse: 3,
            },
            settings: "seed = 0".to_owned(),
            inputs: Some("a digest".to_owned()),
            tensors: State::from([
                ("backbone".to_owned(), tensors(step as f64)),
                ("header".to_owned(), tensors(2.0)),
                ("optimizer".to_owned(), tensors(3.0)),
                ("ema".to_owned(), tensors(4.0)),
            ]),
        }
    }

    fn newest(folder: &Path) -> (Option<usize>, usize) {
        let (state, problems) = TrainState::newest(folder).unwrap();
        (state.map(|state| state.position.step), problems.len())
    }

    #[test]
    fn evaluations_are_due_at_ends_of_epochs_once_each() {
        let watch = WatchConfig { every: 2, ..WatchConfig::default() };
        let mut at = Position::start(Arm::Lg, 3);
        let mut due = Vec::new();
        for epoch in 3..=10 {
            at.epoch = epoch;
            if at.is_watch_due(&watch, &(3..10)) {
                due.push(epoch);
                at.watched = epoch;
                assert!(!at.is_watch_due(&watch, &(3..10)));
            }
        }
        assert_eq!(due, [5, 7, 9, 10]);
        at.watched = 0;
        at.batch = 1;
        assert!(!at.is_watch_due(&watch, &(3..10)), "only between epochs");
        assert!(!Position { batch: 0, ..at }.is_watch_due(&WatchConfig::default(), &(3..10)));
    }

    #[test]
    fn a_state_reads_back_as_written_and_only_the_newest_stay() {
        let root = tempfile::tempdir().unwrap();
        let folder = states_folder(root.path());
        assert_eq!(newest(&folder), (None, 0));
        for step in [3, 10, 200] {
            state(step).save(&folder, 2).unwrap();
        }
        assert_eq!(steps(&folder).into_keys().collect::<Vec<_>>(), [10, 200]);
        let (found, _) = TrainState::newest(&folder).unwrap();
        let found = found.unwrap();
        assert_eq!(found.position, state(200).position);
        assert_eq!(found.tensors["ema"]["w"].to_vec2::<f32>().unwrap(), [[4.0; 3]; 2]);
        assert_eq!(found.tensors["backbone"]["w"].to_vec2::<f32>().unwrap(), [[200.0; 3]; 2]);
        // Saving the same step again changes nothing.
        state(200).save(&folder, 2).unwrap();
        assert_eq!(newest(&folder), (Some(200), 0));
    }

    #[test]
    fn a_state_that_is_not_whole_gives_way_to_the_one_before() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        state(1).save(folder, 3).unwrap();
        state(2).save(folder, 3).unwrap();
        let path = folder.join("step-000000002");
        for file in ["backbone", "header", "optimizer", "ema"]
            .map(|name| format!("{name}.{EXTENSION}"))
            .into_iter()
            .chain([STATE_FILE.to_owned()])
        {
            let whole = std::fs::read(path.join(&file)).unwrap();
            for changed in
                [whole[..whole.len() - 1].to_vec(), Vec::new(), [&whole[..9], &[whole[9] ^ 1], &whole[10..]].concat()]
            {
                std::fs::write(path.join(&file), changed).unwrap();
                assert_eq!(newest(folder), (Some(1), 1), "{file}");
            }
            std::fs::remove_file(path.join(&file)).unwrap();
            assert_eq!(newest(folder), (Some(1), 1), "{file}");
            std::fs::write(path.join(&file), whole).unwrap();
            assert_eq!(newest(folder), (Some(2), 0), "{file}");
        }
        // A killed process's temporary folder is not a checkpoint and is removed.
        std::fs::create_dir(folder.join(".maskinv-x")).unwrap();
        assert_eq!(newest(folder), (Some(2), 0));
        assert!(!folder.join(".maskinv-x").exists());
    }

    #[test]
    fn a_state_that_cannot_be_saved_leaves_the_others_and_says_which_is_whole() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("states");
        std::fs::write(&folder, "a file").unwrap();
        let error = state(1).save(&folder, 2).unwrap_err().to_string();
        assert!(error.contains("cannot save the checkpoint of step 1 (newest checkpoint: none)"), "{error}");
        std::fs::remove_file(&folder).unwrap();
        state(1).save(&folder, 2).unwrap();
        assert_eq!(newest(&folder), (Some(1), 0));
    }
}
