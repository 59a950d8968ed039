//! Memory that kernels keep from one to the next: fresh pages cost more than what is done on them.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

/// Elements from which memory is one worker's for another: what the workers share is asked for by whichever has the kernel to carry out,
/// and each would come to hold as much.
const LARGE: usize = 1 << 18;

thread_local! {
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}
static LARGE_KEPT: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Calls `f` with `len` elements of any value; inside, other calls get other memory.
pub(super) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let found = with_kept(len, |kept| {
        // The smallest that will do; or else the largest makes place for one that will: its values are not copied.
        let enough = (0..kept.len()).filter(|&i| kept[i].len() >= len).min_by_key(|&i| kept[i].len());
        let chosen = enough.or_else(|| (0..kept.len()).max_by_key(|&i| kept[i].len()));
        chosen.map(|i| kept.swap_remove(i)).filter(|memory| memory.len() >= len)
    });
    let mut memory = found.unwrap_or_else(|| vec![0.0; len]);
    let result = f(&mut memory[..len]);
    with_kept(len, |kept| kept.push(memory));
    result
}

/// Calls `f` with what is kept of such a length.
fn with_kept<R>(len: usize, f: impl FnOnce(&mut Vec<Vec<f32>>) -> R) -> R {
    if len < LARGE {
        return KEPT.with_borrow_mut(f);
    }
    f(&mut LARGE_KEPT.lock().unwrap_or_else(PoisonError::into_inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_inside_get_other_memory() {
        for len in [1, LARGE - 1, LARGE] {
            with_scratch(len, |outer| {
                outer.fill(1.0);
                with_scratch(len, |inner| inner.fill(2.0));
                assert!(outer.len() == len && outer.iter().all(|x| *x == 1.0));
            });
        }
    }
}
