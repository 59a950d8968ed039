//! Loops that the compiler vectorises for the widest vector instructions of the machine.

/// Runs `f`, compiled for the widest vectors that this machine has: AVX-512, AVX2 or the target's baseline. Sums keep
/// their order, so the result has the same bits with each.
///
/// A function that `f` calls uses these vectors only if it is inlined.
#[inline(always)]
pub(super) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(Inlined(f))
}

/// A closure that is compiled, with everything inlined into it, for the vectors of the machine.
pub(super) struct Inlined<F>(pub F);

impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Inlined<F> {
    type Output = R;

    #[inline(always)]
    fn call(self) -> R {
        (self.0)()
    }
}

/// Defines a function that is compiled for the vectors of the machine, together with everything in it that is
/// `inline(always)`. The lifetime `'a` is that of all its borrowed arguments.
///
/// The compiler is free not to inline a closure given to `vectorize`, and then compiles it without the machine's
/// vectors, forty times slower. A trait method can be `inline(always)`, hence a type for each kernel.
macro_rules! kernel {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident<$S:ident $(, const $N:ident: usize)*>(
        $simd:ident, $($argument:ident: $type:ty),* $(,)?
    ) $body:block) => {
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments, reason = "sizes and slices, which every kernel names")]
        #[inline(always)]
        $visibility fn $name<'a, $S: pulp::Simd $(, const $N: usize)*>($simd: $S, $($argument: $type),*) {
            struct Kernel<'a, $S $(, const $N: usize)*> {
                $simd: $S,
                $($argument: $type,)*
                borrowed: std::marker::PhantomData<&'a ()>,
            }

            impl<'a, $S: pulp::Simd $(, const $N: usize)*> pulp::NullaryFnOnce for Kernel<'a, $S $(, $N)*> {
                type Output = ();

                #[inline(always)]
                fn call(self) {
                    let Self { $simd, $($argument,)* borrowed: _ } = self;
                    $body
                }
            }

            $simd.vectorize(Kernel::<'a, $S $(, $N)*> { $simd, $($argument,)* borrowed: std::marker::PhantomData });
        }
    };
}
pub(super) use kernel;

/// Like [`kernel`], for a function that detects the machine's vectors itself.
macro_rules! dispatched {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident<$S:ident>(
        $simd:ident, $($argument:ident: $type:ty),* $(,)?
    ) $body:block) => {
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments, reason = "sizes and slices, which every kernel names")]
        $visibility fn $name<'a>($($argument: $type),*) {
            struct Kernel<'a> {
                $($argument: $type,)*
                borrowed: std::marker::PhantomData<&'a ()>,
            }

            impl<'a> pulp::WithSimd for Kernel<'a> {
                type Output = ();

                #[inline(always)]
                fn with_simd<$S: pulp::Simd>(self, $simd: $S) {
                    let Self { $($argument,)* borrowed: _ } = self;
                    $body
                }
            }

            pulp::Arch::new().dispatch(Kernel { $($argument,)* borrowed: std::marker::PhantomData });
        }
    };
}
pub(super) use dispatched;

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
