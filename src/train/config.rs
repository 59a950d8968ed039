//! The settings of an experiment and what follows from them.

mod text;

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::step_config::StepConfig;
use super::watch::WatchConfig;
use crate::data::mask::{MaskConfig, MaskProtocol};
use crate::data::{AugmentConfig, DataConfig, LoaderConfig};
use crate::dist::RanksConfig;
use crate::error::{Error, Result};
use crate::eval::EvalConfig;
use crate::losses::{CentreKind, DistillConfig, DistillKind, MarginConfig, PlusMatching};
use crate::models::ModelConfig;
use crate::optim::{OptimConfig, ScheduleConfig};

/// File name of the resolved settings in the results folder.
pub const CONFIG_FILE: &str = "config.toml";

/// Settings of an experiment.
///
/// ```
/// use maskinv::train::preset;
///
/// # fn main() -> maskinv::Result<()> {
/// let mut config = preset("procedural")?;
/// config.set("optim.lr=0.05")?;
/// config.validate()?;
/// assert_eq!(config.optim.lr, 0.05);
/// # Ok(())
/// # }
/// ```
///
/// The default is the published recipe on MS1MV2 (Huber et al., FG 2021, section IV).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Arms, epochs, initial weights, training checkpoints and the seed.
    pub train: TrainConfig,
    /// Evaluations between epochs, and early stopping.
    pub watch: WatchConfig,
    /// Kind and weights of the distillation loss.
    pub distill: DistillArms,
    /// The margin loss.
    pub loss: MarginConfig,
    /// The backbone.
    pub model: ModelConfig,
    /// The optimiser.
    pub optim: OptimConfig,
    /// The learning rate schedule.
    pub schedule: ScheduleConfig,
    /// Augmentation: flips, share of masked faces, image conditions.
    pub augment: AugmentConfig,
    /// Batch size and loader threads.
    pub loader: LoaderConfig,
    /// The training and test data.
    pub data: DataConfig,
    /// Masks in training.
    pub mask: MaskConfig,
    /// Masks and seed of the evaluation.
    pub eval: EvalConfig,
    /// Several ranks: what they exchange and how long they wait.
    pub ranks: RanksConfig,
}

/// Arms, epochs, initial weights, training checkpoints and the seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// The arms to train, in this order.
    pub arms: Vec<Arm>,
    /// The teacher where its arm is not trained: a path, `hf://owner/repo/file` or a short name. The command line opens
    /// it; from the library, pass it to [`Experiment::with_teacher`](super::Experiment::with_teacher).
    pub teacher: Option<String>,
    /// The weights that every trained arm starts from, named and opened like the teacher; see
    /// [`Experiment::with_start`](super::Experiment::with_start).
    pub start_weights: Option<String>,
    /// Epochs of the students, and of the teacher if `teacher_epochs` is absent.
    pub epochs: usize,
    /// Epochs of the teacher.
    pub teacher_epochs: Option<usize>,
    /// Seed of the initial weights, batches, masks and margins.
    pub seed: u64,
    /// The arms whose weights `soup` averages.
    pub soup: Vec<Arm>,
    /// Initial weights of `aug` and `lg`.
    pub start: Start,
    /// Initial weights of `hg`.
    pub hg_start: Start,
    /// First epoch of `hg`, from 0. The published recipe continues an LG student, and its schedule, at epoch 20. With
    /// `hg_start = "lg"`, `hg` starts from the LG student's weights at the start of this epoch.
    pub hg_first_epoch: usize,
    /// Statistics that batch norm normalises by in training.
    pub batch_norm: BatchNormMode,
    /// Initial class centres where none come with the weights to start from.
    pub head_start: HeadStart,
    /// Share of an arm's starting weights in its final weights, at least 0 and below 1. Averaging the two keeps more of
    /// what the starting weights know about faces unlike the training set's (WiSE-FT, Wortsman et al., CVPR 2022, eq. 1
    /// with `alpha = 1 - start_share`).
    pub start_share: f64,
    /// Whether to keep the class centres that come with the starting weights, if the number of identities matches;
    /// otherwise they are initialised by `head_start`.
    pub keep_head: bool,
    /// Layers and stages to freeze at the starting weights, including their running statistics, by name prefix:
    /// `["conv1", "bn1", "prelu", "layer1"]` freezes the first stages of an IResNet.
    pub freeze: Vec<String>,
    /// Gradient accumulation: number of equal mini-batches that a batch is split into, to save memory. Their gradients
    /// are added before the update. Each mini-batch has its own batch-norm statistics.
    pub accumulate: usize,
    /// Whether to use activation checkpointing: less memory, more time, the same bits.
    pub recompute: bool,
    /// Most memory for the teacher's embeddings of training images, in MiB. On the CPU they are kept, so that the
    /// teacher sees each view once and not in every epoch; 0 keeps none. The result is the same.
    pub teacher_memory_mib: usize,
    /// Decay of the exponential moving average of the weights, such as 0.999; 0 turns it off. An arm is evaluated with
    /// the average and ends with it.
    pub ema: f64,
    /// Number of training images that a head is fitted on once an arm is trained, which says whether a face wears a mask
    /// ([`fit_mask_head`](super::fit_mask_head)); 0 fits none.
    pub mask_head: usize,
    /// Steps between training checkpoints, in addition to the one at the end of every epoch; 0 for those alone.
    pub save_every: usize,
    /// Number of training checkpoints to keep, the newest ones.
    pub keep_states: usize,
    /// Number of skipped steps in a row after which training stops. A step is skipped if its loss or gradient is not
    /// finite. On a GPU training stops as soon as one such step is detected.
    pub max_skipped: usize,
    /// Steps from one whose figures are recorded to the next, at least 1. The CPU records every step; a GPU has to be
    /// waited for to read them.
    pub log_every: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            arms: Arm::PAPER.to_vec(),
            teacher: None,
            start_weights: None,
            epochs: 26,
            teacher_epochs: None,
            seed: 0,
            soup: vec![Arm::Hg, Arm::Distill],
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
            teacher_memory_mib: 1024,
            ema: 0.0,
            mask_head: 1000,
            save_every: 0,
            keep_states: 2,
            max_skipped: 10,
            log_every: 20,
        }
    }
}

