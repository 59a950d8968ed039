//! `maskinv evaluate`.

mod all_pairs;
mod output;
mod pairs;
mod provenance;
mod templates;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::bootstrap::BootstrapArgs;
use super::device::Work;
use super::model::HubArgs;
use super::photos::{Cropped, PhotoArgs, UnusableArgs, WhichArgs, in_photos};
use super::progress::Progress;
use super::settings::SettingsArgs;
use super::{interrupt, ranks, tell};
use crate::data::{Dataset, FACE_SIZE};
use crate::dist::Ranks;
use crate::face::{Cropper, Which};
use crate::files::{StagedFolder, has_entries};
use crate::machine::Machine;
use crate::models::Model;
use crate::report::{PAGE_FILE, refuse_to_replace};
use crate::train::{Config, Event};
use crate::weights::WeightsFile;

/// Arguments of `maskinv evaluate`.
#[derive(Args, Debug)]
pub struct EvaluateArgs {
    /// Checkpoints in any format (see `maskinv info`), folders of trained arms (runs/NAME/ARM), or, with the feature
    /// hub, hf://owner/repo/file or short names of `download --list`
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
    /// Evaluation protocol
    #[arg(long, value_enum, default_value_t = Protocol::Pairs, value_name = "NAME")]
    protocol: Protocol,
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    hub: HubArgs,
    /// List of image pairs from --data, in LFW's or MFR2's format or with two image files and 1 or 0 in a line, or a
    /// verification file (.bin)
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// For all-pairs, a CSV with the columns file (PERSON/IMAGE) and masked (1 or 0); without it masks are drawn on the
    /// images
    #[arg(long, value_name = "CSV")]
    worn: Option<PathBuf>,
    /// Random seed of the masks drawn on test images [default: from the settings]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Write all scores to this folder, one CSV per model and setting (U-U, U-M, ...), in the format of `maskinv
    /// metrics`
    #[arg(long, value_name = "DIR")]
    scores: Option<PathBuf>,
    /// Write report.json, report.md, report.html (a page with curves) and all scores to this folder
    #[arg(long, value_name = "DIR", conflicts_with = "scores")]
    report: Option<PathBuf>,
    /// Number of hardest genuine and impostor pairs whose faces are shown in report.html; 0 for none
    #[arg(long, value_name = "N", default_value_t = 0, requires = "report")]
    faces: usize,
    #[command(flatten)]
    which: WhichArgs,
    #[command(flatten)]
    photos: PhotoArgs,
    #[command(flatten)]
    unusable: UnusableArgs,
    #[command(flatten)]
    bootstrap: BootstrapArgs,
    /// Print all figures as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Protocol {
    /// Pairs from a list, a verification file (.bin), LFW's folds or drawn at random; U-U, U-M, M-U and M-M on the same
    /// pairs (U: no mask, M: mask; the reference first, then the probe)
    Pairs,
    /// All pairs of unmasked and masked images (U-U, U-M, M-M), as in insightface's MFR challenge
    AllPairs,
    /// IJB-B or IJB-C templates, 1:1 by a list of pairs and 1:N in galleries, as in insightface's scripts
    Ijb,
}

/// A model to evaluate, with the name the user gave it.
struct Named {
    name: String,
    file: WeightsFile,
    model: Model,
}

/// Inputs shared by all protocols.
struct Job<'a> {
    args: &'a EvaluateArgs,
    models: &'a [Named],
    config: &'a Config,
    machine: &'a Machine,
    outputs: &'a Outputs,
    /// Makes crops of photos.
    cropper: &'a Arc<Cropper>,
    stop: Arc<AtomicBool>,
}

/// The files that an evaluation writes, which appear once all are complete.
struct Outputs {
    report: Option<StagedFolder>,
    scores: Option<StagedFolder>,
}

impl Outputs {
    /// Checks that the outputs can be written and replace nothing, so that this is known before any image is read.
    fn new(args: &EvaluateArgs) -> Result<Self> {
        if let Some(folder) = &args.report {
            refuse_to_replace(folder)?;
            if crate::train::Run::is_in(folder) {
                bail!("{}: is the folder of a training; choose another one for the report", folder.display());
            }
            let scores = folder.join(SCORES);
            if args.scores.is_none() && has_entries(&scores) {
                bail!("{}: is not empty; choose another folder for the report", scores.display());
            }
        }
        if let Some(folder) = args.scores.as_ref().filter(|folder| has_entries(folder)) {
            bail!("{}: is not empty; choose another folder for the scores", folder.display());
        }
        let staged = |folder: &Option<PathBuf>| folder.as_deref().map(StagedFolder::new).transpose();
        Ok(Self { report: staged(&args.report)?, scores: staged(&args.scores)? })
    }

    /// Moves everything to its place.
    fn finish(self) -> Result<()> {
        for staged in [self.scores, self.report].into_iter().flatten() {
            staged.finish()?;
        }
        Ok(())
    }

    /// Removes everything, before the process ends.
    fn discard(&self) {
        [&self.report, &self.scores].into_iter().flatten().for_each(StagedFolder::discard);
    }
}

/// Folder of the scores in that of a report.
const SCORES: &str = "scores";

impl EvaluateArgs {
    /// Evaluates each model and prints a table.
    ///
    /// # Errors
    /// When a checkpoint, setting or image is invalid, or a report would be overwritten.
    pub fn run(self) -> Result<()> {
        ranks::run(|ranks| self.run_on(ranks))
    }

