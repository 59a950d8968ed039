//! `maskinv data`.

mod check;
mod convert;
mod index;
mod info;
mod pairs;
mod sheet;

use std::path::Path;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::model::HubArgs;
use crate::cli::tell;
use crate::data::{Source, open_source};

/// Arguments of `maskinv data`.
#[derive(Args, Debug)]
pub struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
    /// Use only cached data sets of the Hugging Face hub (hf://datasets/owner/name); same as HF_HUB_OFFLINE=1
    #[arg(long, global = true)]
    offline: bool,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Show a data set's format, images, people and images per person
    Info(info::InfoArgs),
    /// Write a data set in another format; stored images are copied unchanged
    Convert(convert::ConvertArgs),
    /// Draw pairs of images for testing
    Pairs(pairs::PairsArgs),
    /// Look for broken images, duplicates and misaligned crops; exits with 1 on any warning
    Check(check::CheckArgs),
    /// Draw a picture with one row of images per person
    ContactSheet(sheet::SheetArgs),
    /// Rebuild the index of a RecordIO file
    Index(index::IndexArgs),
}

impl DataArgs {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// When the data set is missing or broken, or the output exists or cannot be written.
    pub fn run(self) -> Result<()> {
        let hub = HubArgs::of_data(self.offline);
        match self.command {
            DataCommand::Info(args) => args.run(&hub),
            DataCommand::Convert(args) => args.run(&hub),
            DataCommand::Pairs(args) => args.run(&hub),
            DataCommand::Check(args) => args.run(&hub),
            DataCommand::ContactSheet(args) => args.run(&hub),
            DataCommand::Index(args) => args.run(),
        }
    }
}

/// Opens a data set and prints its description on stderr.
fn open(path: &Path, hub: &HubArgs) -> Result<Source> {
    let source = open_source(&hub.dataset(path)?)?;
    tell(format_args!("{source}"));
    Ok(source)
}
