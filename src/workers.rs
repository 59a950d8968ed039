//! The worker threads.

use rayon::ThreadPoolBuilder;

/// Builder of a pool of `threads` workers, 0 for one per CPU; `build_global` makes it the pool that this crate uses.
///
/// If there is one worker for each CPU that the process may run on, each worker is pinned to a CPU of its own: the
/// parallel loops for a single image last microseconds, and a scheduler that wakes two workers on one CPU may leave
/// them there for hundreds of loops. With any other number of workers none is pinned, because several processes side by
/// side would all pin theirs to the same CPUs.
///
/// A thread started from a pinned worker runs on that worker's CPU.
#[must_use]
pub fn pool(threads: usize) -> ThreadPoolBuilder {
    let cpus = core_affinity::get_core_ids().unwrap_or_default();
    ThreadPoolBuilder::new().num_threads(threads).start_handler(move |worker| {
        if rayon::current_num_threads() == cpus.len() {
            // If the system refuses, the worker stays unpinned.
            core_affinity::set_for_current(cpus[worker]);
        }
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// CPUs that each worker may run on.
    fn cpus_of(threads: usize) -> Vec<Vec<usize>> {
        let pool = pool(threads).build().expect("a pool");
        pool.broadcast(|_| core_affinity::get_core_ids().expect("a mask").iter().map(|cpu| cpu.id).collect())
    }

    #[test]
    fn one_worker_per_cpu_is_bound_and_any_other_number_is_free() {
        let all: Vec<usize> = core_affinity::get_core_ids().expect("a mask").iter().map(|cpu| cpu.id).collect();
        assert_eq!(cpus_of(all.len()).concat(), all);
        assert!(cpus_of(all.len() + 1).iter().all(|cpus| *cpus == all));
    }
}