impl TrainConfig {
    /// Adds the arms that a soup averages, before it, where they are not in the list.
    pub(super) fn complete_arms(&mut self) {
        let Some(at) = self.arms.iter().position(|arm| *arm == Arm::Soup) else { return };
        let missing: Vec<Arm> = self.soup.iter().filter(|arm| !self.arms.contains(arm)).copied().collect();
        self.arms.splice(at..at, missing);
    }
}

/// Initial weights of a student.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Random weights.
    #[default]
    Scratch,
    /// The teacher's backbone and head.
    Teacher,
    /// The LG student's backbone and head.
    Lg,
}

/// Statistics that batch norm normalises by in training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchNormMode {
    /// Batch statistics, which also update the running statistics. On several ranks, each normalises by those of its
    /// part of the batch, and the first rank's are kept.
    #[default]
    Batch,
    /// Batch statistics of the parts of all ranks: what one rank with the whole batch would have.
    Sync,
    /// The running statistics of the weights that the arm starts from, which stay fixed. Required for models whose
    /// batch norms were folded into the convolutions; useful for small batches.
    Frozen,
}

/// Initial class centres.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeadStart {
    /// `N(0, 0.01)`, as published.
    #[default]
    Random,
    /// The mean embedding of each identity's training images, computed with the weights that the arm starts from.
    MeanEmbedding,
}

/// Distillation settings of the LG and HG arms. The defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistillArms {
    /// The distillation loss.
    pub kind: DistillKind,
    /// Weight of the distillation loss in MaskInv-LG.
    pub lambda_lg: f64,
    /// Weight of the distillation loss in MaskInv-HG and in distillation without labels.
    pub lambda_hg: f64,
    /// Weight of the margin loss in MaskInv-LG and -HG; 0 trains by distillation alone.
    pub margin_weight: f64,
    /// Class centres of the margin loss in MaskInv-LG and -HG.
    pub centres: CentreKind,
    /// How much more the distance counts for covered faces; see [`DistillConfig::covered_weight`].
    pub covered_weight: f64,
    /// Weight of the rank loss of students with a teacher; see [`DistillConfig::rank_weight`].
    pub rank_weight: f64,
    /// Weight of the agreement of paired views; see [`DistillConfig::agreement`].
    pub agreement: f64,
    /// Whether the teacher's mirror images belong to the target; see [`DistillConfig::mirror`].
    pub mirror: bool,
}

