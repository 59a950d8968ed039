//! `--threads`.

use anyhow::Result;
use clap::Args;

use crate::workers;

/// Flag for the number of compute threads.
#[derive(Args, Debug)]
pub(super) struct ThreadsArgs {
    /// Number of compute threads, 1 to 1024 [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ThreadsArgs {
    /// Starts the global thread pool. Call it once, before any computation.
    pub(super) fn start(&self) -> Result<()> {
        Ok(workers::pool(self.threads.unwrap_or(0).into()).build_global()?)
    }
}
