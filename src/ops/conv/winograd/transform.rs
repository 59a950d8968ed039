//! The linear maps of F(MxM, 3x3), applied along both axes to vectors of channels. The `N = M + 2` points are 0, 1, -1
//! and infinity, with 2 in addition for three outputs and both 2 and -2 for four (Lavin and Gray, CVPR 2016, sections
//! 4.1 to 4.3; the maps for three outputs come from the same construction).

use pulp::Simd;

/// Input transform `B^T d` of `N` neighbouring input values.
#[inline(always)]
pub(super) fn input<S: Simd, const N: usize>(simd: S, d: [S::f32s; N]) -> [S::f32s; N] {
    let fma = |a: f32, b, c| simd.mul_add_e_f32s(simd.splat_f32s(a), b, c);
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    let mut y = d;
    match N {
        4 => {
            y[0] = sub(d[0], d[2]);
            y[1] = add(d[1], d[2]);
            y[2] = sub(d[2], d[1]);
            y[3] = sub(d[1], d[3]);
        }
        5 => {
            let far = sub(d[3], d[1]);
            y[0] = fma(2.0, sub(d[0], d[2]), far);
            y[1] = fma(-2.0, d[1], sub(d[3], d[2]));
            y[2] = fma(2.0, d[1], fma(-3.0, d[2], d[3]));
            y[3] = far;
            y[4] = fma(-2.0, far, sub(d[4], d[2]));
        }
        6 => {
            let (even, odd) = (fma(-4.0, d[2], d[4]), fma(-4.0, d[1], d[3]));
            let (far_even, far_odd) = (sub(d[4], d[2]), sub(d[3], d[1]));
            y[0] = fma(4.0, d[0], fma(-5.0, d[2], d[4]));
            y[1] = add(even, odd);
            y[2] = sub(even, odd);
            y[3] = fma(2.0, far_odd, far_even);
            y[4] = fma(-2.0, far_odd, far_even);
            y[5] = fma(4.0, d[1], fma(-5.0, d[3], d[5]));
        }
        _ => unreachable!("{N} points"),
    }
    y
}

/// Output transform `A^T m`, to `M` neighbouring output values.
#[inline(always)]
pub(super) fn output<S: Simd, const M: usize, const N: usize>(simd: S, m: [S::f32s; N]) -> [S::f32s; M] {
    let fma = |a: f32, b, c| simd.mul_add_e_f32s(simd.splat_f32s(a), b, c);
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    let mut y = [simd.splat_f32s(0.0); M];
    let (sum, difference) = (add(m[1], m[2]), sub(m[1], m[2]));
    match (M, N) {
        (2, 4) => {
            y[0] = add(m[0], sum);
            y[1] = sub(difference, m[3]);
        }
        (3, 5) => {
            y[0] = add(m[0], add(sum, m[3]));
            y[1] = fma(2.0, m[3], difference);
            y[2] = fma(4.0, m[3], add(sum, m[4]));
        }
        (4, 6) => {
            let (far_sum, far_difference) = (add(m[3], m[4]), sub(m[3], m[4]));
            y[0] = add(add(m[0], sum), far_sum);
            y[1] = fma(2.0, far_difference, difference);
            y[2] = fma(4.0, far_sum, sum);
            y[3] = add(fma(8.0, far_difference, difference), m[5]);
        }
        _ => unreachable!("{M} outputs of {N} points"),
    }
    y
}

/// Filter transform `G g` of three neighbouring taps.
#[inline(always)]
pub(super) fn filter<S: Simd, const N: usize>(simd: S, g: [S::f32s; 3]) -> [S::f32s; N] {
    let times = |a: f32, b| simd.mul_f32s(simd.splat_f32s(a), b);
    let fma = |a: f32, b, c| simd.mul_add_e_f32s(simd.splat_f32s(a), b, c);
    let (add, sub) = (|a, b| simd.add_f32s(a, b), |a, b| simd.sub_f32s(a, b));
    let mut u = [simd.splat_f32s(0.0); N];
    let near = add(g[0], g[2]);
    match N {
        4 => {
            u[0] = g[0];
            u[1] = times(1.0 / 2.0, add(near, g[1]));
            u[2] = times(1.0 / 2.0, sub(near, g[1]));
        }
        5 => {
            u[0] = times(1.0 / 2.0, g[0]);
            u[1] = times(-1.0 / 2.0, add(near, g[1]));
            u[2] = times(-1.0 / 6.0, sub(near, g[1]));
            u[3] = times(1.0 / 6.0, fma(4.0, g[2], fma(2.0, g[1], g[0])));
        }
        6 => {
            let far = fma(4.0, g[2], g[0]);
            u[0] = times(1.0 / 4.0, g[0]);
            u[1] = times(-1.0 / 6.0, add(near, g[1]));
            u[2] = times(-1.0 / 6.0, sub(near, g[1]));
            u[3] = times(1.0 / 24.0, fma(2.0, g[1], far));
            u[4] = times(1.0 / 24.0, fma(-2.0, g[1], far));
        }
        _ => unreachable!("{N} points"),
    }
    u[N - 1] = g[2];
    u
}

/// `A y` for four outputs: the adjoint of [`output`].
#[inline(always)]
pub(super) fn output_adjoint<S: Simd>(simd: S, y: [S::f32s; 4]) -> [S::f32s; 6] {
    let fma = |a: f32, b, c| simd.mul_add_e_f32s(simd.splat_f32s(a), b, c);
    let (even, odd) = (simd.add_f32s(y[0], y[2]), simd.add_f32s(y[1], y[3]));
    let (far_even, far_odd) = (fma(4.0, y[2], y[0]), fma(4.0, y[3], y[1]));
    [
        y[0],
        simd.add_f32s(even, odd),
        simd.sub_f32s(even, odd),
        fma(2.0, far_odd, far_even),
        fma(-2.0, far_odd, far_even),
        y[3],
    ]
}

/// `G^T u` for four outputs: the adjoint of [`filter`].
#[inline(always)]
pub(super) fn filter_adjoint<S: Simd>(simd: S, u: [S::f32s; 6]) -> [S::f32s; 3] {
    let times = |a: f32, b| simd.mul_f32s(simd.splat_f32s(a), b);
    let fma = |a: f32, b, c| simd.mul_add_e_f32s(simd.splat_f32s(a), b, c);
    let (sum, difference) = (simd.add_f32s(u[1], u[2]), simd.sub_f32s(u[2], u[1]));
    let (far_sum, far_difference) = (simd.add_f32s(u[3], u[4]), simd.sub_f32s(u[3], u[4]));
    let near = times(-1.0 / 6.0, sum);
    [
        fma(1.0 / 4.0, u[0], fma(1.0 / 24.0, far_sum, near)),
        fma(1.0 / 6.0, difference, times(1.0 / 12.0, far_difference)),
        fma(1.0 / 6.0, far_sum, simd.add_f32s(near, u[5])),
    ]
}
