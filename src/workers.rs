//! The threads that compute.

use rayon::ThreadPoolBuilder;

/// A pool of `threads` workers, 0 for one per CPU; `build_global` makes it the one that this crate computes with.
///
/// Where there is a worker for each CPU that the process may run on, each is bound to its own: the parallel loops of one
/// image last microseconds, and a scheduler that wakes two workers on one CPU may leave them there for hundreds of loops.
/// Fewer workers are left to the scheduler: processes beside each other would all take the same CPUs.
///
/// A thread that is started from a bound worker runs on that worker's CPU.
#[must_use]
pub fn pool(threads: usize) -> ThreadPoolBuilder {
    let cpus = core_affinity::get_core_ids().unwrap_or_default();
    ThreadPoolBuilder::new().num_threads(threads).start_handler(move |worker| {
        if rayon::current_num_threads() == cpus.len() {
            // Where the system refuses, the scheduler goes on deciding.
            core_affinity::set_for_current(cpus[worker]);
        }
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The CPUs that each worker may run on.
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
