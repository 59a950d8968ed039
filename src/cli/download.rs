//! `maskinv download`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::model::HubArgs;
use super::print;
use crate::weights::ModelRef;
use crate::weights::manifest::{self, Entry};

/// Which models.
#[derive(Args, Debug)]
pub struct DownloadArgs {
    /// hf://owner/repo[@revision]/file, or a short name from --list
    #[arg(value_name = "MODEL", required_unless_present = "list")]
    model: Option<String>,
    /// Copies the file there as well; it stays in the cache that Python's huggingface_hub uses too
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Prints the well-known models and ends
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    hub: HubArgs,
}

impl DownloadArgs {
    /// Downloads the model's file, unless it is in the cache, and prints its path.
    ///
    /// # Errors
    /// When there is no such model or no network, or the file is not the one that was seen before.
    pub fn run(self) -> Result<()> {
        if self.list {
            return manifest::entries().iter().try_for_each(|entry| print(&describe(entry)));
        }
        if let Some(out) = self.out.as_ref().filter(|out| out.exists()) {
            bail!("{}: exists", out.display());
        }
        let name = self.model.unwrap_or_default();
        let reference = ModelRef::parse(&name)?;
        if let ModelRef::Named(entry) = &reference {
            eprintln!("{name}: licence {}; {}", entry.licence, entry.source);
        }
        let path = self.hub.fetch(&reference)?;
        match &self.out {
            Some(out) => {
                std::fs::copy(&path, out).with_context(|| format!("{} to {}", path.display(), out.display()))?;
                print(&out.display().to_string())
            }
            None => print(&path.display().to_string()),
        }
    }
}

fn describe(entry: &Entry) -> String {
    let size = entry.bytes.map_or(String::new(), |bytes| format!(", {:.0} MB", bytes as f64 / 1e6));
    let lfw = entry.reported.as_ref().map_or(String::new(), |r| format!(", LFW {:.2} % as reported", 100.0 * r.lfw));
    let seen = if entry.verified { "verified by us" } else { "not tried by us" };
    format!("{:28} {}{size}{lfw}, {seen}\n{:28} licence: {}", entry.name, entry.arch, "", entry.licence)
}
