//! `maskinv train`.

mod sweep;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};

use crate::cli::device::{Work, tell_of_runtime};
use crate::cli::find_lr::LrRangeArgs;
use crate::cli::model::HubArgs;
use crate::cli::progress::Progress;
use crate::cli::results::{conclusion, tables};
use crate::cli::settings::SettingsArgs;
use crate::cli::{STOPPED, dry_run, interrupt, print, print_json, ranks, run_report, tell};
use crate::dist::Ranks;
use crate::files::{check_folder_writable, has_entries, is_inside};
use crate::machine::Machine;
use crate::train::{
    Arm, CONFIG_FILE, ChangedData, Checkpoint, Config, Event, Experiment, Outcome, REPORT_PAGE, Run, RunFolder, preset,
    preset_names,
};
use crate::weights::Bundled;
use crate::weights::manifest::find_bundled;

/// What to train, on what, and how.
#[derive(Args, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    hub: HubArgs,
    /// Network to train; repeat for several [default: from the settings]
    #[arg(long, value_enum)]
    arm: Vec<ArmChoice>,
    /// Trained teacher to distil from instead of training one: a checkpoint in any format (see `maskinv info`), the
    /// folder of a trained arm (runs/NAME/ARM), or, with the feature hub, hf://owner/repo/file or a short name
    #[arg(long, value_name = "MODEL")]
    teacher: Option<String>,
    /// Initial weights of every arm, in any form that --teacher accepts
    #[arg(long, value_name = "MODEL")]
    start: Option<String>,
    /// Further images without labels, from which the arms with a teacher learn: a data set in any format, or a folder of
    /// aligned crops
    #[arg(long, value_name = "PATH")]
    unlabelled: Option<PathBuf>,
    /// Folder for the results [default: a new folder in runs/]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Write into --out even if it is not empty
    #[arg(long, requires = "out", conflicts_with = "resume")]
    overwrite: bool,
    /// Resume the run in DIR (without --out); `auto` resumes the one in --out, or starts it if there is none
    #[arg(long, value_name = "DIR|auto")]
    resume: Option<PathBuf>,
    /// Seed of initial weights, batches, masks and margins [default: from the settings]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Epochs of every arm [default: from the settings]
    #[arg(long, value_name = "N")]
    epochs: Option<usize>,
    /// Images per batch [default: from the settings]
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Go on although data or given weights are no longer those that a resumed run was begun with, or class centres to
    /// start from are of other people
    #[arg(long)]
    accept_changed_data: bool,
    /// Learning rate for a batch of optim.lr_batch images, scaled in proportion to the batch size [default: from the
    /// settings]
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Print results as JSON
    #[arg(long)]
    json: bool,
    /// Hide progress; notices and errors are still shown
    #[arg(long, short)]
    quiet: bool,
    /// Check settings, weights and data, run ten steps of every arm, and print the expected time and memory; write
    /// nothing
    #[arg(long, conflicts_with_all = ["resume", "find_lr"])]
    dry_run: bool,
    /// Raise the learning rate step by step and print the first arm's loss at each, the rate at which it falls fastest
    /// and a tenth of the best (Smith, 2017); write nothing
    #[arg(long, conflicts_with = "resume")]
    find_lr: bool,
    #[command(flatten)]
    lr_range: LrRangeArgs,
    /// Train every row of an ablation with every seed into --out, and compare them: a TOML file with `seeds`, the name
    /// of the `baseline`, and [[rows]] of `name`, `arm` and `set`. The same command goes on after an interruption
    #[arg(long, value_name = "FILE", requires = "out",
        conflicts_with_all = ["resume", "overwrite", "arm", "seed", "dry_run", "find_lr", "json"])]
    sweep: Option<PathBuf>,
    /// Print the resolved settings and exit
    #[arg(long)]
    show_config: bool,
    /// List the presets and exit
    #[arg(long)]
    list_presets: bool,
}

/// A value of `--arm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ArmChoice {
    /// The paper's four.
    All,
    One(Arm),
}

impl ArmChoice {
    const VALUES: [Self; Arm::ALL.len() + 1] = {
        let mut values = [Self::All; Arm::ALL.len() + 1];
        let mut i = 0;
        while i < Arm::ALL.len() {
            values[i + 1] = Self::One(Arm::ALL[i]);
            i += 1;
        }
        values
    };

    fn arms(&self) -> &[Arm] {
        match self {
            Self::All => &Arm::PAPER,
            Self::One(arm) => std::slice::from_ref(arm),
        }
    }
}

impl ValueEnum for ArmChoice {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::VALUES
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let Self::One(arm) = self else {
            return Some(PossibleValue::new("all").help("The paper's four: teacher, aug, lg and hg"));
        };
        Some(PossibleValue::new(arm.name()).help(match arm {
            Arm::Teacher => "Margin loss on clean faces",
            Arm::Aug => "Margin loss on clean and masked faces",
            Arm::Lg => "aug with weak distillation from the teacher: MaskInv-LG",
            Arm::Hg => "aug with strong distillation from the teacher: MaskInv-HG",
            Arm::Distill => "Distillation from the teacher alone, without labels",
            Arm::Ada => "Margin loss with class centres that follow the teacher's embeddings: AdaDistill",
            Arm::Soup => "Average of the weights of train.soup's arms (hg and distill), which it trains first",
        }))
    }
}

