//! `maskinv train`.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::find_lr::LrRangeArgs;
use super::model::HubArgs;
use super::progress::Progress;
use super::results::{conclusion, tables};
use super::settings::SettingsArgs;
use super::{STOPPED, dry_run, interrupt, print, print_json, run_report, unused};
use crate::files::write_atomic;
use crate::train::{Arm, CONFIG_FILE, Checkpoint, Config, Event, Experiment, preset, preset_names};

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
    #[arg(long, requires = "out", conflicts_with = "resume")]
    overwrite: bool,
    /// Goes on with the training in this folder, as if it had never stopped; `auto`: with the one in --out, if there is one
    #[arg(long, value_name = "DIR|auto")]
    resume: Option<PathBuf>,
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
    /// Shows no progress, only what you should know of
    #[arg(long, short)]
    quiet: bool,
    /// Checks settings, weights and data, takes ten steps of every arm and says how long the training will take and how much memory;
    /// leaves nothing behind
    #[arg(long, conflicts_with_all = ["resume", "find_lr"])]
    dry_run: bool,
    /// Raises the learning rate with every step of the first arm and says which ones it learns with (Smith, 2017); leaves nothing behind
    #[arg(long, conflicts_with = "resume")]
    find_lr: bool,
    #[command(flatten)]
    lr_range: LrRangeArgs,
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
        let resumed = self.resumed()?;
        let config = self.resolve(resumed.as_deref())?;
        if self.show_config {
            return print(config.to_toml()?.trim_end());
        }
        self.settings.threads.start()?;
        let machine = self.settings.device.open()?;
        if self.dry_run || self.find_lr {
            // Nothing is written there.
            let experiment = Experiment::new(config, Path::new(""))?.on(&machine);
            let experiment = self.with_inputs(experiment, &self.inputs(None)?)?;
            return match self.dry_run {
                true => dry_run::run(&experiment, self.quiet, self.json),
                false => self.lr_range.run(&experiment, self.quiet, self.json),
            };
        }
        let out = match &resumed {
            Some(out) => out.clone(),
            None => self.out_folder(config.train.seed)?,
        };
        let inputs = self.inputs(resumed.as_deref())?;
        let mut experiment = Experiment::new(config, &out)?.on(&machine);
        if resumed.is_some() {
            experiment = experiment.resumed()?;
        } else {
            std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
            write_atomic(&out.join(INPUTS_FILE), &serde_json::to_vec_pretty(&inputs)?)?;
        }
        let experiment = self.with_inputs(experiment, &inputs)?;
        let stop = interrupt::flag()?;
        let mut progress = Progress::of(self.quiet);
        let mut notices = Vec::new();
        let on = &mut |event: Event| {
            if matches!(event, Event::Embedded { .. }) && stop.load(Ordering::Relaxed) {
                // What was trained is saved; an evaluation has nothing to save.
                eprintln!("stopped in an evaluation, as asked; {}", go_on(&out));
                std::process::exit(STOPPED.into());
            }
            if let Event::Notice(text) = &event {
                notices.push(text.clone());
            }
            progress.show(event);
        };
        let experiment = experiment.stopped_by(stop);
        let outcome = experiment.run(on);
        // Of what is there, however it ended.
        if let Err(error) = run_report::write(&out, Some(&experiment), notices) {
            eprintln!("{}: {error:#}", out.join(run_report::FILE).display());
        }
        let outcome = outcome.map_err(|error| match error {
            crate::Error::Stopped { .. } => anyhow::Error::new(error).context(go_on(&out)),
            other => other.into(),
        })?;
        if self.json {
            return print_json(&outcome);
        }
        print(&format!("{}, seed {}:\n", outcome.test_set, outcome.config.train.seed))?;
        for table in tables(&outcome.arms) {
            print(&format!("{table}\n"))?;
        }
        print(&conclusion(&outcome.arms))?;
        print(&format!(
            "Checkpoints, settings and all figures are in {0}; {0}/{1} shows them.",
            out.display(),
            run_report::FILE
        ))
    }

    fn with_inputs(&self, mut experiment: Experiment, inputs: &Inputs) -> Result<Experiment> {
        if let Some(name) = &inputs.teacher {
            experiment = experiment.with_teacher(self.checkpoint(name).context("--teacher")?);
        }
        if let Some(name) = &inputs.start {
            experiment = experiment.with_start(self.checkpoint(name).context("--start")?)?;
        }
        Ok(experiment)
    }

    fn checkpoint(&self, name: &str) -> Result<Checkpoint> {
        Ok(Checkpoint::of(self.hub.load_with_notes(name)?)?)
    }

    /// The folder of the training to go on with, if there is one.
    fn resumed(&self) -> Result<Option<PathBuf>> {
        let Some(resume) = &self.resume else { return Ok(None) };
        if resume.as_os_str() != "auto" {
            if self.out.is_some() {
                bail!("--resume DIR goes on in DIR: expected no --out");
            }
            return match resume.join(CONFIG_FILE).is_file() {
                true => Ok(Some(resume.clone())),
                false => bail!("--resume {0}: expected {0}/{CONFIG_FILE}, found none", resume.display()),
            };
        }
        let Some(out) = &self.out else { bail!("--resume auto: expected --out too, the folder to look in") };
        Ok(out.join(CONFIG_FILE).is_file().then(|| out.clone()))
    }

    /// The models that the training was given.
    fn inputs(&self, resumed: Option<&Path>) -> Result<Inputs> {
        let given = Inputs { teacher: self.teacher.clone(), start: self.start.clone() };
        let Some(path) = resumed.map(|folder| folder.join(INPUTS_FILE)) else { return Ok(given) };
        let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let before: Inputs = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
        let is_other = |given: &Option<String>, before| given.is_some() && given != before;
        if is_other(&given.teacher, &before.teacher) || is_other(&given.start, &before.start) {
            bail!("{}: expected the same --teacher and --start as before, found {given:?}", path.display());
        }
        Ok(before)
    }

    fn resolve(&self, resumed: Option<&Path>) -> Result<Config> {
        let before = resumed.map(|folder| Config::read(&folder.join(CONFIG_FILE))).transpose()?;
        let mut config = match self.settings.chosen()?.or_else(|| before.clone()) {
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
        match (before, resumed) {
            (Some(before), Some(folder)) if before != config => {
                bail!(
                    "{}: expected the settings that it was begun with: {}",
                    folder.display(),
                    differences(&before, &config)?
                )
            }
            _ => Ok(config),
        }
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

/// The models that a training was given, as they were named.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Inputs {
    teacher: Option<String>,
    start: Option<String>,
}

/// Where a training keeps them.
const INPUTS_FILE: &str = "inputs.json";

/// How to go on.
fn go_on(out: &Path) -> String {
    format!("maskinv train --resume {} goes on", out.display())
}

/// The settings that are not the same.
fn differences(before: &Config, now: &Config) -> Result<String> {
    let of = |a: &Config, b: &Config| -> Result<String> {
        let entries = a.entries_unlike(b)?.into_iter().map(|(key, value)| format!("{key} = {value}"));
        Ok(entries.collect::<Vec<_>>().join(", "))
    };
    Ok(format!("{} instead of {}", of(now, before)?, of(before, now)?))
}
