//! Memory that a thread keeps from one kernel to the next: fresh pages cost more than what is done on them.

use std::cell::RefCell;

thread_local! {
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with `len` elements of any value; inside, other calls get other memory.
pub(super) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = KEPT.with_borrow_mut(|kept| {
        // The smallest that will do; or else the largest makes place for one that will: its values are not copied.
        let enough = (0..kept.len()).filter(|&i| kept[i].len() >= len).min_by_key(|&i| kept[i].len());
        let chosen = enough.or_else(|| (0..kept.len()).max_by_key(|&i| kept[i].len()));
        chosen.map(|i| kept.swap_remove(i)).filter(|memory| memory.len() >= len)
    });
    let memory = memory.get_or_insert_with(|| vec![0.0; len]);
    let result = f(&mut memory[..len]);
    let memory = std::mem::take(memory);
    KEPT.with_borrow_mut(|kept| kept.push(memory));
    result
}
