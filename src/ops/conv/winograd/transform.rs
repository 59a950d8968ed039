//! The linear maps of F(4x4, 3x3) with the points 0, 1, -1, 2, -2 and infinity (Lavin and Gray, CVPR 2016, section 4.3),
//! applied along both axes to vectors of channels.

use pulp::Simd;

/// `B^T d`: six neighbouring values of the input.
#[inline(always)]
pub(super) fn input<S: Simd>(simd: S, d: [S::f32s; 6]) -> [S::f32s; 6] {
    let fma = |a: f32, b, c| simd.mul_add_e_f32s(simd.splat_f32s(a), b, c);
    let (even, odd) = (fma(-4.0, d[2], d[4]), fma(-4.0, d[1], d[3]));
    let (far_even, far_odd) = (simd.sub_f32s(d[4], d[2]), simd.sub_f32s(d[3], d[1]));
    [
        fma(4.0, d[0], fma(-5.0, d[2], d[4])),
        simd.add_f32s(even, odd),
        simd.sub_f32s(even, odd),
        fma(2.0, far_odd, far_even),
        fma(-2.0, far_odd, far_even),
        fma(4.0, d[1], fma(-5.0, d[3], d[5])),
    ]
}

/// `A^T m`: four neighbouring values of the output.
#[inline(always)]
pub(super) fn output<S: Simd>(simd: S, m: [S::f32s; 6]) -> [S::f32s; 4] {
    let fma = |a: f32, b, c| simd.mul_add_e_f32s(simd.splat_f32s(a), b, c);
    let (sum, difference) = (simd.add_f32s(m[1], m[2]), simd.sub_f32s(m[1], m[2]));
    let (far_sum, far_difference) = (simd.add_f32s(m[3], m[4]), simd.sub_f32s(m[3], m[4]));
    [
        simd.add_f32s(simd.add_f32s(m[0], sum), far_sum),
        fma(2.0, far_difference, difference),
        fma(4.0, far_sum, sum),
        simd.add_f32s(fma(8.0, far_difference, difference), m[5]),
    ]
}

/// `A y`: the adjoint of [`output`].
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

/// `G g`: three neighbouring taps of the filter.
#[inline(always)]
pub(super) fn filter<S: Simd>(simd: S, g: [S::f32s; 3]) -> [S::f32s; 6] {
    let times = |a: f32, b| simd.mul_f32s(simd.splat_f32s(a), b);
    let fma = |a: f32, b, c| simd.mul_add_e_f32s(simd.splat_f32s(a), b, c);
    let (near, far) = (simd.add_f32s(g[0], g[2]), fma(4.0, g[2], g[0]));
    [
        times(1.0 / 4.0, g[0]),
        times(-1.0 / 6.0, simd.add_f32s(near, g[1])),
        times(-1.0 / 6.0, simd.sub_f32s(near, g[1])),
        times(1.0 / 24.0, fma(2.0, g[1], far)),
        times(1.0 / 24.0, fma(-2.0, g[1], far)),
        g[2],
    ]
}

/// `G^T u`: the adjoint of [`filter`].
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
