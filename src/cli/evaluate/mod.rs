//! `maskinv evaluate`.

mod all_pairs;
mod output;
mod pairs;
mod provenance;
mod templates;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::bootstrap::BootstrapArgs;
use super::model::HubArgs;
use super::settings::SettingsArgs;
use crate::machine::Machine;
use crate::models::Model;
use crate::report::refuse_to_replace;
use crate::train::Config;

/// What to measure, and on what.
#[derive(Args, Debug)]
pub struct EvaluateArgs {
    /// Checkpoints in any format (see `maskinv info`), folders of trainings, hf://owner/repo/file or short names
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
    /// Which images are compared with which
    #[arg(long, value_enum, default_value_t = Protocol::Pairs, value_name = "NAME")]
    protocol: Protocol,
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    hub: HubArgs,
    /// A list of pairs of images in --data, in LFW's or MFR2's format
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// For all-pairs: who wears a mask on the images, a CSV with the columns file (PERSON/IMAGE) and masked (1 or 0); without it masks
    /// are drawn
    #[arg(long, value_name = "CSV")]
    worn: Option<PathBuf>,
    /// Decides the masks that test images wear
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Writes every score into this folder, a CSV for each model and setting, that `maskinv metrics` reads
    #[arg(long, value_name = "DIR")]
    scores: Option<PathBuf>,
    /// Writes report.json, report.md and report.html, a page with curves, into this folder, and every score beside them
    #[arg(long, value_name = "DIR", conflicts_with = "scores")]
    report: Option<PathBuf>,
    /// Shows the faces of the N hardest pairs of each kind in the report's page
    #[arg(long, value_name = "N", default_value_t = 0, requires = "report")]
    faces: usize,
    #[command(flatten)]
    bootstrap: BootstrapArgs,
    /// Prints all figures as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Protocol {
    /// The pairs of a list, a verification file (.bin), LFW's folds or drawn ones: U-U, U-M and M-M on the same pairs
    Pairs,
    /// Every unmasked image with every masked one, and each of both among themselves, as insightface's MFR challenge
    AllPairs,
    /// Templates of IJB-B or IJB-C, compared by a list and searched in galleries, as insightface's scripts
    Ijb,
}

/// A model to measure.
struct Named {
    name: String,
    file: PathBuf,
    model: Model,
}

/// What every protocol is given.
struct Run<'a> {
    args: &'a EvaluateArgs,
    models: &'a [Named],
    config: &'a Config,
    machine: &'a Machine,
}

impl EvaluateArgs {
    /// Evaluates each model and prints a table.
    ///
    /// # Errors
    /// When a checkpoint, setting or image is wrong.
    pub fn run(self) -> Result<()> {
        self.settings.threads.start()?;
        let machine = self.settings.device.open()?;
        if let Some(folder) = &self.report {
            refuse_to_replace(folder)?;
        }
        if self.worn.is_some() && self.protocol != Protocol::AllPairs {
            bail!("--worn is for --protocol all-pairs");
        }
        let load = |name: &String| {
            let loaded = self.hub.load_with_notes(name)?;
            Ok(Named { name: name.clone(), file: loaded.path, model: loaded.model.on(&machine) })
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
        let run = Run { args: &self, models: &models, config: &config, machine: &machine };
        let output = match self.protocol {
            Protocol::Pairs => pairs::measure(&run)?,
            Protocol::AllPairs => all_pairs::measure(&run)?,
            Protocol::Ijb => templates::measure(&run)?,
        };
        output.finish(&run)
    }
}

impl Run<'_> {
    /// What `--data` names, which this protocol cannot do without.
    fn root(&self) -> Result<&Path> {
        let root = self.config.data.root.as_deref();
        root.with_context(|| format!("--protocol {}: expected --data", self.protocol()))
    }

    /// The protocol's name.
    fn protocol(&self) -> String {
        self.args.protocol.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Where scores go, if they are kept.
    fn scores_folder(&self) -> Result<Option<PathBuf>> {
        let folder = self.args.scores.clone().or_else(|| Some(self.args.report.as_ref()?.join("scores")));
        if let Some(folder) = &folder {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        Ok(folder)
    }
}
