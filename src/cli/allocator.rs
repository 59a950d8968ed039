//! Keeps freed memory in the process. A training step allocates and frees every activation; by default glibc maps and
//! unmaps each large one, and the page faults of that took 30 % of the processor time of `examples/train`.

/// Tells glibc's allocator to reuse memory instead of returning it; does nothing elsewhere. Call it first.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, -1)] {
        // SAFETY: `mallopt` takes two integers; nothing else runs yet. If it refuses, allocation is only slower.
        unsafe { libc::mallopt(option, value) };
    }
}
