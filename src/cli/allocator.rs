//! Keeps freed memory in the process. A training step allocates and frees every activation; by default glibc maps and
//! unmaps each large buffer, and the resulting page faults took 30 % of the CPU time of `examples/train`.

/// Tells glibc's allocator to reuse freed memory instead of returning it to the system; does nothing with other C
/// libraries. Call it before anything else.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (option, value) in [(libc::M_MMAP_MAX, 0), (libc::M_TRIM_THRESHOLD, -1)] {
        // SAFETY: `mallopt` takes two integers; nothing else runs yet. If it fails, allocation is merely slower.
        unsafe { libc::mallopt(option, value) };
    }
}
