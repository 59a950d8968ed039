//! Training checkpoints: everything that later steps depend on, in a folder that is written atomically.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::arm::Arm;
use super::objective::{HEAD_MOMENTS, HEADER, State};
use super::trainer::OPTIMIZER;
use super::watch::{Best, WatchConfig};
use crate::dist::{ClassShard, Ranks};
use crate::error::{Error, Result};
use crate::eval::Evaluation;
use crate::files::{UNFINISHED, remove_unfinished, sha256, sync_folder, write_atomic};
use crate::weights::{read_safetensors, write_safetensors};

/// File with the position, the settings and the SHA-256 of the other files; written last.
const STATE_FILE: &str = "state.json";
const EXTENSION: &str = "safetensors";
/// Prefix of a checkpoint's folder name; the step number follows.
const PREFIX: &str = "step-";
/// Format version of checkpoints of one rank; changes when older versions of this crate could no longer resume from
/// them.
const FORMAT: u32 = 1;
/// Format version of checkpoints whose class centres are in a file for each rank.
const SHARDED_FORMAT: u32 = 2;
/// Name of the files of class centres and their moments, before the rank: each has those of the rank's classes.
const SHARD: &str = "shard-";

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
    /// Number of ranks that wrote the checkpoint, if there were several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ranks: Option<usize>,
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
    /// Each of several ranks writes its class centres, the first one the rest. The write is atomic: on a
    /// failure or crash of any rank the subfolder does not appear and older checkpoints are unchanged.
    ///
    /// # Errors
    /// When the checkpoint cannot be written; names the newest one that exists.
    pub fn save(&self, folder: &Path, keep: usize, ranks: &Ranks) -> Result<()> {
        self.write(folder, ranks).map_err(|error| {
            let newest = steps(folder).into_iter().next_back();
            let kept = newest.map_or("none".to_owned(), |(_, path)| path.display().to_string());
            Error::Training(format!(
                "cannot save the checkpoint of step {} (newest checkpoint: {kept}): {error}",
                self.position.step
            ))
        })?;
        let removed = ranks.first_does(|| {
            let all = steps(folder);
            let old = all.values().take(all.len().saturating_sub(keep.max(1)));
            old.into_iter().try_for_each(|path| std::fs::remove_dir_all(path).map_err(Error::io(path)))
        });
        removed.map(drop)
    }

    fn write(&self, folder: &Path, ranks: &Ranks) -> Result<()> {
        let target = folder.join(format!("{PREFIX}{:09}", self.position.step));
        let unfinished = ranks.first_does(|| {
            std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            if target.exists() {
                return Ok(None);
            }
            remove_unfinished(folder)?;
            tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(folder).map_err(Error::io(folder)).map(Some)
        })?;
        let unfinished = unfinished.flatten();
        let Some(path) = ranks.path_of_first(unfinished.as_ref().map(TempDir::path))? else { return Ok(()) };
        let path = path.as_path();
        let (tensors, shard) = if ranks.is_single() { (self.tensors.clone(), None) } else { split(&self.tensors) };
        let own = shard.map(|shard| write_part(path, &format!("{SHARD}{:05}", ranks.rank()), &shard));
        let own = ranks.all_ok(own.transpose())?;
        let digests = ranks.gather(own.map(|(_, digest)| digest.into_bytes()).unwrap_or_default())?;
        let finished = ranks.first_does(|| {
            let mut files = BTreeMap::new();
            for (name, tensors) in &tensors {
                files.extend([write_part(path, name, tensors)?]);
            }
            if !ranks.is_single() {
                let named = digests.iter().enumerate();
                let named = named.map(|(rank, digest)| {
                    (format!("{SHARD}{rank:05}.{EXTENSION}"), String::from_utf8_lossy(digest).into_owned())
                });
                files.extend(named);
            }
            self.finish(path, &target, ranks, files)
        });
        finished?;
        if let Some(unfinished) = unfinished {
            // The rename has moved the temporary folder, so there is nothing to remove.
            let _ = unfinished.keep();
        }
        Ok(())
    }

    /// Writes what makes a folder with the other files a checkpoint, and gives it its name.
    fn finish(&self, folder: &Path, target: &Path, ranks: &Ranks, files: BTreeMap<String, String>) -> Result<()> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let (position, settings, inputs) = (self.position.clone(), self.settings.clone(), self.inputs.clone());
        let (format, ranks) = match ranks.size() {
            1 => (FORMAT, None),
            num => (SHARDED_FORMAT, Some(num)),
        };
        let state = StateFile { format, version, position, settings, inputs, ranks, files };
        let json = serde_json::to_vec_pretty(&state).map_err(|e| Error::Config(e.to_string()))?;
        write_atomic(&folder.join(STATE_FILE), &json)?;
        sync_folder(folder)?;
        std::fs::rename(folder, target).map_err(Error::io(target))?;
        sync_folder(target.parent().unwrap_or(target))
    }

    /// Returns the newest intact checkpoint in `folder`, if there is one, and, on the first rank, a message for each
    /// newer, corrupt one. Any number of ranks can go on from it: each gets the class centres of its classes.
    ///
    /// # Errors
    /// When a killed process's temporary folder cannot be removed, or a rank cannot read what the first one can.
    pub fn newest(folder: &Path, ranks: &Ranks) -> Result<(Option<Self>, Vec<String>)> {
        let mut problems = Vec::new();
        let found = ranks.first_does(|| -> Result<_> {
            remove_unfinished(folder)?;
            for (_, path) in steps(folder).into_iter().rev() {
                match Self::read(&path) {
                    Ok(state) => return Ok(Some((path, state))),
                    Err(error) => problems.push(format!("{error}; this training checkpoint is not used")),
                }
            }
            Ok(None)
        })?;
        let (path, state) = found.flatten().unzip();
        let Some(path) = ranks.path_of_first(path.as_deref())? else { return Ok((None, problems)) };
        let state = ranks.all_ok(state.map_or_else(|| Self::read(&path), Ok))?;
        let tensors = if ranks.is_single() { state.tensors } else { own_classes(state.tensors, ranks)? };
        Ok((Some(Self { tensors, ..state }), problems))
    }

    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(STATE_FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let wrong = |what: String| Error::Format { path: path.clone(), offset: 0, what };
        let state: StateFile =
            serde_json::from_str(&text).map_err(|e| wrong(format!("not a training checkpoint: {e}")))?;
        if ![FORMAT, SHARDED_FORMAT].contains(&state.format) {
            let what =
                format!("expected format {FORMAT} or {SHARDED_FORMAT}, found {}, of another version", state.format);
            return Err(wrong(what));
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
        let (mut tensors, mut shards) = (State::new(), Vec::new());
        // In the order of their names, so shards are in the order of the ranks.
        for file in state.files.keys() {
            match file.strip_suffix(EXTENSION).and_then(|name| name.strip_suffix('.')) {
                Some(name) if name.starts_with(SHARD) => shards.push(part(file)?),
                Some(name) if !name.contains(['/', '\\']) => drop(tensors.insert(name.to_owned(), part(file)?)),
                _ => return Err(wrong(format!("expected names of {EXTENSION} files in its folder, found {file}"))),
            }
        }
        let num = state.ranks.unwrap_or(0);
        if shards.len() != num {
            return Err(wrong(format!("expected the class centres of {num} ranks, found {}", shards.len())));
        }
        if num > 0 {
            join(&mut tensors, &shards)
                .map_err(|e| wrong(format!("the class centres of its ranks do not fit: {e}")))?;
        }
        let StateFile { position, settings, inputs, .. } = state;
        Ok(Self { position, settings, inputs, tensors })
    }
}

