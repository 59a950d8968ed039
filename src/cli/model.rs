//! Models as users name them: a path, `hf://owner/repo/file`, or a short name.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::models::{Loaded, load_model};
use crate::preprocessing::Channels;
use crate::weights::{Hub, HubConfig, ModelRef};

/// How models are found that are not files, and what is known of them that no file says.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct HubArgs {
    /// Takes models of the Hugging Face hub from the cache only; also HF_HUB_OFFLINE=1
    #[arg(long)]
    offline: bool,
    /// Gives the model BGR images, whatever its file says; for the original AdaFace files
    #[arg(long)]
    bgr: bool,
    /// What is taken from each pixel value, 0 to 255, whatever the model's file says
    #[arg(long, value_name = "X")]
    mean: Option<f64>,
    /// What the difference is divided by, whatever the model's file says
    #[arg(long, value_name = "X")]
    std: Option<f64>,
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
        let entry = reference.entry();
        let loaded = load_model(&self.fetch(&reference)?, entry.map(|e| &e.preprocessing));
        let mut loaded = match reference {
            // The error names the file.
            ModelRef::Path(_) => loaded?,
            _ => loaded.with_context(|| name.to_owned())?,
        };
        if let Some(entry) = entry {
            let config = loaded.model.config();
            let expected = (entry.arch.as_str(), entry.embedding_size, entry.input_size);
            let found = (config.arch.name(), config.embedding_size, config.input_size);
            if expected != found {
                bail!("{name}: expected (network, embedding, input) {expected:?} as in the manifest, found {found:?}");
            }
        }
        if self.bgr || self.mean.is_some() || self.std.is_some() {
            let mut preprocessing = loaded.model.preprocessing().clone();
            if self.bgr {
                preprocessing.channels = Channels::Bgr;
            }
            preprocessing.mean = self.mean.unwrap_or(preprocessing.mean);
            preprocessing.std = self.std.unwrap_or(preprocessing.std);
            preprocessing.validate()?;
            loaded.notes.push(format!("preprocessing as the flags say: {preprocessing}"));
            loaded.model = loaded.model.with_preprocessing(preprocessing);
        }
        Ok(loaded)
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
