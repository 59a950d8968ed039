//! A command on several ranks.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Result;

use super::launch::num_launched;
use super::{IS_SILENT, told};
use crate::dist::Ranks;

/// Time that the first rank has to tidy up, such as the folder of a training that did not begin, before another one's end
/// makes the launcher end it.
const TIME_TO_TIDY_UP: Duration = Duration::from_secs(1);

/// Does a command's work on the ranks that this process is one of. If it fails on this rank, the process ends at once:
/// an orderly end would wait for the others, which wait for this one. Its launcher then ends them.
pub(super) fn run(work: impl FnOnce(&Ranks) -> Result<()>) -> Result<()> {
    let ranks = Ranks::launched(num_launched())?;
    IS_SILENT.store(!ranks.is_first(), Ordering::Relaxed);
    match work(&ranks) {
        // All ranks stop after the same step.
        Err(error) if !ranks.is_single() && !is_stopped(&error) => {
            let code = told(&error.context(format!("rank {}", ranks.rank())));
            if !ranks.is_first() {
                std::thread::sleep(TIME_TO_TIDY_UP);
            }
            std::process::exit(code.into());
        }
        done => done,
    }
}

fn is_stopped(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(crate::Error::Stopped { .. }))
}
