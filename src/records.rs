//! Records of an arm in training: figures of its steps and evaluations between epochs, as JSON lines and for
//! TensorBoard.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::eval::{Evaluation, Setting};
use crate::files::write_atomic;
use crate::tensorboard::EventFile;

/// File and folder names in an arm's folder.
const STEPS_FILE: &str = "steps.jsonl";
const EVALUATIONS_FILE: &str = "evaluations.jsonl";
const TENSORBOARD_FOLDER: &str = "tensorboard";

/// Figures of one training step. In a file, those that are not finite are `null`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepReport {
    /// The total loss: `margin_loss + lambda * distill_loss + rank_loss + agreement_loss`.
    #[serde(with = "finite")]
    pub loss: f64,
    /// The margin loss (cross-entropy with margin), multiplied by its weight; 0 if the weight is 0.
    #[serde(with = "finite")]
    pub margin_loss: f64,
    /// The distillation loss before multiplication by `lambda`; 0 without a teacher.
    #[serde(with = "finite")]
    pub distill_loss: f64,
    /// The rank loss, multiplied by its weight; 0 if the weight is 0.
    #[serde(with = "finite", default)]
    pub rank_loss: f64,
    /// The distance between the two views of a pair, multiplied by its weight; 0 if the weight is 0.
    #[serde(with = "finite", default)]
    pub agreement_loss: f64,
    /// Norm of the backbone's gradient before clipping.
    #[serde(with = "finite")]
    pub grad_norm: f64,
    /// Learning rate.
    #[serde(with = "finite")]
    pub lr: f64,
    /// Mean cosine of all pairs of embeddings in the batch; near 1 the embeddings have collapsed.
    pub mean_cosine: Option<f64>,
    /// Mean cosine between embeddings and their class centres; none without the margin loss.
    pub target_cosine: Option<f64>,
    /// Cosine between the embedding of each of the student's views and its class centre; NaN without a label. Not
    /// recorded.
    #[serde(skip)]
    pub target_cosines: Vec<f64>,
    /// Class of each of `target_cosines`; -1 without a label. Not recorded.
    #[serde(skip)]
    pub labels: Vec<i64>,
    /// Whether the step was skipped because its loss or gradient was not finite: no parameter, moment or running
    /// statistic has changed. Always false on a GPU, where such a step is an error. Recorded as
    /// [`StepRecord::skipped_images`].
    #[serde(skip)]
    pub is_skipped: bool,
}

impl StepReport {
    /// Computes what follows from the losses and target cosines of a batch of `n` images, and from the sum of the
    /// directions of their embeddings; `lambda` is the weight of the distillation loss.
    pub(crate) fn conclude(&mut self, directions: &[f64], n: usize, lambda: f64) {
        self.loss = self.margin_loss + lambda * self.distill_loss + self.rank_loss + self.agreement_loss;
        let (n, squares) = (n as f64, directions.iter().map(|v| v * v).sum::<f64>());
        self.mean_cosine = (n > 1.0).then(|| (squares - n) / (n * (n - 1.0)));
        let known: Vec<f64> = self.target_cosines.iter().copied().filter(|cosine| !cosine.is_nan()).collect();
        self.target_cosine = (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64);
    }
}

/// Speed of the training at a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Speed {
    /// Seconds of training so far, without evaluations.
    pub seconds: f64,
    /// Images per second since the training of the arm started or resumed.
    #[serde(with = "finite")]
    pub images_per_s: f64,
    /// Share of that time spent waiting for data.
    #[serde(with = "finite")]
    pub wait_share: f64,
    /// Share of that time spent waiting for other ranks.
    #[serde(with = "finite", default)]
    pub ranks_wait_share: f64,
}

/// A training step, one line of `steps.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepRecord {
    /// Step number, from 1.
    pub step: usize,
    /// Epoch, from 0.
    pub epoch: usize,
    /// Speed so far.
    #[serde(flatten)]
    pub speed: Speed,
    /// The step's figures.
    #[serde(flatten)]
    pub report: StepReport,
    /// Image indices of a skipped step; empty for other steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_images: Vec<u32>,
}