impl TrainArgs {
    /// Trains, evaluates, and prints a table.
    ///
    /// # Errors
    /// When a setting, path or file is wrong, or training fails.
    pub fn run(self) -> Result<()> {
        if self.list_presets {
            let width = preset_names().map(|(name, _)| name.len()).max().unwrap_or_default();
            return preset_names().try_for_each(|(name, purpose)| print(&format!("{name:width$} {purpose}")));
        }
        ranks::run(|ranks| self.run_on(ranks))
    }

    fn run_on(&self, ranks: &Ranks) -> Result<()> {
        if (self.sweep.is_some() || self.show_config) && !ranks.is_single() {
            bail!("--sweep and --show-config run on one rank: expected no launcher");
        }
        if let Some(file) = &self.sweep {
            return sweep::run(self, file);
        }
        // The first rank's, since it may have made the folder before another one looks.
        let resumed = ranks.path_of_first(self.resumed()?.as_deref())?;
        let config = self.resolve(resumed.as_deref())?;
        if self.show_config {
            return print(config.to_toml()?.trim_end());
        }
        self.settings.threads.start_on_ranks()?;
        let opened = self.settings.device.open(Work::Training)?;
        let machine = opened.clone().with_ranks(&ranks.clone().configured(&config.ranks));
        if self.dry_run || self.find_lr {
            // Nothing is written there.
            let experiment = self.experiment(config, &machine)?;
            return match self.dry_run {
                true => dry_run::run(&experiment, self.quiet, self.json),
                false => self.lr_range.run(&experiment, self.quiet, self.json),
            };
        }
        let is_resumed = resumed.is_some();
        let destination = ranks.first_does(|| {
            Ok::<_, anyhow::Error>(match resumed {
                Some(folder) => Destination::Resumed(folder),
                None => self.destination(&config)?,
            })
        })?;
        let changed_data = if self.accept_changed_data { ChangedData::Accept } else { ChangedData::Refuse };
        let experiment = self.experiment(config, &machine)?.with_changed_data(changed_data);
        // Claimed once everything else is known to be right, so that a mistake leaves no folder behind.
        let folder = ranks.first_does(|| destination.map(|destination| destination.claim()).transpose())?.flatten();
        let out = ranks.path_of_first(folder.as_ref().map(RunFolder::path))?.unwrap_or_default();
        let folder = folder.unwrap_or_else(|| RunFolder::of_first_rank(&out));
        let experiment = if is_resumed { experiment.resumed(folder)? } else { experiment.in_folder(folder) };
        let stop = interrupt::flag()?;
        if !ranks.is_first() {
            experiment.stopped_by(stop).run(&mut |_| ())?;
            return Ok(());
        }
        let outcome = carry_out(experiment, &out, self.quiet, &stop, &go_on(&out))?;
        if self.json {
            return print_json(&outcome);
        }
        print(&format!("{}, seed {}:\n", outcome.test_set, outcome.config.train.seed))?;
        for table in tables(&outcome.arms) {
            print(&format!("{table}\n"))?;
        }
        print(&conclusion(&outcome.arms, &outcome.paired_tests))?;
        print(&format!(
            "Checkpoints, settings and all figures are in {0}; {0}/{1} shows them.",
            out.display(),
            REPORT_PAGE
        ))
    }

    /// Returns the training on `machine`, or on the CPU if that was chosen by itself and does not support it.
    fn experiment(&self, config: Config, machine: &Machine) -> Result<Experiment> {
        let experiment = self.with_models(Experiment::new(config)?.on(machine), machine)?;
        let is_auto = self.settings.device.is_auto();
        match if is_auto { experiment.refusal()? } else { None } {
            Some(why) => {
                tell(format_args!("on the CPU: {why}"));
                Ok(experiment.on(&Machine::default().with_ranks(machine.ranks())))
            }
            None => Ok(experiment),
        }
    }

