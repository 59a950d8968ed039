//! Ctrl-C and SIGTERM during a command that must stop cleanly.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Installs a handler and returns a flag. The first signal sets the flag instead of ending the process; the second ends
/// it with exit code 130. Call it once.
pub(super) fn flag() -> Result<&'static AtomicBool> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })?;
    Ok(&INTERRUPTED)
}