impl Default for DistillArms {
    fn default() -> Self {
        let DistillConfig { kind, margin_weight, centres, covered_weight, rank_weight, agreement, mirror, .. } =
            DistillConfig::default();
        let (lambda_lg, lambda_hg) = (100.0, 3000.0);
        Self { kind, lambda_lg, lambda_hg, margin_weight, centres, covered_weight, rank_weight, agreement, mirror }
    }
}

impl DistillArms {
    /// Returns the distillation settings of `arm`; `lambda` is 0 for arms that do not distil.
    pub fn of(&self, arm: Arm) -> DistillConfig {
        let (lambda, margin_weight, centres) = match arm {
            // A soup is not trained itself.
            Arm::Teacher | Arm::Aug | Arm::Soup => (0.0, 1.0, CentreKind::Learned),
            Arm::Lg => (self.lambda_lg, self.margin_weight, self.centres),
            Arm::Hg => (self.lambda_hg, self.margin_weight, self.centres),
            Arm::Distill => (self.lambda_hg, 0.0, self.centres),
            Arm::Ada => (0.0, 1.0, CentreKind::Adaptive),
        };
        let Self { kind, covered_weight, mirror, .. } = *self;
        let agreement = if arm == Arm::Teacher { 0.0 } else { self.agreement };
        let rank_weight = if arm.distills() && arm != Arm::Soup { self.rank_weight } else { 0.0 };
        DistillConfig { kind, lambda, margin_weight, centres, covered_weight, rank_weight, agreement, mirror }
    }
}

impl Config {
    /// Switches to the behaviour of the published code: masks from this RGBA template, drawn into both the teacher's
    /// and the student's crops; independent flips; its U-M evaluation; its margin matching in the "+" losses.
    pub fn use_reference_protocol(&mut self, template: &Path) {
        for mask in [&mut self.mask, &mut self.eval.mask] {
            mask.protocol = MaskProtocol::Reference;
            mask.template = Some(template.to_owned());
        }
        self.loss.plus_matching = PlusMatching::Reference;
    }

    /// Checks that all settings are in range.
    ///
    /// # Errors
    /// When a setting is out of range; names the first one.
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
        if let Some((i, arm)) = self.train.arms.iter().enumerate().find(|(i, arm)| self.train.arms[..*i].contains(arm))
        {
            let what = format!("train.arms: expected each arm once, found {} again in place {}", arm.name(), i + 1);
            return Err(Error::Config(what));
        }
        self.check_soup()?;
        self.check_seeds()?;
        // First, since other settings are compared with it.
        self.loader.validate()?;
        let TrainConfig { epochs, hg_first_epoch, .. } = self.train;
        if self.train.arms.contains(&Arm::Hg) && hg_first_epoch >= epochs {
            let what = format!("train.hg_first_epoch: expected below {epochs} (train.epochs), found {hg_first_epoch}");
            return Err(Error::Config(what));
        }
        if !(0.0..1.0).contains(&self.train.start_share) {
            let what = format!("train.start_share: expected 0 to below 1, found {}", self.train.start_share);
            return Err(Error::Config(what));
        }
        let TrainConfig { accumulate, ema, .. } = self.train;
        let batch = self.loader.batch_size;
        if self.train.log_every == 0 {
            return Err(Error::Config("train.log_every: expected at least 1, found 0".into()));
        }
        // Batch norm cannot compute the statistics of a single image.
        if accumulate == 0 || !batch.is_multiple_of(accumulate) || batch / accumulate < 2 {
            let what = format!(
                "train.accumulate: expected equal parts of at least two of {batch} images, found {accumulate} parts"
            );
            return Err(Error::Config(what));
        }
        if accumulate > 1 && self.loss.sample_rate < 1.0 {
            let what = "loss.sample_rate: the sample is of one step's classes; set train.accumulate = 1 or take all";
            return Err(Error::Config(what.into()));
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
        let students = [Arm::Lg, Arm::Hg].iter().chain(&self.train.arms);
        students.into_iter().try_for_each(|arm| self.distill.of(*arm).validate())?;
        if self.distill.agreement > 0.0 && !self.augment.paired {
            return Err(Error::Config("distill.agreement: is of paired views; set augment.paired = true".into()));
        }
        self.loss.validate()?;
        self.model.validate()?;
        self.optim.validate()?;
        self.schedule.validate()?;
        self.augment.validate()?;
        self.data.validate()?;
        self.mask.validate()?;
        self.eval.validate()?;
        self.ranks.validate()
    }

