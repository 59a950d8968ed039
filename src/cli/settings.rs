//! The flags that `train` and `evaluate` share: where settings come from and what changes them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use super::device::DeviceArgs;
use super::model::HubArgs;
use super::threads::ThreadsArgs;
use crate::train::{Config, preset};

/// Where settings come from, and what changes them.
#[derive(Args, Debug)]
pub(super) struct SettingsArgs {
    /// Faces: a folder of people, a .rec, .tar or .parquet file, a list of images, a folder of one of these, or hf://datasets/owner/name; with LFW's lists
    /// beside it, they say whom to train and test on; procedural faces without it
    #[arg(long, value_name = "PATH")]
    pub(super) data: Option<PathBuf>,
    /// Photos with real masks to measure on as well, as they are: a CSV of two files and `same`, 1 or 0, a row
    #[arg(long, value_name = "CSV")]
    real_masks: Option<PathBuf>,
    /// Settings to start from; `train --list-presets` shows them [default: in `train` procedural, or lfw-small with
    /// --data; in `evaluate` those that the first model was trained with]
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    pub(super) preset: Option<String>,
    /// Settings from a TOML file, such as the config.toml of a training, instead of a preset
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Behaves as the published code does, with its masks from this RGBA template
    #[arg(long, value_name = "TEMPLATE")]
    reference: Option<PathBuf>,
    /// Any other setting, such as model.width=0.5, or KEY=none for its default; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    pub(super) threads: ThreadsArgs,
    #[command(flatten)]
    pub(super) device: DeviceArgs,
}

impl SettingsArgs {
    /// The settings that --config or --preset name, before anything changes them.
    pub(super) fn chosen(&self) -> Result<Option<Config>> {
        Ok(match (&self.config, &self.preset) {
            (Some(path), _) => Some(Config::read(path)?),
            (None, Some(name)) => Some(preset(name)?),
            (None, None) => None,
        })
    }

    /// What was asked for, or what `model` was trained with: its people were kept apart from the test's.
    pub(super) fn chosen_or_beside(&self, model: &str) -> Result<Config> {
        if let Some(config) = self.chosen()? {
            return Ok(config);
        }
        // runs/NAME/ARM, or a file in it.
        match Path::new(model).ancestors().take(3).map(|p| p.join("config.toml")).find(|p| p.is_file()) {
            Some(path) => {
                eprintln!("settings of {}", path.display());
                Ok(Config::read(&path)?)
            }
            None => {
                eprintln!("{model}: no config.toml beside it; default settings");
                Ok(Config::default())
            }
        }
    }

    /// Changes `config` as the flags say, `--set` last, and checks the outcome.
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
        // Last: what the settings name may be on the hub too.
        config.data.root = config.data.root.take().map(|root| hub.dataset(&root)).transpose()?;
        Ok(config.validate()?)
    }
}
