//! Loops that the compiler vectorises for the widest vector instructions of the machine.

use pulp::{NullaryFnOnce, Simd, WithSimd};

use crate::vectors;

/// Runs `f`, compiled for the widest vectors that this machine has: AVX-512, AVX2 or the target's baseline. Sums keep
/// their order, so the result has the same bits with each.
///
/// A function that `f` calls uses these vectors only if it is inlined.
#[inline(always)]
pub(super) fn simd<R>(f: impl FnOnce() -> R) -> R {
    vectors::arch().dispatch(Inlined(f))
}

/// A closure that is compiled, with everything inlined into it, for the vectors of the machine.
pub(super) struct Inlined<F>(pub F);

impl<R, F: FnOnce() -> R> NullaryFnOnce for Inlined<F> {
    type Output = R;

    #[inline(always)]
    fn call(self) -> R {
        (self.0)()
    }
}

/// Runs a kernel with the vectors of the machine.
///
/// A kernel is a struct of its arguments whose `with_simd` is `inline(always)`: it is compiled for each kind of
/// vectors, together with everything in it that is `inline(always)`. Closures in its place would not do: the compiler
/// is free not to inline them, and then compiles them without the machine's vectors, forty times slower.
pub(super) fn dispatch(kernel: impl WithSimd<Output = ()>) {
    vectors::arch().dispatch(kernel);
}

/// Runs a kernel inside another one, as a function of its own with the same vectors.
#[inline(always)]
pub(super) fn vectorize<S: Simd>(simd: S, kernel: impl WithSimd<Output = ()>) {
    struct Vectorized<S, K> {
        simd: S,
        kernel: K,
    }

    impl<S: Simd, K: WithSimd<Output = ()>> NullaryFnOnce for Vectorized<S, K> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            self.kernel.with_simd(self.simd);
        }
    }

    simd.vectorize(Vectorized { simd, kernel });
}

/// Runs `$vector` at the start of each full vector of a row of `$len` elements, and `$scalar` for each element left
/// over.
macro_rules! for_lanes {
    ($len:expr, $S:ident, |$at:ident| $vector:block, |$i:ident| $scalar:block) => {
        let mut $at = 0;
        while $at + $S::F32_LANES <= $len {
            $vector
            $at += $S::F32_LANES;
        }
        for $i in $at..$len {
            $scalar
        }
    };
}
pub(super) use for_lanes;
