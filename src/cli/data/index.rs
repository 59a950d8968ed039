//! `maskinv data index`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::cli::print;
use crate::data::write_index;

/// Arguments of `maskinv data index`.
#[derive(Args, Debug)]
pub(super) struct IndexArgs {
    /// RecordIO file; NAME.idx is written beside it and replaces an existing one
    #[arg(value_name = "NAME.rec")]
    rec: PathBuf,
}

impl IndexArgs {
    pub(super) fn run(self) -> Result<()> {
        let (path, num_records) = write_index(&self.rec)?;
        print(&format!("{}: {num_records} records", path.display()))
    }
}
