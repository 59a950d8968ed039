//! Flags that locate and configure a model given as a path, `hf://owner/repo/file` or a short name.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::tell;
use crate::models::{Loaded, open_model};
use crate::preprocessing::Channels;
use crate::weights::{DATASET_SCHEME, Hub, HubConfig, ModelRef, WeightsFile};

/// Flags for hub access and for overriding a model's preprocessing.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct HubArgs {
    /// Use only cached files of the Hugging Face hub; same as HF_HUB_OFFLINE=1
    #[arg(long)]
    offline: bool,
    /// Feed images in BGR order, overriding every model file given; for the original AdaFace files
    #[arg(long)]
    bgr: bool,
    /// Mean subtracted from each pixel value (0 to 255), such as 127.5, overriding every model file given
    #[arg(long, value_name = "X")]
    mean: Option<f64>,
    /// Divisor applied after subtracting the mean, such as 127.5, overriding every model file given
    #[arg(long, value_name = "X")]
    std: Option<f64>,
    /// Name of the output that is the embedding, for ONNX networks with several (feature any-onnx)
    #[arg(long, value_name = "NAME")]
    embedding_output: Option<String>,
}

impl HubArgs {
    /// Returns flags for the `data` commands, which have no model.
    pub(super) fn of_data(offline: bool) -> Self {
        Self { offline, ..Self::default() }
    }

    /// Returns a model's file, which is downloaded if it is not cached.
    pub(super) fn fetch(&self, reference: &ModelRef) -> crate::Result<WeightsFile> {
        if !matches!(reference, ModelRef::Path(_)) {
            self.say_cache();
        }
        let bar = bar(&reference.to_string());
        let file = self.hub().resolve(reference, &mut |done, total| show(&bar, done, total));
        bar.finish_and_clear();
        file
    }

    /// Returns a model's file if it was downloaded earlier.
    pub(super) fn cached(&self, reference: &ModelRef) -> Option<WeightsFile> {
        Self { offline: true, ..self.clone() }.hub().resolve(reference, &mut |_, _| ()).ok()
    }

    /// Loads a model, with the notes made while it was loaded, and applies the preprocessing flags.
    pub(super) fn load(&self, name: &str) -> Result<Loaded> {
        if !Path::new(name).exists() {
            self.say_cache();
        }
        let bar = bar(name);
        let loaded =
            open_model(name, self.embedding_output.as_deref(), &self.hub(), &mut |done, total| show(&bar, done, total));
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
            loaded.notes.push(format!("preprocessing overridden by flags: {preprocessing}"));
            loaded.model = loaded.model.with_preprocessing(preprocessing);
            loaded.notes.extend(loaded.model.drop_stale()?);
        }
        Ok(loaded)
    }

    /// Like [`Self::load`], but also prints the notes on stderr.
    pub(super) fn load_with_notes(&self, name: &str) -> Result<Loaded> {
        let loaded = self.load(name)?;
        loaded.notes.iter().for_each(|note| tell(format_args!("{name}: {note}")));
        Ok(loaded)
    }

    /// Returns the path of a data set; one of the hub's is downloaded if it is not cached.
    pub(super) fn dataset(&self, path: &Path) -> Result<PathBuf> {
        let Some(reference) = path.to_str().filter(|text| text.starts_with(DATASET_SCHEME)) else {
            return Ok(path.to_owned());
        };
        self.say_cache();
        let folder = self.hub().fetch_dataset(reference)?;
        tell(format_args!("{reference}: {}", folder.display()));
        Ok(folder)
    }

    /// Says that there is no lasting place for what is downloaded, if the environment names none.
    fn say_cache(&self) {
        let places = ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME", "USERPROFILE"];
        if cfg!(feature = "hub") && places.iter().all(|name| std::env::var_os(name).is_none_or(|v| v.is_empty())) {
            tell(format_args!("HOME is not set: downloads are kept in a temporary folder; set HF_HOME to keep them"));
        }
    }

    fn hub(&self) -> Hub {
        // Python's huggingface_hub reads the same variables.
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

/// Returns a progress bar in bytes, which is drawn once there is progress.
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
