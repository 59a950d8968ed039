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
use crate::data::{Source, open_source};

/// What to do with a data set.
#[derive(Args, Debug)]
pub struct DataArgs {
    #[command(subcommand)]
    command: DataCommand,
    /// Takes data sets of the Hugging Face hub (hf://datasets/owner/name) from the cache only; also HF_HUB_OFFLINE=1
    #[arg(long, global = true)]
    offline: bool,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    /// Shows what a data set is: format, images, people, how many images people have
    Info(info::InfoArgs),
    /// Writes a data set in another format; images are copied as they are stored
    Convert(convert::ConvertArgs),
    /// Draws pairs of images to test on
    Pairs(pairs::PairsArgs),
    /// Looks for broken images, duplicates and misaligned crops; exits with 1 if it finds something
    Check(check::CheckArgs),
    /// Draws a picture of people and their images
    ContactSheet(sheet::SheetArgs),
    /// Writes the index of a RecordIO file anew
    Index(index::IndexArgs),
}

impl DataArgs {
    /// Does it.
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

/// Opens a data set and says on stderr what it is.
fn open(path: &Path, hub: &HubArgs) -> Result<Source> {
    let source = open_source(&hub.dataset(path)?)?;
    eprintln!("{source}");
    Ok(source)
}
