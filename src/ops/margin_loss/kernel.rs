//! Small matrix products in registers, f32 and f64, on panels of the class centres that stay in the cache.

use candle_core::WithDType;
use pulp::Simd;

use crate::ops::scratch;

/// Number of class centres of a panel.
pub(super) const BLOCK: usize = 128;
/// Columns of a strip: a panel of `d` rows is stored as `(BLOCK / STRIP, d, STRIP)`. A power of two that holds two
/// vectors of any machine.
pub(super) const STRIP: usize = 32;
/// Rows are computed in multiples of this.
pub(super) const ROWS: usize = 4;

/// Element type with its vectors.
pub trait Real: WithDType {
    /// A vector of the machine.
    type Vector<S: Simd>: Copy;
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// `a * b + c`
    fn mul_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
    /// `exp(x)` for `x <= 0`; NaN for NaN. In f32 the relative error is below 2e-7 down to `x = -87`, below which the
    /// result is 0.
    fn exp(x: Self) -> Self;
    /// Calls `f` with a scratch buffer of `len` elements of unspecified value.
    fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [Self]) -> R) -> R;
}

impl Real for f32 {
    type Vector<S: Simd> = S::f32s;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, x: f32) -> S::f32s {
        simd.splat_f32s(x)
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, c)
    }

    /// `2^n exp(r)` with `|r| <= ln(2) / 2`: Cody and Waite's reduction, and the polynomial of Cephes' `expf`.
    #[inline(always)]
    fn exp(x: f32) -> f32 {
        /// Adding it rounds to an integer, which is then in the low bits; subtracting it returns the integer as a
        /// float.
        const ROUND: f32 = 12_582_912.0;
        const LEAST: f32 = -87.0;
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
        let mut p = 1.987_569_1e-4;
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
            p = p * r + c;
        }
        let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
        let y = (p * r * r + r + 1.0) * power;
        if x < LEAST { 0.0 } else { y }
    }

    fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        scratch::with_scratch(len, f)
    }
}

impl Real for f64 {
    type Vector<S: Simd> = S::f64s;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, x: f64) -> S::f64s {
        simd.splat_f64s(x)
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_e_f64s(a, b, c)
    }

    #[inline(always)]
    fn exp(x: f64) -> f64 {
        x.exp()
    }

    fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f64]) -> R) -> R {
        f(&mut vec![0.0; len])
    }
}

/// Number of elements of a vector.
#[inline(always)]
const fn lanes<S: Simd, T: Real>() -> usize {
    size_of::<T::Vector<S>>() / size_of::<T>()
}

/// Rows computed at a time on machines with 32 vector registers.
const MANY: usize = 12;
/// Rows computed at a time on machines with 16.
const SOME: usize = 6;

/// Rows to compute next, [`MANY`], [`SOME`] or [`ROWS`], if an even number of at least four is left.
#[inline(always)]
const fn rows_at_once<S: Simd>(left: usize) -> usize {
    match left {
        MANY.. if S::F32_LANES >= 16 => MANY,
        // Six of eight would leave two.
        6 | 10.. if S::F32_LANES < 16 => SOME,
        _ => ROWS,
    }
}

type Sums<S, T, const R: usize> = [[<T as Real>::Vector<S>; 2]; R];

/// Adds to `sums[r]` the products `a[k * a_step[0] + r * a_step[1]] * b[k * b_step..]` for all `k < depth`.
///
/// # Safety
/// All these indices are in `a`; two vectors from each of these indices on are in `b`.
#[inline(always)]
unsafe fn multiply<S: Simd, T: Real, const R: usize>(
    simd: S,
    depth: usize,
    (a, a_step): (&[T], [usize; 2]),
    (b, b_step): (&[T], usize),
    sums: &mut Sums<S, T, R>,
) {
    for k in 0..depth {
        // SAFETY: by the contract.
        unsafe {
            let b = [load::<S, T>(b, k * b_step), load::<S, T>(b, k * b_step + lanes::<S, T>())];
            for (r, sum) in sums.iter_mut().enumerate() {
                let a = T::splat(simd, *a.get_unchecked(k * a_step[0] + r * a_step[1]));
                sum[0] = T::mul_add(simd, a, b[0], sum[0]);
                sum[1] = T::mul_add(simd, a, b[1], sum[1]);
            }
        }
    }
}