/// Numbers that may not be finite, as `null`.
mod finite {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        Some(*value).filter(|value| value.is_finite()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

/// An evaluation between two epochs, one line of `evaluations.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EvaluationRecord {
    /// Training steps before the evaluation.
    pub step: usize,
    /// Epochs before the evaluation, counted from the start of the schedule.
    pub epoch: usize,
    /// The figures.
    #[serde(flatten)]
    pub evaluation: Evaluation,
}

impl EvaluationRecord {
    /// Returns the record of an evaluation after `step` steps and before epoch `epoch`.
    pub fn new(step: usize, epoch: usize, evaluation: Evaluation) -> Self {
        Self { step, epoch, evaluation }
    }
}

/// Writes the records of an arm in training.
pub(crate) struct Records {
    folder: PathBuf,
    steps: BufWriter<File>,
    tensorboard: EventFile,
}

impl Records {
    /// Whether an arm's folder has records of steps.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(STEPS_FILE).metadata().is_ok_and(|data| data.len() > 0)
    }

    /// Opens the records in an arm's folder to continue them after `step`. Removes records of later steps, since those
    /// steps will be repeated.
    pub fn open(folder: &Path, step: usize) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let tensorboard = folder.join(TENSORBOARD_FOLDER);
        if step == 0 && tensorboard.exists() {
            // Left by an earlier training in the same folder.
            std::fs::remove_dir_all(&tensorboard).map_err(Error::io(&tensorboard))?;
        }
        keep_lines(&folder.join(STEPS_FILE), |of| of <= step)?;
        // An evaluation follows the checkpoint of its step, so it will be repeated.
        keep_lines(&folder.join(EVALUATIONS_FILE), |of| of < step)?;
        let path = folder.join(STEPS_FILE);
        let steps = OpenOptions::new().append(true).create(true).open(&path).map_err(Error::io(&path))?;
        std::fs::create_dir_all(&tensorboard).map_err(Error::io(&tensorboard))?;
        let first = (step > 0).then_some(step as u64 + 1);
        let tensorboard = EventFile::create(&tensorboard, wall_time(), first)?;
        Ok(Self { folder: folder.to_owned(), steps: BufWriter::new(steps), tensorboard })
    }

    pub fn step(&mut self, record: &StepRecord) -> Result<()> {
        let path = self.folder.join(STEPS_FILE);
        let line = serde_json::to_string(record).map_err(|e| Error::Config(e.to_string()))?;
        writeln!(self.steps, "{line}").map_err(Error::io(&path))?;
        let StepRecord { report, speed, .. } = record;
        let mut scalars = vec![
            ("train/loss", report.loss),
            ("train/margin_loss", report.margin_loss),
            ("train/distill_loss", report.distill_loss),
            ("train/grad_norm", report.grad_norm),
            ("train/lr", report.lr),
            ("train/images_per_s", speed.images_per_s),
            ("train/wait_share", speed.wait_share),
            ("train/ranks_wait_share", speed.ranks_wait_share),
        ];
        for (name, cosine) in [("train/mean_cosine", report.mean_cosine), ("train/target_cosine", report.target_cosine)]
        {
            scalars.extend(cosine.filter(|cosine| cosine.is_finite()).map(|cosine| (name, cosine)));
        }
        let finite = |value: f64| if value.is_finite() { value as f32 } else { f32::NAN };
        let scalars: Vec<(&str, f32)> = scalars.into_iter().map(|(name, value)| (name, finite(value))).collect();
        self.tensorboard.scalars(record.step as u64, wall_time(), &scalars)
    }

    pub fn evaluation(&mut self, record: &EvaluationRecord) -> Result<()> {
        let path = self.folder.join(EVALUATIONS_FILE);
        let mut file = OpenOptions::new().append(true).create(true).open(&path).map_err(Error::io(&path))?;
        let line = serde_json::to_string(record).map_err(|e| Error::Config(e.to_string()))?;
        writeln!(file, "{line}").map_err(Error::io(&path))?;
        let settings = Setting::ALL.into_iter().filter_map(|setting| {
            Some((format!("eer/{}", setting.name()), record.evaluation.settings.get(&setting)?.metrics.eer as f32))
        });
        let tags: Vec<(String, f32)> = settings.collect();
        let scalars: Vec<(&str, f32)> = tags.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        self.tensorboard.scalars(record.step as u64, wall_time(), &scalars)
    }

    /// Writes everything to disk, so that the records reach at least as far as the training checkpoint saved next.
    pub fn flush(&mut self) -> Result<()> {
        let written = self.steps.flush().and_then(|()| self.steps.get_ref().sync_data());
        written.map_err(Error::io(&self.folder.join(STEPS_FILE)))?;
        self.tensorboard.flush()
    }
}