    fn run_on(&self, ranks: &Ranks) -> Result<()> {
        self.settings.threads.start_on_ranks()?;
        let opened = self.settings.device.open(Work::Inference)?;
        if self.worn.is_some() && self.protocol != Protocol::AllPairs {
            bail!("--worn is for --protocol all-pairs only");
        }
        let of_photos = || {
            let unusable = self.unusable.are_left_out().then_some("--skip-unusable");
            let which = (self.which.which != Which::default()).then_some("--face");
            self.photos.first_given().or(unusable).or(which)
        };
        if let (Protocol::Ijb, Some(flag)) = (self.protocol, of_photos()) {
            bail!("{flag}: not for --protocol ijb, whose faces are cropped by the landmarks of its list");
        }
        let load = |name: &String| {
            let loaded = self.hub.load_with_notes(name)?;
            Ok(Named { name: name.clone(), file: loaded.file, model: loaded.model })
        };
        let models = self.models.iter().map(load).collect::<Result<Vec<_>>>()?;
        output::check_names(&models)?;
        let mut config = self.settings.chosen_or_beside(&self.models[0])?;
        if let Some(pairs) = &self.pairs {
            config.data.pairs = Some(pairs.clone());
        }
        if let Some(seed) = self.seed {
            config.eval.seed = seed;
        }
        self.bootstrap.apply(&mut config.eval.bootstrap);
        self.settings.apply(&mut config, &self.hub)?;
        let machine = opened.clone().with_ranks(&ranks.clone().configured(&config.ranks));
        let placed = |named: Named| Named { model: self.settings.device.place(named.model, &machine), ..named };
        let models: Vec<Named> = models.into_iter().map(placed).collect();
        agree(&models, &config, &machine)?;
        if !ranks.is_first() {
            // What follows the embeddings is the first rank's.
            config.eval.bootstrap.replicates = 0;
        }
        let outputs = ranks.first_does(|| Outputs::new(self))?.unwrap_or(Outputs { report: None, scores: None });
        let stop = interrupt::flag()?;
        let cropper = self.photos.cropper(self.which.which, FACE_SIZE as usize, &self.hub)?;
        let run = Job {
            args: self,
            models: &models,
            config: &config,
            machine: &machine,
            outputs: &outputs,
            cropper: &cropper,
            stop,
        };
        let output = match self.protocol {
            Protocol::Pairs => pairs::measure(&run)?,
            Protocol::AllPairs => all_pairs::measure(&run)?,
            Protocol::Ijb => templates::measure(&run)?,
        };
        if !ranks.is_first() {
            return Ok(());
        }
        output.finish(&run)?;
        outputs.finish()?;
        if let Some(folder) = &self.report {
            tell(format_args!("{}", folder.join(PAGE_FILE).display()));
        }
        Ok(())
    }
}

/// Checks that all ranks have the same settings and networks.
fn agree(models: &[Named], config: &Config, machine: &Machine) -> Result<()> {
    if machine.ranks().is_single() {
        return Ok(());
    }
    machine.agree(&config.to_toml()?)?;
    let digests = models.iter().map(|named| Ok(format!("{} {}\n", named.name, named.file.sha256()?)));
    Ok(machine.ranks().agree("networks", &digests.collect::<Result<String>>()?)?)
}

impl Job<'_> {
    /// Returns the path given by `--data`, which this protocol requires.
    fn root(&self) -> Result<&Path> {
        let root = self.config.data.root.as_deref();
        root.with_context(|| format!("--protocol {}: expected --data", self.protocol()))
    }

    /// Returns a set's images as crops of the face that is meant, each searched; `used` are those that are compared.
    ///
    /// # Errors
    /// When ranks have different images, or one cannot be read.
    fn in_photos(&self, images: &Arc<dyn Dataset>, used: &[usize], progress: &mut Progress) -> Result<Cropped> {
        let names = || used.iter().map(|image| output::title(images.as_ref(), *image) + "\n").collect::<String>();
        if !self.machine.ranks().is_single() {
            self.machine.ranks().agree("images", &names())?;
        }
        in_photos(images, used, self.cropper, self.args.unusable, |done| {
            self.end_if_interrupted();
            progress.count("crop", "images read", done, used.len());
        })
    }

    /// Shows the number of images embedded.
    fn show(&self, progress: &mut Progress, done: usize, total: usize) {
        self.end_if_interrupted();
        progress.show(Event::Embedded { done, total });
    }

    /// Ends the process if the user wants it to stop: an evaluation has nothing to go on with.
    fn end_if_interrupted(&self) {
        if self.stop.load(Ordering::Relaxed) {
            self.outputs.discard();
            tell(format_args!("stopped, as requested; nothing is written"));
            std::process::exit(130);
        }
    }

    /// Returns the protocol's name.
    fn protocol(&self) -> String {
        self.args.protocol.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Creates and returns the folder for scores, if they are kept.
    fn scores_folder(&self) -> Result<Option<PathBuf>> {
        let Outputs { report, scores } = self.outputs;
        let scores = scores.as_ref().map(|scores| scores.path().to_owned());
        let folder = scores.or_else(|| Some(report.as_ref()?.path().join(SCORES)));
        if let Some(folder) = &folder {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        Ok(folder)
    }
}
