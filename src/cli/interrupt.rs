//! Ctrl-C and SIGTERM during a command that must stop cleanly.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Result;

/// Signals closer together than this count as one.
const ONE_SIGNAL: Duration = Duration::from_millis(500);

/// Installs a handler and returns a flag. The first signal sets the flag instead of ending the process; the second ends
/// it with exit code 130. Call it once.
pub(super) fn flag() -> Result<Arc<AtomicBool>> {
    let (flag, first) = (Arc::new(AtomicBool::new(false)), OnceLock::new());
    let set = flag.clone();
    ctrlc::set_handler(move || {
        set.store(true, Ordering::Relaxed);
        // `timeout` sends its signal to the process and again to its group; only a later one is impatience.
        if first.get_or_init(Instant::now).elapsed() > ONE_SIGNAL {
            std::process::exit(130);
        }
    })?;
    Ok(flag)
}
