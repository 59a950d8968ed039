//! Memory that a thread keeps from one kernel to the next: fresh pages cost more than what is done on them.

use std::cell::Cell;

thread_local! {
    static KEPT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `f` with `len` elements of any value; inside, other calls get other memory.
pub(super) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = KEPT.take();
    if memory.len() < len {
        // Nothing of the old values is needed: no copy.
        memory = vec![0.0; len];
    }
    let result = f(&mut memory[..len]);
    KEPT.set(memory);
    result
}
