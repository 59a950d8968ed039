//! Models as users name them: a path, `hf://owner/repo/file`, or a short name.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::models::{Loaded, load_model};
use crate::weights::{Hub, HubConfig, ModelRef};

/// How models are found that are not files.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct HubArgs {
    /// Takes models of the Hugging Face hub from the cache only; also HF_HUB_OFFLINE=1
    #[arg(long)]
    offline: bool,
}

impl HubArgs {
    /// Returns the file of a model, downloaded if need be.
    pub(super) fn fetch(&self, reference: &ModelRef) -> Result<PathBuf> {
        let bar = ProgressBar::new(0);
        if let Ok(style) =
            ProgressStyle::with_template("{prefix} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(reference.to_string());
        let path = Hub::new(self.config()).resolve(reference, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        Ok(path?)
    }

    /// Returns a model with what was found while it was loaded.
    pub(super) fn load(&self, name: &str) -> Result<Loaded> {
        let reference = ModelRef::parse(name)?;
        let stated = match &reference {
            ModelRef::Named(entry) => Some(&entry.preprocessing),
            _ => None,
        };
        let loaded = load_model(&self.fetch(&reference)?, stated);
        match reference {
            // The error names the file.
            ModelRef::Path(_) => Ok(loaded?),
            _ => loaded.with_context(|| name.to_owned()),
        }
    }

    /// As [`Self::load`], and prints the notes on stderr.
    pub(super) fn load_with_notes(&self, name: &str) -> Result<Loaded> {
        let loaded = self.load(name)?;
        loaded.notes.iter().for_each(|note| eprintln!("{name}: {note}"));
        Ok(loaded)
    }

    /// The settings of the hub's clients, from the variables that Python's client reads too.
    fn config(&self) -> HubConfig {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let is_true = |value: &String| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        HubConfig {
            endpoint: var("HF_ENDPOINT"),
            token: var("HF_TOKEN"),
            offline: self.offline || var("HF_HUB_OFFLINE").as_ref().is_some_and(is_true),
            ..HubConfig::default()
        }
    }
}
