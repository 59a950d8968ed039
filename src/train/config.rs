//! All settings of an experiment, its presets, and overrides of single settings.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::step::StepConfig;
use super::watch::WatchConfig;
use crate::data::mask::{MaskConfig, MaskProtocol};
use crate::data::{AugmentConfig, DataConfig, LoaderConfig};
use crate::error::{Error, Result};
use crate::eval::EvalConfig;
use crate::losses::{DistillConfig, DistillKind, MarginConfig, PlusMatching};
use crate::models::ModelConfig;
use crate::optim::{OptimConfig, ScheduleConfig};

/// An experiment; the default is the published recipe on MS1MV2 (METHOD: Huber et al., FG 2021, section IV).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Length of the training, where students start, the seed.
    pub train: TrainConfig,
    /// Evaluations in between, and early stopping.
    pub watch: WatchConfig,
    /// Weight and kind of distillation.
    pub distill: DistillArms,
    /// The margin loss.
    pub loss: MarginConfig,
    /// The backbone.
    pub model: ModelConfig,
    /// The optimiser.
    pub optim: OptimConfig,
    /// The learning rate over time.
    pub schedule: ScheduleConfig,
    /// Flips and share of masks.
    pub augment: AugmentConfig,
    /// Batches.
    pub loader: LoaderConfig,
    /// Where faces come from.
    pub data: DataConfig,
    /// Masks in training.
    pub mask: MaskConfig,
    /// Masks and seed of the evaluation.
    pub eval: EvalConfig,
}

/// Length and start of the training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Which networks to train, in this order.
    pub arms: Vec<Arm>,
    /// Epochs of the students, and of the teacher if `teacher_epochs` is absent.
    pub epochs: usize,
    /// Epochs of the teacher.
    pub teacher_epochs: Option<usize>,
    /// Decides initial weights, batches, masks and margins.
    pub seed: u64,
    /// Where `aug` and `lg` start.
    pub start: Start,
    /// Where `hg` starts.
    pub hg_start: Start,
    /// First epoch of `hg`, from 0: the published one continues an LG student, and its schedule, at epoch 20. If it
    /// starts from `lg`, from what that was at the start of this epoch.
    pub hg_first_epoch: usize,
    /// How batch norm normalises in training.
    pub batch_norm: BatchNormMode,
    /// Where class centres start that no checkpoint brings along.
    pub head_start: HeadStart,
    /// Share of the weights that an arm starts from in those it ends with, below 1. Averaging the two keeps more of
    /// what the start knew of faces unlike the training's (WiSE-FT, Wortsman et al., CVPR 2022, eq. 1 with
    /// `alpha = 1 - start_share`).
    pub start_share: f64,
    /// Whether class centres that come with the weights to start from are used where the identities are as many; else they start anew.
    pub keep_head: bool,
    /// Layers and stages that stay as the weights that an arm starts from have them, running statistics and all, by the prefix of their
    /// names: `["conv1", "bn1", "prelu", "layer1"]` is an IResNet's beginning.
    pub freeze: Vec<String>,
    /// Parts of equal size in which a batch goes through the network, for less memory: their gradients are added up before the step. Each
    /// part has batch statistics of its own.
    pub accumulate: usize,
    /// Whether most activations are computed again in the backward pass instead of kept: less memory, more time, the same bits.
    pub recompute: bool,
    /// Decay of the exponential moving average of the weights that an arm ends with and is evaluated by, such as 0.999; 0 for none.
    pub ema: f64,
    /// Steps between states that are saved for going on after a stop, beside those at the ends of epochs; 0 for those alone.
    pub save_every: usize,
    /// States that are kept, the newest.
    pub keep_states: usize,
    /// Steps in a row whose loss or gradient is not finite, each of which is left out, before the training stops; on a GPU it stops at the
    /// first.
    pub max_skipped: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            arms: Arm::ALL.to_vec(),
            epochs: 26,
            teacher_epochs: None,
            seed: 0,
            start: Start::Scratch,
            hg_start: Start::Lg,
            hg_first_epoch: 20,
            batch_norm: BatchNormMode::default(),
            head_start: HeadStart::default(),
            start_share: 0.0,
            keep_head: true,
            freeze: Vec::new(),
            accumulate: 1,
            recompute: false,
            ema: 0.0,
            save_every: 0,
            keep_states: 2,
            max_skipped: 10,
        }
    }
}

/// The weights a student starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Random ones.
    #[default]
    Scratch,
    /// The teacher's backbone and head.
    Teacher,
    /// The LG student's backbone and head.
    Lg,
}

/// What batch norm normalises by in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchNormMode {
    /// The statistics of the batch, which enter the running ones.
    #[default]
    Batch,
    /// The running statistics of the weights that the arm starts from, which stay as they are. Needed where they were
    /// folded into the convolutions, and good for small batches.
    Frozen,
}

