//! The widest vector instructions of the machine, for loops that the compiler vectorises.

/// Runs `f`, compiled for AVX-512, AVX2 or the least that the target has, whichever this machine knows. Sums keep
/// their order, so results are the same bits on all.
///
/// What `f` calls is compiled anew only if it is inlined.
#[inline(always)]
pub(super) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(Inlined(f))
}

/// A closure that is compiled for the vectors of the machine with everything that is inlined into it.
pub(super) struct Inlined<F>(pub F);

impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Inlined<F> {
    type Output = R;

    #[inline(always)]
    fn call(self) -> R {
        (self.0)()
    }
}
