//! Ctrl-C and SIGTERM during a command that must stop cleanly.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

/// Signals closer together than this count as one.
const ONE_SIGNAL: Duration = Duration::from_millis(500);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Installs a handler and returns a flag. The first signal sets the flag instead of ending the process; the second ends
/// it with exit code 130. Call it once.
pub(super) fn flag() -> Result<&'static AtomicBool> {
    let first = OnceLock::new();
    ctrlc::set_handler(move || {
        INTERRUPTED.store(true, Ordering::Relaxed);
        // `timeout` sends its signal to the process and again to its group; only a later one is impatience.
        if first.get_or_init(Instant::now).elapsed() > ONE_SIGNAL {
            std::process::exit(130);
        }
    })?;
    Ok(&INTERRUPTED)
}