/// The class centres that training starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadStart {
    /// `N(0, 0.01)`, as published.
    #[default]
    Random,
    /// The mean embedding of each identity's training images under the weights that the arm starts from.
    MeanEmbedding,
}

/// Distillation in the two arms that have it; the defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistillArms {
    /// Which distance.
    pub kind: DistillKind,
    /// Its weight in MaskInv-LG.
    pub lambda_lg: f64,
    /// Its weight in MaskInv-HG.
    pub lambda_hg: f64,
    /// Weight of the margin loss beside it in both; 0 leaves distillation alone.
    pub margin_weight: f64,
}

impl Default for DistillArms {
    fn default() -> Self {
        Self { kind: DistillKind::Mse, lambda_lg: 100.0, lambda_hg: 3000.0, margin_weight: 1.0 }
    }
}

impl DistillArms {
    /// Returns what `arm` distils with; a weight of 0 for those without a teacher.
    pub fn of(&self, arm: Arm) -> DistillConfig {
        let (lambda, margin_weight) = match arm {
            Arm::Teacher | Arm::Aug => (0.0, 1.0),
            Arm::Lg => (self.lambda_lg, self.margin_weight),
            Arm::Hg => (self.lambda_hg, self.margin_weight),
        };
        DistillConfig { kind: self.kind, lambda, margin_weight }
    }
}

impl Config {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// When it cannot be read; when a key is unknown or a value of the wrong type, with its line; when a value is out
    /// of range.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Self::parse(&text).map_err(|what| Error::Config(format!("{}: {what}", path.display())))
    }

    /// Reads the text of a TOML file.
    ///
    /// # Errors
    /// When a key is unknown or a value of the wrong type, with its line.
    pub(super) fn parse(text: &str) -> std::result::Result<Self, String> {
        toml::from_str(text).map_err(|e| describe(&e, text))
    }

    /// Sets the value at a dotted path, such as `optim.lr=0.05` or `mask.kinds=["cloth"]`; a bare word is a string, and
    /// `none` brings back the default.
    ///
    /// # Errors
    /// When there is no `=`, no such setting, or the value is of the wrong type.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let wrong = |what: String| Error::Config(format!("--set {assignment}: {what}"));
        let (path, value) = assignment.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE".into()))?;
        let (path, value) = (path.trim(), value.trim());
        let parsed = format!("x = {value}").parse::<toml::Table>().ok().filter(|t| t.len() == 1);
        let parsed = parsed.and_then(|mut t| t.remove("x")).unwrap_or_else(|| toml::Value::String(value.to_owned()));
        let mut all = toml::Value::try_from(&*self).map_err(|e| wrong(e.to_string()))?;
        let mut place = &mut all;
        let keys: Vec<&str> = path.split('.').collect();
        for key in &keys[..keys.len() - 1] {
            place = place.get_mut(key).ok_or_else(|| wrong(format!("no section {key}")))?;
        }
        let table = place.as_table_mut().ok_or_else(|| wrong("not a section".into()))?;
        match value {
            "none" => table.remove(keys[keys.len() - 1]),
            _ => table.insert(keys[keys.len() - 1].to_owned(), parsed),
        };
        *self = all.try_into().map_err(|e: toml::de::Error| wrong(e.message().to_owned()))?;
        Ok(())
    }

    /// Switches to the published code's behaviour: its masks, from this RGBA template, drawn into the crops of teacher
    /// and student alike, independent flips, its evaluation of U-M, its matching of margins in the "+" losses.
    pub fn use_reference_protocol(&mut self, template: &Path) {
        for mask in [&mut self.mask, &mut self.eval.mask] {
            mask.protocol = MaskProtocol::Reference;
            mask.template = Some(template.to_owned());
        }
        self.loss.plus_matching = PlusMatching::Reference;
    }

    /// Returns the config as TOML; only settings that are absent, and so have their published value, are left out.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::Config(e.to_string()))
    }

    /// Returns every setting by its dotted path, as TOML writes its value.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn entries(&self) -> Result<BTreeMap<String, String>> {
        let all = toml::Value::try_from(self).map_err(|e| Error::Config(e.to_string()))?;
        let (mut entries, mut left) = (BTreeMap::new(), vec![(String::new(), &all)]);
        while let Some((path, value)) = left.pop() {
            match value {
                toml::Value::Table(table) => {
                    let dot = if path.is_empty() { "" } else { "." };
                    left.extend(table.iter().map(|(key, value)| (format!("{path}{dot}{key}"), value)));
                }
                value => {
                    entries.insert(path, value.to_string());
                }
            }
        }
        Ok(entries)
    }

    /// Returns the [`Self::entries`] that `other` lacks or has otherwise.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn entries_unlike(&self, other: &Self) -> Result<BTreeMap<String, String>> {
        let others = other.entries()?;
        Ok(self.entries()?.into_iter().filter(|(key, value)| others.get(key) != Some(value)).collect())
    }

    /// Checks the ranges of all components.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        for epochs in [Some(self.train.epochs), self.train.teacher_epochs].into_iter().flatten() {
            if !(1..=100_000).contains(&epochs) {
                let what = format!("train.epochs, train.teacher_epochs: expected 1 to 100000, found {epochs}");
                return Err(Error::Config(what));
            }
        }
        if self.train.arms.is_empty() {
            return Err(Error::Config("train.arms: expected at least one".into()));
        }
        let TrainConfig { epochs, hg_first_epoch, .. } = self.train;
        if self.train.arms.contains(&Arm::Hg) && hg_first_epoch >= epochs {
            let what = format!("train.hg_first_epoch: expected less than the {epochs} epochs, found {hg_first_epoch}");
            return Err(Error::Config(what));
        }
        if !(0.0..1.0).contains(&self.train.start_share) {
            let what = format!("train.start_share: expected 0 to below 1, found {}", self.train.start_share);
            return Err(Error::Config(what));
        }
        let TrainConfig { accumulate, ema, .. } = self.train;
        let batch = self.loader.batch_size;
        // Batch norm has no statistics of a single image.
        if accumulate == 0 || !batch.is_multiple_of(accumulate) || batch / accumulate < 2 {
            let what = format!(
                "train.accumulate: expected parts of two or more of the batch's {batch} images, found {accumulate}"
            );
            return Err(Error::Config(what));
        }
        if !(0.0..1.0).contains(&ema) {
            return Err(Error::Config(format!("train.ema: expected 0 to below 1, found {ema}")));
        }
        if !(1..=1000).contains(&self.train.keep_states) {
            let what = format!("train.keep_states: expected 1 to 1000, found {}", self.train.keep_states);
            return Err(Error::Config(what));
        }
        if self.train.start == Start::Lg {
            return Err(Error::Config("train.start: lg cannot start from itself; only hg_start may be lg".into()));
        }
        self.watch.validate()?;
        self.distill.of(Arm::Lg).validate()?;
        self.distill.of(Arm::Hg).validate()?;
        self.loss.validate()?;
        self.model.validate()?;
        self.optim.validate()?;
        self.schedule.validate()?;
        self.augment.validate()?;
        self.loader.validate()?;
        self.data.validate()?;
        self.mask.validate()?;
        self.eval.validate()
    }

    /// How the steps of `arm` are taken.
    pub fn step(&self, arm: Arm) -> StepConfig {
        let TrainConfig { accumulate, recompute, ema, seed, .. } = self.train;
        StepConfig { distill: self.distill.of(arm), optim: self.optim.clone(), accumulate, recompute, ema, seed }
    }

    /// The learning rate before the schedule, for the batch size that there is.
    pub fn base_lr(&self) -> f64 {
        self.optim.lr * self.loader.batch_size as f64 / self.optim.lr_batch as f64
    }

    /// Epochs that `arm` is trained in; the schedule counts from 0 all the same.
    pub fn epochs(&self, arm: Arm) -> std::ops::Range<usize> {
        match arm {
            Arm::Teacher => 0..self.train.teacher_epochs.unwrap_or(self.train.epochs),
            Arm::Aug | Arm::Lg => 0..self.train.epochs,
            Arm::Hg => self.train.hg_first_epoch..self.train.epochs,
        }
    }
}

