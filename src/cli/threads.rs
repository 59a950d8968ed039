//! `--threads` and `--vectors`.

use anyhow::Result;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::launch::num_on_machine;
use super::tell;
use crate::vectors::{self, Vectors};
use crate::workers;

/// Times the number of cores from which on a number of threads looks like a mistake.
const MANY: usize = 2;

/// Flags for the threads and the vector instructions of computations.
#[derive(Args, Debug)]
pub(super) struct ThreadsArgs {
    /// Number of compute threads, 1 to 1024 [default: all cores, or this rank's share of them]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Widest vector instructions to use, for comparisons [default: the widest of this machine]
    #[arg(long, value_parser = vectors_parser())]
    vectors: Option<Vectors>,
}

fn vectors_parser() -> impl TypedValueParser<Value = Vectors> {
    let is = |name: &str| Vectors::ALL.into_iter().find(|vectors| vectors.name() == name);
    PossibleValuesParser::new(Vectors::ALL.map(Vectors::name)).try_map(move |name| is(&name).ok_or("no such vectors"))
}

impl ThreadsArgs {
    /// Starts the global thread pool of one of several processes on this machine. Call it once, before any computation.
    pub(super) fn start_on_ranks(&self) -> Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let share = u16::try_from((cores / num_on_machine()).max(1)).ok();
        self.begin(self.threads.or(share.filter(|_| num_on_machine() > 1)))
    }

    /// Starts the global thread pool. Call it once, before any computation.
    pub(super) fn start(&self) -> Result<()> {
        self.begin(self.threads)
    }

    fn begin(&self, threads: Option<u16>) -> Result<()> {
        if let Some(widest) = self.vectors {
            vectors::limit(widest)?;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if let Some(threads) = threads.filter(|&threads| usize::from(threads) > MANY * cores) {
            tell(format_args!("--threads {threads}: there are {cores} cores, and more threads than that are slower"));
        }
        Ok(workers::pool(threads.unwrap_or(0).into()).build_global()?)
    }
}
