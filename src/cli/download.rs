//! `maskinv download`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::model::HubArgs;
use super::print;
use crate::cli::tell;
use crate::files::write_atomic;
use crate::weights::manifest::{self, DetectorEntry, Entry};
use crate::weights::{Bundled, ModelRef, WeightsFile};

/// Arguments of `maskinv download`.
#[derive(Args, Debug)]
pub struct DownloadArgs {
    /// hf://owner/repo[@revision]/file or short name of a network or face detector from --list
    #[arg(value_name = "MODEL", required_unless_present = "list")]
    model: Option<String>,
    /// Also copy the file to FILE; the original stays in the cache shared with Python's huggingface_hub
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// List the well-known models and exit
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    hub: HubArgs,
}

impl DownloadArgs {
    /// Downloads the model's file, unless it is cached, and prints its path.
    ///
    /// # Errors
    /// When the model is unknown, the download fails, or the file's SHA-256 differs from the expected one.
    pub fn run(self) -> Result<()> {
        if self.list {
            manifest::entries().iter().try_for_each(|entry| print(&describe(entry)))?;
            manifest::detectors().iter().try_for_each(|entry| print(&describe_detector(entry)))?;
            return manifest::bundled().iter().try_for_each(|bundled| print(&describe_bundled(bundled)));
        }
        if let Some(out) = self.out.as_ref().filter(|out| out.exists()) {
            bail!("{}: exists already", out.display());
        }
        let name = self.model.unwrap_or_default();
        let reference = ModelRef::parse(&name)?;
        match &reference {
            ModelRef::Named(entry) => tell(format_args!("{name}: licence {}; {}", entry.licence, entry.source)),
            ModelRef::Detector(entry) => tell(format_args!("{name}: licence {}; {}", entry.licence, entry.source)),
            ModelRef::Path(_) | ModelRef::Hub(_) | ModelRef::Bundled(_) => {}
        }
        match (self.hub.fetch(&reference)?, &self.out) {
            (WeightsFile::Path(path), Some(out)) => {
                std::fs::copy(&path, out).with_context(|| format!("{} to {}", path.display(), out.display()))?;
                print(&out.display().to_string())
            }
            (WeightsFile::Path(path), None) => print(&path.display().to_string()),
            (WeightsFile::Bundled(bundled), Some(out)) => {
                write_atomic(out, bundled.bytes())?;
                print(&out.display().to_string())
            }
            (WeightsFile::Bundled(_), None) => {
                bail!("{name}: part of this program, nothing to download; --out FILE writes the weights to a file")
            }
        }
    }
}

fn describe_bundled(bundled: &Bundled) -> String {
    let size = bundled.bytes().len() as f64 / 1e6;
    let Bundled { name, data, licence, .. } = bundled;
    format!("{name:28} {size:.1} MB, part of this program, trained on {data}\n{:28} licence: {licence}", "")
}

fn describe_detector(entry: &DetectorEntry) -> String {
    let size = entry.bytes as f64 / 1e6;
    format!("{:28} face detector, {size:.1} MB\n{:28} licence: {}", entry.name, "", entry.licence)
}

fn describe(entry: &Entry) -> String {
    let size = entry.bytes.map_or(String::new(), |bytes| format!(", {:.0} MB", bytes as f64 / 1e6));
    let lfw = entry.reported.as_ref().map_or(String::new(), |r| format!(", LFW {:.2} % (reported)", 100.0 * r.lfw));
    let seen = if entry.verified { "verified by this project" } else { "not tested by this project" };
    format!("{:28} {}{size}{lfw}, {seen}\n{:28} licence: {}", entry.name, entry.arch, "", entry.licence)
}