/// Writes `y = e * panel` for `rows` rows.
///
/// - `e`: `(d, stride)`, transposed
/// - `panel`: of `d` rows
/// - `y`: `(rows, BLOCK)`; `rows` is a multiple of [`ROWS`]
#[inline(always)]
pub(super) fn product<S: Simd, T: Real>(simd: S, d: usize, (e, stride): (&[T], usize), panel: &[T], y: &mut [T]) {
    let rows = y.len() / BLOCK;
    assert!(rows.is_multiple_of(ROWS) && rows <= stride, "{rows} rows");
    assert!(e.len() >= d * stride && panel.len() >= d * BLOCK, "{d} rows of a panel");
    for strip in 0..BLOCK / STRIP {
        for column in (0..STRIP).step_by(2 * lanes::<S, T>()) {
            let mut row = 0;
            while row < rows {
                let (e, b) = ((&e[row..], [stride, 1]), (&panel[strip * d * STRIP + column..], STRIP));
                let at = row * BLOCK + strip * STRIP + column;
                let step = rows_at_once::<S>(rows - row);
                // SAFETY: `row + step <= rows <= stride` and `column + 2 * lanes <= STRIP`; the assertions above.
                unsafe {
                    match step {
                        MANY => product_rows::<S, T, MANY>(simd, d, e, b, &mut y[at..]),
                        SOME => product_rows::<S, T, SOME>(simd, d, e, b, &mut y[at..]),
                        _ => product_rows::<S, T, ROWS>(simd, d, e, b, &mut y[at..]),
                    }
                }
                row += step;
            }
        }
    }
}

/// # Safety
/// Same as [`multiply`], and `y` holds `R` rows of two vectors each, [`BLOCK`] apart.
#[inline(always)]
unsafe fn product_rows<S: Simd, T: Real, const R: usize>(
    simd: S,
    depth: usize,
    a: (&[T], [usize; 2]),
    b: (&[T], usize),
    y: &mut [T],
) {
    let mut sums = [[T::splat(simd, T::zero()); 2]; R];
    // SAFETY: by the contract.
    unsafe {
        multiply::<S, T, R>(simd, depth, a, b, &mut sums);
        for (r, sum) in sums.iter().enumerate() {
            store::<S, T>(y, r * BLOCK, sum[0]);
            store::<S, T>(y, r * BLOCK + lanes::<S, T>(), sum[1]);
        }
    }
}

/// Adds `panel * g` to `y`, the transposed gradient of the embeddings.
///
/// - `panel`: of `d` rows, a multiple of [`ROWS`]
/// - `g`: `(BLOCK, stride)`, transposed; `stride` is a multiple of [`STRIP`]
/// - `y`: `(d, stride)`
#[inline(always)]
pub(super) fn add_grad_embedding<S: Simd, T: Real>(simd: S, d: usize, panel: &[T], g: &[T], y: &mut [T]) {
    let stride = g.len() / BLOCK;
    assert!(d.is_multiple_of(ROWS) && stride.is_multiple_of(STRIP), "{d} rows of {stride}");
    assert!(panel.len() >= d * BLOCK && y.len() >= d * stride, "{d} rows of a panel");
    let mut row = 0;
    while row < d {
        let step = rows_at_once::<S>(d - row);
        for column in (0..stride).step_by(2 * lanes::<S, T>()) {
            let (a, g, y) = (&panel[row * STRIP..], &g[column..], &mut y[row * stride + column..]);
            // SAFETY: `row + step <= d`, `column + 2 * lanes <= stride`; the assertions above.
            unsafe {
                match step {
                    MANY => add_grad_rows::<S, T, MANY>(simd, d, a, (g, stride), y),
                    SOME => add_grad_rows::<S, T, SOME>(simd, d, a, (g, stride), y),
                    _ => add_grad_rows::<S, T, ROWS>(simd, d, a, (g, stride), y),
                }
            }
        }
        row += step;
    }
}

/// # Safety
/// `R` rows of every strip are in `panel`, [`BLOCK`] rows of two vectors in `g`, and `R` in `y`.
#[inline(always)]
unsafe fn add_grad_rows<S: Simd, T: Real, const R: usize>(
    simd: S,
    d: usize,
    panel: &[T],
    (g, stride): (&[T], usize),
    y: &mut [T],
) {
    let mut sums = [[T::splat(simd, T::zero()); 2]; R];
    // SAFETY: by the contract.
    unsafe {
        for (r, sum) in sums.iter_mut().enumerate() {
            *sum = [load::<S, T>(y, r * stride), load::<S, T>(y, r * stride + lanes::<S, T>())];
        }
        for strip in 0..BLOCK / STRIP {
            let (a, g) = ((&panel[strip * d * STRIP..], [1, STRIP]), (&g[strip * STRIP * stride..], stride));
            multiply::<S, T, R>(simd, STRIP, a, g, &mut sums);
        }
        for (r, sum) in sums.iter().enumerate() {
            store::<S, T>(y, r * stride, sum[0]);
            store::<S, T>(y, r * stride + lanes::<S, T>(), sum[1]);
        }
    }
}

