//! Parallel loops that are compiled once for many callers. rayon compiles its machinery anew for every closure, which
//! came to a fifth of this crate's code; behind a pointer to the closure it is compiled once for each kind of iterator.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

/// `for_each` by a pointer to the closure.
pub(crate) trait Each: ParallelIterator {
    /// Calls `f` with every item, in parallel.
    fn each(self, f: &(dyn Fn(Self::Item) + Sync)) {
        self.for_each(f);
    }
}

impl<I: ParallelIterator> Each for I {}

/// Returns `f(0)` to `f(num - 1)`, computed in parallel.
pub(crate) fn map<T: Send>(num: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let results: Vec<Mutex<Option<T>>> = (0..num).map(|_| Mutex::new(None)).collect();
    (0..num).into_par_iter().each(&|i| {
        let result = f(i);
        *results[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    });
    let result = |slot: Mutex<Option<T>>| slot.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.into_iter().map(|slot| result(slot).expect("each was computed")).collect()
}

/// Returns `f(0)` to `f(num - 1)`, computed in parallel, or the first error in this order. After an error, calls that
/// have not begun are left out.
pub(crate) fn try_map<T: Send, E: Send>(num: usize, f: impl Fn(usize) -> Result<T, E> + Sync) -> Result<Vec<T>, E> {
    let has_failed = AtomicBool::new(false);
    let results = map(num, |i| {
        if has_failed.load(Ordering::Relaxed) {
            return None;
        }
        let result = f(i);
        has_failed.fetch_or(result.is_err(), Ordering::Relaxed);
        Some(result)
    });
    results.into_iter().flatten().collect()
}

/// Returns `f` that tells `progress`, after each call, how many calls have ended so far: for [`map`] and [`try_map`].
pub(crate) fn counted<T>(
    f: impl Fn(usize) -> T + Sync,
    progress: impl FnMut(usize) + Send,
) -> impl Fn(usize) -> T + Sync {
    let state = Mutex::new((0, progress));
    move |i| {
        let result = f(i);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += 1;
        let num = state.0;
        (state.1)(num);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order() {
        assert_eq!(map(1000, |i| i * i), (0..1000).map(|i| i * i).collect::<Vec<_>>());
        assert!(map(0, |i| i).is_empty());
        assert_eq!(try_map(1000, Ok::<_, ()>).unwrap().len(), 1000);
    }

    #[test]
    fn calls_are_counted_one_by_one() {
        let mut seen = Vec::new();
        assert_eq!(map(100, counted(|i| 2 * i, |num| seen.push(num))), (0..100).map(|i| 2 * i).collect::<Vec<_>>());
        assert_eq!(seen, (1..=100).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_error_is_returned() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        pool.install(|| assert_eq!(try_map(10, |i| if i % 4 == 3 { Err(i) } else { Ok(i) }), Err(3)));
        assert!(try_map(1000, |i| if i % 4 == 3 { Err(i) } else { Ok(i) }).is_err_and(|i| i % 4 == 3));
    }
}
