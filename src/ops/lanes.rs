//! Unchecked loads and stores of vectors of channels for kernels.

use pulp::Simd;

/// Loads the vector at `x[at..]`.
///
/// # Safety
/// `at + S::F32_LANES <= x.len()`.
#[inline(always)]
pub(in crate::ops) unsafe fn load<S: Simd>(x: &[f32], at: usize) -> S::f32s {
    debug_assert!(at + S::F32_LANES <= x.len(), "vector at {at} of {} elements", x.len());
    // SAFETY: in bounds by the contract; any bits are a vector of f32, and its alignment is not assumed.
    unsafe { x.as_ptr().add(at).cast::<S::f32s>().read_unaligned() }
}

/// Stores the vector at `x[at..]`.
///
/// # Safety
/// `at + S::F32_LANES <= x.len()`.
#[inline(always)]
pub(in crate::ops) unsafe fn store<S: Simd>(x: &mut [f32], at: usize, value: S::f32s) {
    debug_assert!(at + S::F32_LANES <= x.len(), "vector at {at} of {} elements", x.len());
    // SAFETY: as in `load`.
    unsafe { x.as_mut_ptr().add(at).cast::<S::f32s>().write_unaligned(value) }
}

/// Prefetches the memory at `at`; a hint, so any address is allowed.
#[inline(always)]
pub(in crate::ops) fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults; every x86-64 has it.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// PReLU: `value` above zero, `slope * value` elsewhere; a NaN stays NaN.
#[inline(always)]
pub(in crate::ops) fn prelu<S: Simd>(simd: S, value: S::f32s, slope: S::f32s) -> S::f32s {
    let is_above = simd.greater_than_f32s(value, simd.splat_f32s(0.0));
    simd.select_f32s(is_above, value, simd.mul_f32s(value, slope))
}
