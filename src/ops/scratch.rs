//! Scratch buffers that are reused from kernel to kernel: touching fresh pages costs more than the work done in them.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

/// Number of elements from which buffers are shared between threads. Any thread may run the kernel that needs a large
/// buffer; with buffers per thread, each thread would come to keep one.
const LARGE: usize = 1 << 18;

thread_local! {
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}
static LARGE_KEPT: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Calls `f` with a scratch buffer of `len` elements of unspecified value; nested calls get other buffers.
pub(super) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut memory = take(len);
    let result = f(&mut memory[..len]);
    keep(len, memory);
    result
}

/// Returns a buffer of `len` or more elements.
fn take(len: usize) -> Vec<f32> {
    let found = with_kept(len, |kept| {
        // The smallest that is large enough. If there is none, the largest is freed for a new one, without copying its
        // values.
        let enough = (0..kept.len()).filter(|&i| kept[i].len() >= len).min_by_key(|&i| kept[i].len());
        let chosen = enough.or_else(|| (0..kept.len()).max_by_key(|&i| kept[i].len()));
        chosen.map(|i| kept.swap_remove(i)).filter(|memory| memory.len() >= len)
    });
    found.unwrap_or_else(|| vec![0.0; len])
}

/// Keeps a buffer that was taken for `len` elements.
fn keep(len: usize, memory: Vec<f32>) {
    with_kept(len, |kept| kept.push(memory));
}

/// Calls `f` with the kept buffers for requests of `len` elements.
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