/// Reads the recorded steps of an arm from its folder; empty if there is no record.
///
/// # Errors
/// When the file cannot be read or a line is not a record.
pub fn read_steps(arm_folder: &Path) -> Result<Vec<StepRecord>> {
    read(&arm_folder.join(STEPS_FILE))
}

/// Reads an arm's evaluations between epochs from its folder; empty if there were none.
///
/// # Errors
/// When the file cannot be read or a line is not a record.
pub fn read_evaluations(arm_folder: &Path) -> Result<Vec<EvaluationRecord>> {
    read(&arm_folder.join(EVALUATIONS_FILE))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let mut offset = 0;
    each_line(path, |line| {
        if line.ends_with('\n') {
            let record = serde_json::from_str(line);
            let what = |e: serde_json::Error| format!("not a training record: {e}");
            found.push(record.map_err(|e| Error::Format { path: path.to_owned(), offset, what: what(e) })?);
        }
        // A last line without a newline is still being written.
        offset += line.len() as u64;
        Ok(())
    })?;
    Ok(found)
}

/// Removes the lines for which `is_kept(step)` is false, and incomplete lines.
fn keep_lines(path: &Path, is_kept: impl Fn(usize) -> bool) -> Result<()> {
    #[derive(Deserialize)]
    struct Step {
        step: usize,
    }
    if !path.exists() {
        return Ok(());
    }
    let (mut kept, mut has_others) = (String::new(), false);
    each_line(path, |line| {
        match serde_json::from_str::<Step>(line) {
            Ok(record) if is_kept(record.step) && line.ends_with('\n') => kept.push_str(line),
            _ => has_others = true,
        }
        Ok(())
    })?;
    if has_others { write_atomic(path, kept.as_bytes()) } else { Ok(()) }
}

fn each_line(path: &Path, mut f: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let mut line = Vec::new();
    while file.read_until(b'\n', &mut line).map_err(Error::io(path))? > 0 {
        f(&String::from_utf8_lossy(&line))?;
        line.clear();
    }
    Ok(())
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: usize, loss: f64) -> StepRecord {
        StepRecord {
            step,
            epoch: 0,
            speed: Speed { seconds: 0.5, images_per_s: 10.0, ..Speed::default() },
            report: StepReport { loss, lr: 0.1, ..StepReport::default() },
            skipped_images: if loss.is_finite() { Vec::new() } else { vec![3, 4] },
        }
    }

    #[test]
    fn records_go_on_after_a_step_and_lines_that_are_not_whole_go() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Records::open(folder.path(), 0)?;
        (1..=5).try_for_each(|step| records.step(&record(step, if step == 3 { f64::NAN } else { 0.1 + 0.2 })))?;
        records.flush()?;
        drop(records);
        let path = folder.path().join(STEPS_FILE);
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":2,").unwrap();
        assert_eq!(read_steps(folder.path())?.len(), 5, "the line that is being written is left out");
        let mut records = Records::open(folder.path(), 3)?;
        records.step(&record(4, 7.0))?;
        drop(records);
        let found = read_steps(folder.path())?;
        assert_eq!(found.len(), 4);
        for (i, (step, loss)) in [(1, 0.1 + 0.2), (2, 0.1 + 0.2), (4, 7.0)].into_iter().enumerate() {
            assert_eq!(found[if i == 2 { 3 } else { i }], record(step, loss));
        }
        // What is not finite is null.
        assert!(found[2].report.loss.is_nan() && found[2].skipped_images == [3, 4]);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().nth(2).is_some_and(|line| line.contains("\"loss\":null")), "{text}");
        // A new training removes all records.
        drop(Records::open(folder.path(), 0)?);
        assert_eq!(read_steps(folder.path())?, []);
        Ok(())
    }

    #[test]
    fn a_record_of_something_else_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(STEPS_FILE), "{\"step\":1}\n").unwrap();
        let error = read_steps(folder.path()).unwrap_err().to_string();
        assert!(error.contains("steps.jsonl") && error.contains("not a training record"), "{error}");
    }
}