    /// Checks that the arms of a soup can be averaged: they come before it, and share their batch norms' statistics.
    fn check_soup(&self) -> Result<()> {
        let TrainConfig { arms, soup, batch_norm, .. } = &self.train;
        let Some(at) = arms.iter().position(|arm| *arm == Arm::Soup) else { return Ok(()) };
        let wrong = |what: String| Err(Error::Config(what));
        let are_distinct = soup.iter().enumerate().all(|(i, arm)| !soup[..i].contains(arm));
        if soup.len() < 2 || !are_distinct {
            let names: Vec<&str> = soup.iter().map(|arm| arm.name()).collect();
            return wrong(format!("train.soup: expected two arms or more that differ, found {names:?}"));
        }
        if let Some(arm) = soup.iter().find(|arm| arms[at..].contains(arm)) {
            return wrong(format!("train.soup: expected arms that are trained before it, found {}", arm.name()));
        }
        if *batch_norm != BatchNormMode::Frozen {
            let what = "train.soup: averaged weights have no statistics of their own; set train.batch_norm = frozen";
            return wrong(what.into());
        }
        Ok(())
    }

    /// Checks that every seed can be written to a settings file, whose whole numbers are signed.
    fn check_seeds(&self) -> Result<()> {
        let seeds = [
            ("train.seed", self.train.seed),
            ("data.split_seed", self.data.split_seed),
            ("data.procedural.seed", self.data.procedural.seed),
            ("eval.seed", self.eval.seed),
            ("eval.bootstrap.seed", self.eval.bootstrap.seed),
        ];
        match seeds.into_iter().find(|(_, seed)| i64::try_from(*seed).is_err()) {
            Some((name, seed)) => Err(Error::Config(format!("{name}: expected up to {}, found {seed}", i64::MAX))),
            None => Ok(()),
        }
    }

    /// Makes every path absolute, so that the settings mean the same from another folder and `./d` is `d`. Names of
    /// models that are no files stay as they are.
    ///
    /// # Errors
    /// When the current folder is not known.
    pub fn make_paths_absolute(&mut self) -> Result<()> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(Error::io(path));
        let DataConfig { root, pairs, real_masks, unlabelled, .. } = &mut self.data;
        let data = [root, pairs, real_masks, unlabelled];
        let masks = [&mut self.mask.template, &mut self.eval.mask.template];
        let colours = [&mut self.eval.reference_colours_um, &mut self.eval.reference_colours_mm];
        for path in data.into_iter().chain(masks).chain(colours).flatten() {
            *path = absolute(path)?;
        }
        for model in [&mut self.train.teacher, &mut self.train.start_weights].into_iter().flatten() {
            if Path::new(model.as_str()).exists() {
                *model = absolute(Path::new(model.as_str()))?.to_string_lossy().into_owned();
            }
        }
        Ok(())
    }

    /// Returns the settings of the training steps of `arm`.
    pub fn step(&self, arm: Arm) -> StepConfig {
        let TrainConfig { accumulate, recompute, teacher_memory_mib, ema, seed, log_every, .. } = self.train;
        let max_kept_bytes = teacher_memory_mib.saturating_mul(1 << 20);
        let (distill, optim) = (self.distill.of(arm), self.optim.clone());
        let sync_batch_norm = self.train.batch_norm == BatchNormMode::Sync;
        StepConfig { distill, optim, accumulate, recompute, max_kept_bytes, sync_batch_norm, ema, seed, log_every }
    }

    /// Returns the learning rate before the schedule: `optim.lr` scaled by `loader.batch_size / optim.lr_batch`.
    pub fn base_lr(&self) -> f64 {
        self.optim.lr * self.loader.batch_size as f64 / self.optim.lr_batch as f64
    }

    /// Returns the epochs in which `arm` is trained. The schedule counts from 0 even if the arm starts later.
    pub fn epochs(&self, arm: Arm) -> std::ops::Range<usize> {
        match arm {
            Arm::Teacher => 0..self.train.teacher_epochs.unwrap_or(self.train.epochs),
            Arm::Aug | Arm::Lg | Arm::Distill | Arm::Ada => 0..self.train.epochs,
            Arm::Hg => self.train.hg_first_epoch..self.train.epochs,
            Arm::Soup => 0..0,
        }
    }
}