    /// Opens the models that the settings name.
    fn with_models(&self, mut experiment: Experiment, machine: &Machine) -> Result<Experiment> {
        let train = experiment.config().train.clone();
        if let Some(name) = train.teacher.filter(|_| !train.arms.contains(&Arm::Teacher)) {
            let teacher = self.checkpoint(&name).context("teacher")?;
            tell_of_runtime(&teacher.backbone, machine);
            experiment = experiment.with_teacher(teacher);
        }
        if let Some(name) = train.start_weights {
            experiment = experiment.with_start(self.checkpoint(&name).context("start weights")?)?;
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

    fn resolve(&self, resumed: Option<&Path>) -> Result<Config> {
        let before = resumed.map(|folder| Config::read_written(&folder.join(CONFIG_FILE))).transpose()?;
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
        if self.teacher.is_some() && self.arm.contains(&ArmChoice::One(Arm::Teacher)) {
            bail!("--teacher gives a trained teacher, --arm teacher trains one: expected one of the two");
        }
        if !self.arm.is_empty() {
            let chosen: BTreeSet<Arm> = self.arm.iter().flat_map(ArmChoice::arms).copied().collect();
            config.train.arms = chosen.into_iter().collect();
        }
        if let Some(teacher) = &self.teacher {
            config.train.arms.retain(|&arm| arm != Arm::Teacher);
            config.train.teacher = Some(teacher.clone());
        } else if config.train.arms.contains(&Arm::Teacher) {
            config.train.teacher = None;
        }
        if let Some(start) = &self.start {
            config.train.start_weights = Some(start.clone());
        }
        if let Some(unlabelled) = &self.unlabelled {
            config.data.unlabelled = Some(unlabelled.clone());
        }
        self.settings.apply(&mut config, &self.hub)?;
        config.make_paths_absolute()?;
        let teacher = config.train.teacher.as_deref().filter(|_| self.teacher.is_none() && resumed.is_none());
        if let Some(bundled) = teacher.and_then(find_bundled).filter(|_| config.data.root.is_some()) {
            let Bundled { name, data, .. } = bundled;
            bail!(
                "the teacher of these settings, {name}, was trained on {data}: with --data, expected --teacher or --arm"
            );
        }
        if let (Some(before), Some(folder)) = (before, resumed) {
            let differences = config.differences(&before)?.join(", ");
            if !differences.is_empty() {
                bail!("{}: expected the settings that it was begun with: {differences}", folder.display());
            }
        }
        Ok(config)
    }

    /// Returns where a new training's results go, and checks that an --out can be used.
    fn destination(&self, config: &Config) -> Result<Destination> {
        let Some(out) = &self.out else {
            let kind = match (&self.settings.preset, &self.settings.data) {
                (Some(name), _) => name.as_str(),
                (None, Some(_)) => "folder",
                (None, None) => "procedural",
            };
            return Ok(Destination::Unused(Path::new("runs").join(format!("{kind}-seed{}", config.train.seed))));
        };
        if has_entries(out) && !self.overwrite {
            bail!("{}: is not empty; choose another folder or say --overwrite", out.display());
        }
        check_folder_writable(out)?;
        for weights in [&config.train.teacher, &config.train.start_weights].into_iter().flatten() {
            if self.overwrite && is_inside(Path::new(weights), out) {
                bail!("{weights}: expected weights outside of {}, which --overwrite replaces", out.display());
            }
        }
        Ok(match self.overwrite {
            true => Destination::Overwritten(out.clone()),
            false => Destination::Empty(out.clone()),
        })
    }
}

/// The folder for a training's results.
enum Destination {
    /// A new folder of this name, or with a number added.
    Unused(PathBuf),
    /// A folder that is missing or empty.
    Empty(PathBuf),
    /// A folder whose training is replaced.
    Overwritten(PathBuf),
    /// The folder of a training to resume.
    Resumed(PathBuf),
}

impl Destination {
    fn claim(&self) -> crate::Result<RunFolder> {
        match self {
            Self::Unused(base) => RunFolder::unused(base),
            Self::Empty(path) => RunFolder::empty(path),
            Self::Overwritten(path) => RunFolder::overwritten(path),
            Self::Resumed(path) => RunFolder::of_run(path),
        }
    }
}

/// Runs a training whose results go to `out`, shows its progress, and writes its page; `go_on` says how it goes on
/// after an interruption.
fn carry_out(experiment: Experiment, out: &Path, quiet: bool, stop: &Arc<AtomicBool>, go_on: &str) -> Result<Outcome> {
    let mut progress = Progress::of(quiet);
    let mut notices = Vec::new();
    let on = &mut |event: Event| {
        if matches!(event, Event::Embedded { .. }) && stop.load(Ordering::Relaxed) {
            // What was trained is saved; an evaluation has nothing to save.
            tell(format_args!("stopped in an evaluation, as requested; {go_on}"));
            std::process::exit(STOPPED.into());
        }
        if let Event::Notice(text) = &event {
            notices.push(text.clone());
        }
        progress.show(event);
    };
    let experiment = experiment.stopped_by(stop.clone());
    let outcome = experiment.run(on);
    // Of what is there, however it ended; nothing is there if it could not begin.
    if Run::is_in(out)
        && let Err(error) = run_report::write(out, Some(&experiment), notices)
    {
        tell(format_args!("{}: {error:#}", out.join(REPORT_PAGE).display()));
    }
    outcome.map_err(|error| match error {
        crate::Error::Stopped { .. } => anyhow::Error::new(error).context(go_on.to_owned()),
        other => other.into(),
    })
}

/// Returns the command that resumes a training.
fn go_on(out: &Path) -> String {
    format!("resume with: maskinv train --resume {}", out.display())
}
