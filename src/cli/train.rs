//! `maskinv train`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::model::HubArgs;
use super::progress::Progress;
use super::settings::SettingsArgs;
use super::{print, print_json, unused};
use crate::eval::{Setting, table, table_as_is};
use crate::train::{Arm, Checkpoint, Config, Experiment, Outcome, preset, preset_names};

/// What to train, on what, and how.
#[derive(Args, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    hub: HubArgs,
    /// Which networks to train [default: those of the settings; all in most presets]
    #[arg(long, value_enum)]
    arm: Option<ArmChoice>,
    /// A trained teacher to learn from, instead of training one: a checkpoint in any format (see `maskinv info`), its
    /// folder, hf://owner/repo/file or a short name
    #[arg(long, value_name = "MODEL")]
    teacher: Option<String>,
    /// Weights to start from, named as a teacher is
    #[arg(long, value_name = "MODEL")]
    start: Option<String>,
    /// Where results go [default: a new folder in runs/]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Writes into --out although something is there
    #[arg(long, requires = "out")]
    overwrite: bool,
    /// Decides initial weights, batches, masks and margins
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Epochs of every arm
    #[arg(long, value_name = "N")]
    epochs: Option<usize>,
    /// Images per batch
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Learning rate, for the batch size that the settings name
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Prints the results as JSON
    #[arg(long)]
    json: bool,
    /// Prints the resolved settings and ends
    #[arg(long)]
    show_config: bool,
    /// Prints the presets and ends
    #[arg(long)]
    list_presets: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ArmChoice {
    /// The teacher, then aug, lg and hg
    All,
    /// Margin loss on clean faces
    Teacher,
    /// Margin loss on faces of which half are masked
    Aug,
    /// As aug, with weak distillation from the teacher: MaskInv-LG
    Lg,
    /// As aug, with strong distillation from the teacher: MaskInv-HG
    Hg,
}

impl ArmChoice {
    fn arms(self) -> Vec<Arm> {
        match self {
            Self::All => Arm::ALL.to_vec(),
            Self::Teacher => vec![Arm::Teacher],
            Self::Aug => vec![Arm::Aug],
            Self::Lg => vec![Arm::Lg],
            Self::Hg => vec![Arm::Hg],
        }
    }
}

impl TrainArgs {
    /// Trains, evaluates, and prints a table.
    ///
    /// # Errors
    /// When a setting, path or file is wrong, or training fails.
    pub fn run(self) -> Result<()> {
        if self.list_presets {
            return preset_names().try_for_each(|(name, purpose)| print(&format!("{name:16} {purpose}")));
        }
        let config = self.resolve()?;
        if self.show_config {
            return print(config.to_toml()?.trim_end());
        }
        self.settings.threads.start()?;
        let machine = self.settings.device.open()?;
        let out = self.out_folder(config.train.seed)?;
        let mut experiment = Experiment::new(config, &out)?.on(&machine);
        if let Some(name) = &self.teacher {
            experiment = experiment.with_teacher(self.checkpoint(name).context("--teacher")?);
        }
        if let Some(name) = &self.start {
            experiment = experiment.with_start(self.checkpoint(name).context("--start")?)?;
        }
        let mut progress = Progress::new();
        let outcome = experiment.run(&mut |event| progress.show(event))?;
        if self.json {
            return print_json(&outcome);
        }
        print(&format!("{}, seed {}:\n", outcome.test_set, outcome.config.train.seed))?;
        print(&format!("{}\n", table(&outcome.rows())))?;
        if !outcome.real_mask_rows().is_empty() {
            print(&format!("{}\n", table_as_is("real masks", &outcome.real_mask_rows())))?;
        }
        print(&conclusion(&outcome))?;
        print(&format!("Checkpoints, settings and all figures are in {}.", out.display()))
    }

    fn checkpoint(&self, name: &str) -> Result<Checkpoint> {
        Ok(Checkpoint::of(self.hub.load_with_notes(name)?)?)
    }

    fn resolve(&self) -> Result<Config> {
        let mut config = match self.settings.chosen()? {
            Some(config) => config,
            None if self.settings.data.is_some() => preset("lfw-small")?,
            None => preset("procedural")?,
        };
        if let Some(seed) = self.seed {
            config.train.seed = seed;
        }
        if let Some(epochs) = self.epochs {
            config.train.epochs = epochs;
            config.train.teacher_epochs = None;
        }
        if let Some(batch_size) = self.batch_size {
            config.loader.batch_size = batch_size;
        }
        if let Some(lr) = self.lr {
            config.optim.lr = lr;
        }
        if let Some(choice) = self.arm {
            config.train.arms = choice.arms();
        }
        if self.teacher.is_some() {
            config.train.arms.retain(|&arm| arm != Arm::Teacher);
        }
        self.settings.apply(&mut config, &self.hub)?;
        Ok(config)
    }

    fn out_folder(&self, seed: u64) -> Result<PathBuf> {
        let Some(out) = &self.out else {
            let kind = match (&self.settings.preset, &self.settings.data) {
                (Some(name), _) => name.as_str(),
                (None, Some(_)) => "folder",
                (None, None) => "procedural",
            };
            return Ok(unused(&Path::new("runs").join(format!("{kind}-seed{seed}"))));
        };
        let is_used = std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some());
        if is_used && !self.overwrite {
            bail!("{}: is not empty; choose another folder or say --overwrite", out.display());
        }
        Ok(out.clone())
    }
}

/// A sentence or three that say what the table shows, and no more than that.
fn conclusion(outcome: &Outcome) -> String {
    let eer = |arm: Arm, setting: Setting| Some(100.0 * outcome.arms.get(&arm)?.evaluation.get(setting).metrics.eer);
    let mut sentences = vec!["EER: lower is better, 50 % is guessing.".to_owned()];
    if let (Some(clean), Some(masked)) = (eer(Arm::Teacher, Setting::UU), eer(Arm::Teacher, Setting::UM)) {
        sentences.push(format!("A mask on the probe takes the teacher's from {clean:.1} % to {masked:.1} %."));
    }
    let best = [Arm::Lg, Arm::Hg].into_iter().filter_map(|arm| Some((arm, eer(arm, Setting::UM)?)));
    if let Some((arm, student)) = best.min_by(|a, b| a.1.total_cmp(&b.1)) {
        let compared = match eer(Arm::Aug, Setting::UM) {
            Some(aug) if student < aug => format!(", with masks in training alone {aug:.1} %"),
            Some(aug) => format!("; masks in training alone do as well, {aug:.1} %"),
            None => String::new(),
        };
        sentences.push(format!("The student that learned from it, {}, has {student:.1} %{compared}.", arm.title()));
    }
    sentences.join(" ")
}