/// Writes a file of a checkpoint; returns its name and its SHA-256.
fn write_part(folder: &Path, name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<(String, String)> {
    let name = format!("{name}.{EXTENSION}");
    let path = folder.join(&name);
    write_safetensors(&path, tensors, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    let digest = sha256(&path)?;
    Ok((name, digest))
}

/// Whether a tensor of a file of a state has a column for each class.
fn is_of_classes(file: &str, name: &str, tensor: &Tensor) -> bool {
    tensor.rank() == 2 && (file == HEADER || file == OPTIMIZER && name.starts_with(HEAD_MOMENTS))
}

/// Splits a state into what all ranks have and what is of this rank's classes, by file and name with a slash between.
fn split(state: &State) -> (State, Option<BTreeMap<String, Tensor>>) {
    let (mut common, mut own) = (State::new(), BTreeMap::new());
    for (file, tensors) in state {
        let (of_classes, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            tensors.clone().into_iter().partition(|(name, tensor)| is_of_classes(file, name, tensor));
        own.extend(of_classes.into_iter().map(|(name, tensor)| (format!("{file}/{name}"), tensor)));
        common.insert(file.clone(), others);
    }
    // A file without tensors cannot be written.
    common.retain(|_, tensors| !tensors.is_empty());
    (common, Some(own))
}

/// Inverse of [`split`] for the shards of all ranks, in their order.
fn join(state: &mut State, shards: &[BTreeMap<String, Tensor>]) -> std::result::Result<(), String> {
    for key in shards[0].keys() {
        let of_rank = |shard: &BTreeMap<String, Tensor>| shard.get(key).cloned().ok_or_else(|| format!("no {key}"));
        let parts = shards.iter().map(of_rank).collect::<std::result::Result<Vec<_>, _>>()?;
        let (file, name) = key.split_once('/').ok_or_else(|| format!("{key} names no file"))?;
        let whole = Tensor::cat(&parts, 1).map_err(|e| e.to_string())?;
        state.entry(file.to_owned()).or_default().insert(name.to_owned(), whole);
    }
    Ok(())
}

/// Reduces a state with the class centres of all ranks to those of this rank.
fn own_classes(state: State, ranks: &Ranks) -> Result<State> {
    let own = |file: &str, (name, tensor): (String, Tensor)| -> Result<(String, Tensor)> {
        if !is_of_classes(file, &name, &tensor) {
            return Ok((name, tensor));
        }
        let classes = ClassShard::new(ranks, tensor.dim(1)?)?.classes;
        Ok((name, tensor.narrow(1, classes.start, classes.len())?.copy()?))
    };
    let of_file = |(file, tensors): (String, BTreeMap<String, Tensor>)| {
        let tensors = tensors.into_iter().map(|tensor| own(&file, tensor)).collect::<Result<_>>()?;
        Ok((file, tensors))
    };
    state.into_iter().map(of_file).collect()
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
    use candle_core::Device;

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
        let (state, problems) = TrainState::newest(folder, &Ranks::default()).unwrap();
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
            state(step).save(&folder, 2, &Ranks::default()).unwrap();
        }
        assert_eq!(steps(&folder).into_keys().collect::<Vec<_>>(), [10, 200]);
        let (found, _) = TrainState::newest(&folder, &Ranks::default()).unwrap();
        let found = found.unwrap();
        assert_eq!(found.position, state(200).position);
        assert_eq!(found.tensors["ema"]["w"].to_vec2::<f32>().unwrap(), [[4.0; 3]; 2]);
        assert_eq!(found.tensors["backbone"]["w"].to_vec2::<f32>().unwrap(), [[200.0; 3]; 2]);
        // Saving the same step again changes nothing.
        state(200).save(&folder, 2, &Ranks::default()).unwrap();
        assert_eq!(newest(&folder), (Some(200), 0));
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_whose_name_is_no_text_has_checkpoints_too() {
        use std::os::unix::ffi::OsStrExt;

        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(std::ffi::OsStr::from_bytes(b"run\xff"));
        state(3).save(&folder, 2, &Ranks::default()).unwrap();
        assert_eq!(newest(&folder), (Some(3), 0));
    }

    #[test]
    fn a_state_that_is_not_whole_gives_way_to_the_one_before() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        state(1).save(folder, 3, &Ranks::default()).unwrap();
        state(2).save(folder, 3, &Ranks::default()).unwrap();
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
        let error = state(1).save(&folder, 2, &Ranks::default()).unwrap_err().to_string();
        assert!(error.contains("cannot save the checkpoint of step 1 (newest checkpoint: none)"), "{error}");
        std::fs::remove_file(&folder).unwrap();
        state(1).save(&folder, 2, &Ranks::default()).unwrap();
        assert_eq!(newest(&folder), (Some(1), 0));
    }
}
