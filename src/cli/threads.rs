//! `--threads`.

use anyhow::Result;
use clap::Args;

use crate::workers;

/// How many threads compute.
#[derive(Args, Debug)]
pub(super) struct ThreadsArgs {
    /// Threads of the computation [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ThreadsArgs {
    /// Starts them; once in a process, before anything is computed.
    pub(super) fn start(&self) -> Result<()> {
        Ok(workers::pool(self.threads.unwrap_or(0).into()).build_global()?)
    }
}
