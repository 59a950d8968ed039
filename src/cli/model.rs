//! Models as users name them: a path, `hf://owner/repo/file`, or a short name.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::models::{Loaded, open_model};
use crate::preprocessing::Channels;
use crate::weights::{DATASET_SCHEME, Hub, HubConfig, ModelRef};

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
    /// For commands about data sets, which have no model.
    pub(super) fn of_data(offline: bool) -> Self {
        Self { offline, ..Self::default() }
    }

    /// Returns the file of a model, downloaded if need be.
    pub(super) fn fetch(&self, reference: &ModelRef) -> Result<PathBuf> {
        let bar = bar(&reference.to_string());
        let path = self.hub().resolve(reference, &mut |done, total| show(&bar, done, total));
        bar.finish_and_clear();
        Ok(path?)
    }

    /// Returns a model with what was found while it was loaded.
    pub(super) fn load(&self, name: &str) -> Result<Loaded> {
        let bar = bar(name);
        let loaded = open_model(name, &self.hub(), &mut |done, total| show(&bar, done, total));
        bar.finish_and_clear();
        let mut loaded = loaded?;
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

    /// Returns where a data set is, downloaded if it is one of the hub's.
    pub(super) fn dataset(&self, path: &Path) -> Result<PathBuf> {
        let Some(reference) = path.to_str().filter(|text| text.starts_with(DATASET_SCHEME)) else {
            return Ok(path.to_owned());
        };
        let folder = self.hub().fetch_dataset(reference)?;
        eprintln!("{reference}: {}", folder.display());
        Ok(folder)
    }

    fn hub(&self) -> Hub {
        // The variables that Python's huggingface_hub reads too.
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let is_true = |value: String| matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        Hub::new(HubConfig {
            endpoint: var("HF_ENDPOINT"),
            token: var("HF_TOKEN"),
            offline: self.offline || var("HF_HUB_OFFLINE").is_some_and(is_true),
            cache: None,
        })
    }
}

/// A bar in bytes, not drawn before there are some.
fn bar(name: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(name.to_owned());
    bar
}

fn show(bar: &ProgressBar, done: u64, total: u64) {
    bar.set_length(total);
    bar.set_position(done);
}
