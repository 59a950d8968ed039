//! Flags shared by `train`, `evaluate` and `calibrate`: the source of the settings and their overrides.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use super::device::DeviceArgs;
use super::model::HubArgs;
use super::threads::ThreadsArgs;
use crate::cli::tell;
use crate::train::{Config, preset};

/// Flags for the source of the settings and their overrides.
#[derive(Args, Debug)]
pub(super) struct SettingsArgs {
    /// Data set: folder of people, .rec, .tar or .parquet file, list of images, folder with any of these, or
    /// hf://datasets/owner/name (feature hub). Lists in LFW's format that belong to it define the split: people.txt
    /// and pairs.txt in its own folder, or NAME.people.txt and NAME.pairs.txt beside NAME.rec [default: procedural
    /// faces]
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<PathBuf>,
    /// CSV of pairs of photos with real masks to evaluate on as well: two columns of image files, relative to images/
    /// beside the CSV or else to its folder, and `same` (1 or 0); `data pairs` writes one
    #[arg(long, value_name = "CSV")]
    real_masks: Option<PathBuf>,
    /// Preset to start from, see `train --list-presets` [default in `train`: procedural, or lfw-small with --data;
    /// in `evaluate` and `calibrate`: the config.toml beside the first model, else the built-in settings]
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    pub(super) preset: Option<String>,
    /// TOML file of settings to use instead of a preset, such as a training's config.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Follow the published code's protocol, drawing its masks from this RGBA image of a mask (not included)
    #[arg(long, value_name = "TEMPLATE")]
    reference: Option<PathBuf>,
    /// Set any setting, such as model.width=0.5; KEY=none resets it to the built-in default (not the preset's);
    /// may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    pub(super) threads: ThreadsArgs,
    #[command(flatten)]
    pub(super) device: DeviceArgs,
}

impl SettingsArgs {
    /// Returns the settings named by `--config` or `--preset`, without overrides.
    pub(super) fn chosen(&self) -> Result<Option<Config>> {
        Ok(match (&self.config, &self.preset) {
            (Some(path), _) => Some(Config::read(path)?),
            (None, Some(name)) => Some(preset(name)?),
            (None, None) => None,
        })
    }

    /// Returns the chosen settings, or else those that `model` was trained with, which keep its training people out of
    /// the test set.
    pub(super) fn chosen_or_beside(&self, model: &str) -> Result<Config> {
        if let Some(config) = self.chosen()? {
            return Ok(config);
        }
        // `model` is runs/NAME/ARM or a file in it.
        match Path::new(model).ancestors().take(3).map(|p| p.join("config.toml")).find(|p| p.is_file()) {
            Some(path) => {
                tell(format_args!("settings from {}", path.display()));
                Ok(Config::read(&path)?)
            }
            None => {
                tell(format_args!("{model}: no config.toml beside it, using default settings"));
                Ok(Config::default())
            }
        }
    }

    /// Applies the flags to `config`, `--set` last, and validates the result.
    pub(super) fn apply(&self, config: &mut Config, hub: &HubArgs) -> Result<()> {
        if let Some(root) = &self.data {
            config.data.root = Some(root.clone());
        }
        if let Some(list) = &self.real_masks {
            config.data.real_masks = Some(list.clone());
        }
        if let Some(template) = &self.reference {
            config.use_reference_protocol(template);
        }
        for assignment in &self.set {
            config.set(assignment)?;
        }
        // Comes last, because `--set` may name a data set of the hub too.
        config.data.root = config.data.root.take().map(|root| hub.dataset(&root)).transpose()?;
        Ok(config.validate()?)
    }
}