/// The message of a TOML error with the line it points at, on one line.
fn describe(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().replace('\n', " ");
    match error.span() {
        Some(span) => format!("line {}: {message}", text[..span.start.min(text.len())].matches('\n').count() + 1),
        None => message,
    }
}

/// Presets by name: what each is for is the first line of its file.
const PRESETS: [(&str, &str); 6] = [
    ("procedural", include_str!("presets/procedural.toml")),
    ("lfw-small", include_str!("presets/lfw-small.toml")),
    ("lfw-w600k", include_str!("presets/lfw-w600k.toml")),
    ("casia-r50", include_str!("presets/casia-r50.toml")),
    ("ms1mv2-r100-lg", include_str!("presets/ms1mv2-r100-lg.toml")),
    ("ms1mv2-r100-hg", include_str!("presets/ms1mv2-r100-hg.toml")),
];

/// Returns the names of the presets and what each is for.
pub fn preset_names() -> impl Iterator<Item = (&'static str, &'static str)> {
    PRESETS.iter().map(|(name, text)| (*name, text.lines().next().unwrap_or_default().trim_start_matches("# ")))
}

/// Returns the preset `name`.
///
/// # Errors
/// When there is none: lists those there are.
pub fn preset(name: &str) -> Result<Config> {
    match PRESETS.iter().find(|(n, _)| *n == name) {
        Some((_, text)) => Config::parse(text).map_err(|e| Error::Config(format!("preset {name}: {e}"))),
        None => {
            let known: Vec<&str> = preset_names().map(|(n, _)| n).collect();
            Err(Error::Config(format!("no preset {name}; there are {}", known.join(", "))))
        }
    }
}
