//! `maskinv train`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::progress::Progress;
use super::{print_json, unused, use_threads};
use crate::eval::{Setting, table};
use crate::train::{Arm, Config, Experiment, Outcome, load_checkpoint, preset, preset_names};

/// What to train, on what, and how.
#[derive(Args, Debug)]
pub struct TrainArgs {
    /// A folder of identities, or one with LFW's lists beside `images/`; procedural faces without it
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Settings to start from; `--list-presets` shows them [default: procedural, or lfw-small with --data]
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    preset: Option<String>,
    /// Settings from a TOML file instead of a preset
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Which networks to train
    #[arg(long, value_enum, default_value_t = ArmChoice::All)]
    arm: ArmChoice,
    /// A trained teacher to learn from, instead of training one: a checkpoint or its folder
    #[arg(long, value_name = "FILE")]
    teacher: Option<PathBuf>,
    /// Weights to start from: a checkpoint or its folder
    #[arg(long, value_name = "FILE")]
    start: Option<PathBuf>,
    /// Where results go [default: a new folder in runs/]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Replaces the results that are in --out
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
    /// Any other setting, such as model.width=0.5; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Threads of the computation [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
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
    fn arms(self, has_teacher: bool) -> Vec<Arm> {
        match self {
            Self::All if has_teacher => vec![Arm::Aug, Arm::Lg, Arm::Hg],
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
            preset_names().for_each(|(name, purpose)| println!("{name:16} {purpose}"));
            return Ok(());
        }
        let config = self.resolve()?;
        if self.show_config {
            print!("{}", config.to_toml()?);
            return Ok(());
        }
        use_threads(self.threads.map(usize::from))?;
        let out = self.out_folder(config.train.seed)?;
        let mut experiment = Experiment::new(config, &out)?;
        if let Some(path) = &self.teacher {
            experiment = experiment.with_teacher(load_checkpoint(path).context("--teacher")?);
        }
        if let Some(path) = &self.start {
            experiment = experiment.with_start(load_checkpoint(path).context("--start")?);
        }
        let mut progress = Progress::new();
        let outcome = experiment.run(&self.arm.arms(self.teacher.is_some()), &mut |event| progress.show(event))?;
        if self.json {
            return print_json(&outcome);
        }
        println!("{}, seed {}:\n", outcome.test_set, outcome.config.train.seed);
        println!("{}\n", table(&outcome.rows()));
        println!("{}", conclusion(&outcome));
        println!("Checkpoints, settings and all figures are in {}.", out.display());
        Ok(())
    }

    fn resolve(&self) -> Result<Config> {
        let mut config = match (&self.config, &self.preset, &self.data) {
            (Some(path), ..) => Config::read(path)?,
            (None, Some(name), _) => preset(name)?,
            (None, None, Some(_)) => preset("lfw-small")?,
            (None, None, None) => preset("procedural")?,
        };
        if let Some(root) = &self.data {
            config.data.root = Some(root.clone());
        }
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
        for assignment in &self.set {
            config.set(assignment)?;
        }
        config.validate()?;
        Ok(config)
    }

    fn out_folder(&self, seed: u64) -> Result<PathBuf> {
        let Some(out) = &self.out else {
            let kind = match (&self.preset, &self.data) {
                (Some(name), _) => name.as_str(),
                (None, Some(_)) => "folder",
                (None, None) => "procedural",
            };
            return Ok(unused(&Path::new("runs").join(format!("{kind}-seed{seed}"))));
        };
        if out.join("results.json").exists() && !self.overwrite {
            bail!("{}: has results; choose another folder or say --overwrite", out.display());
        }
        Ok(out.clone())
    }
}

/// A sentence that says what the table shows.
fn conclusion(outcome: &Outcome) -> String {
    let eer = |arm: Arm, setting: Setting| Some(100.0 * outcome.arms.get(&arm)?.evaluation.get(setting).metrics.eer);
    let students = [Arm::Lg, Arm::Hg];
    let best = |setting| {
        let of = |arm| eer(arm, setting).map(|e| (arm, e));
        students.into_iter().filter_map(of).min_by(|a, b| a.1.total_cmp(&b.1))
    };
    let (Some(clean), Some(teacher), Some((arm, student))) =
        (eer(Arm::Teacher, Setting::UU), eer(Arm::Teacher, Setting::UM), best(Setting::UM))
    else {
        return "EER: lower is better, 50 % is guessing; FDR: higher is better.".into();
    };
    let (both_teacher, both) = (eer(Arm::Teacher, Setting::MM), best(Setting::MM));
    let both = match (both_teacher, both) {
        (Some(teacher), Some((arm, e))) => {
            format!("; with both masked, {} {e:.1} % and the teacher {teacher:.1} %", arm.title())
        }
        _ => String::new(),
    };
    let verdict = if student < teacher { "undoes part of that" } else { "does not help here" };
    format!(
        "A mask on the probe takes the teacher's equal error rate from {clean:.1} % to {teacher:.1} % (50 % is guessing). \
         Learning from it {verdict}: {} errs {student:.1} % of the time{both}.",
        arm.title()
    )
}