/// Computes `e^T * g - panel * t`, the gradient of the panel's centres, row by row.
///
/// - `e`: `(d, stride)`, transposed; `d` is a multiple of [`ROWS`]
/// - `g`: `(BLOCK / STRIP, n, STRIP)`
/// - `t`: `(BLOCK)`
/// - `emit`: called with the index and the elements of each row
#[inline(always)]
pub(super) fn grad_kernel<S: Simd, T: Real>(
    simd: S,
    d: usize,
    (e, stride): (&[T], usize),
    (g, t): (&[T], &[T; BLOCK]),
    panel: &[T],
    mut emit: impl FnMut(usize, &[T; BLOCK]),
) {
    let n = g.len() / BLOCK;
    assert!(d.is_multiple_of(ROWS) && n <= stride && e.len() >= d * stride, "{n} rows of {d}");
    assert!(panel.len() >= d * BLOCK, "{d} rows of a panel");
    let mut y = [[T::zero(); BLOCK]; MANY];
    let mut row = 0;
    while row < d {
        let step = rows_at_once::<S>(d - row);
        for column in (0..BLOCK).step_by(2 * lanes::<S, T>()) {
            // Rows of `n` numbers, and strips: with longer steps, all would fall into a few sets of the first cache.
            let strip = g.get(column / STRIP * n * STRIP + column % STRIP..).unwrap_or_default();
            let (e, b) = ((&e[row * stride..], [1, stride]), (strip, STRIP));
            let y = &mut y.as_flattened_mut()[column..];
            // SAFETY: `row + step <= d`, `column + 2 * lanes <= BLOCK`; the assertions above, and `y` has `MANY` rows.
            unsafe {
                match step {
                    MANY => product_rows::<S, T, MANY>(simd, n, e, b, y),
                    SOME => product_rows::<S, T, SOME>(simd, n, e, b, y),
                    _ => product_rows::<S, T, ROWS>(simd, n, e, b, y),
                }
            }
        }
        for (r, y) in y.iter_mut().enumerate().take(step) {
            for strip in 0..BLOCK / STRIP {
                let w = &panel[(strip * d + row + r) * STRIP..][..STRIP];
                let (y, t) = (&mut y[strip * STRIP..][..STRIP], &t[strip * STRIP..][..STRIP]);
                // Indices, because zipped iterators are not always inlined.
                for j in 0..STRIP {
                    y[j] -= w[j] * t[j];
                }
            }
            emit(row + r, y);
        }
        row += step;
    }
}

/// # Safety
/// A vector from `at` on is in `x`.
#[inline(always)]
unsafe fn load<S: Simd, T: Real>(x: &[T], at: usize) -> T::Vector<S> {
    debug_assert!(at + lanes::<S, T>() <= x.len(), "vector at {at} of {} elements", x.len());
    // SAFETY: in bounds by the contract; any bits are a vector of floats, and its alignment is not assumed.
    unsafe { x.as_ptr().add(at).cast::<T::Vector<S>>().read_unaligned() }
}

/// # Safety
/// A vector from `at` on is in `x`.
#[inline(always)]
unsafe fn store<S: Simd, T: Real>(x: &mut [T], at: usize, value: T::Vector<S>) {
    debug_assert!(at + lanes::<S, T>() <= x.len(), "vector at {at} of {} elements", x.len());
    // SAFETY: as in `load`.
    unsafe { x.as_mut_ptr().add(at).cast::<T::Vector<S>>().write_unaligned(value) }
}

#[cfg(test)]
mod tests {
    use super::Real;

    #[test]
    fn exp_is_within_its_error() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let (found, expected) = (f64::from(<f32 as Real>::exp(x)), f64::from(x).exp());
            assert!((found / expected - 1.0).abs() <= 2e-7, "exp({x}) = {found:e}, expected {expected:e}");
        }
        assert_eq!([-88.0, -1e6, f32::NEG_INFINITY].map(<f32 as Real>::exp), [0.0; 3]);
        assert!(<f32 as Real>::exp(f32::NAN).is_nan() && <f32 as Real>::exp(0.0) == 1.0);
    }
}
