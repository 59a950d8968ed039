//! Convolution of every channel with a filter of its own, in f32. Groups of several channels go through the same loops
//! once per channel of the group, on a copy of the input whose channels are laid out as the outputs want them.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::Dims;
use super::kernel::lanes::{load, store};
use super::kernel::{CHANNELS, Epilogue};
use crate::ops::simd::Inlined;

/// Most pixels of a filter.
const MAX_TAPS: usize = 64;

/// Whether a convolution can be computed this way.
pub(super) fn fits(d: Dims) -> bool {
    d.groups > 1 && d.lanes() <= 4 && d.co.is_multiple_of(CHANNELS) && d.kh <= 8 && d.kw <= 8
}

/// One channel of every group's filters: of `(co, lanes, kh, kw)` to `(kh * kw, co)`.
struct Filter {
    taps: Vec<f32>,
    arch: Arch,
}

impl Filter {
    fn new(w: &[f32], d: Dims, lane: usize, arch: Arch) -> Self {
        let num = d.kh * d.kw;
        let tap = |i: usize| w[(i % d.co * d.lanes() + lane) * num + i / d.co];
        Self { taps: (0..num * d.co).map(tap).collect(), arch }
    }
}

/// The sizes with a group for each output channel.
fn spread(d: Dims) -> Dims {
    Dims { c: d.co, groups: d.co, ..d }
}

/// From which taps and pixels each pixel along one axis is computed.
type Axis = Vec<Vec<[usize; 2]>>;

/// Outputs from inputs.
fn axis_forward(outputs: usize, inputs: usize, taps: usize, d: Dims) -> Axis {
    let pair = |o: usize, k: usize| Some([k, (o * d.stride + k).checked_sub(d.padding).filter(|&i| i < inputs)?]);
    (0..outputs).map(|o| (0..taps).filter_map(|k| pair(o, k)).collect()).collect()
}

/// Inputs from outputs.
fn axis_backward(inputs: usize, outputs: usize, taps: usize, d: Dims) -> Axis {
    let pair = |i: usize, k: usize| {
        let at = (i + d.padding).checked_sub(k).filter(|at| at.is_multiple_of(d.stride))? / d.stride;
        (at < outputs).then_some([k, at])
    };
    (0..inputs).map(|i| (0..taps).filter_map(|k| pair(i, k)).collect()).collect()
}

/// The convolution of `x`.
pub(super) fn forward(x: &[f32], w: &[f32], d: Dims, arch: Arch) -> Vec<f32> {
    let mut sum: Option<Vec<f32>> = None;
    for lane in 0..d.lanes() {
        let mut y = vec![0.0; d.pixels() * d.co];
        let epilogue = Epilogue { residual: sum.as_deref(), ..Epilogue::default() };
        convolve(&d.spread(x, lane), &Filter::new(w, d, lane, arch), spread(d), epilogue, &mut y);
        sum = Some(y);
    }
    sum.unwrap_or_default()
}

/// Writes `epilogue` of the depthwise convolution of `x` to `y`.
fn convolve(x: &[f32], filter: &Filter, d: Dims, epilogue: Epilogue, y: &mut [f32]) {
    let rows = axis_forward(d.ho, d.h, d.kh, d);
    let cols = axis_forward(d.wo, d.w, d.kw, d);
    assert!(epilogue.fits(d.co, y.len()) && y.len() == d.pixels() * d.co, "an output of {} for {d:?}", y.len());
    filter.arch.dispatch(Stencil { x, size: [d.h, d.w], rows, cols, filter, d, epilogue, y });
}

/// The gradient of the input.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims, arch: Arch) -> Vec<f32> {
    let rows = axis_backward(d.h, d.ho, d.kh, d);
    let cols = axis_backward(d.w, d.wo, d.kw, d);
    let mut gx = Vec::new();
    for lane in 0..d.lanes() {
        // Per output channel, then summed over the outputs of a group.
        let mut of_outputs = vec![0.0; d.n * d.h * d.w * d.co];
        let (filter, epilogue) = (&Filter::new(w, d, lane, arch), Epilogue::default());
        let (rows, cols, y) = (rows.clone(), cols.clone(), &mut of_outputs[..]);
        arch.dispatch(Stencil { x: gy, size: [d.ho, d.wo], rows, cols, filter, d: spread(d), epilogue, y });
        if d.is_depthwise() {
            return of_outputs;
        }
        gx.resize(d.n * d.h * d.w * d.c, 0.0);
        gx.par_chunks_mut(d.c).zip(of_outputs.par_chunks(d.co)).for_each(|(gx, of_outputs)| {
            for (gx, group) in gx.chunks_exact_mut(d.lanes()).zip(of_outputs.chunks_exact(d.co / d.groups)) {
                gx[lane] = group.iter().sum();
            }
        });
    }
    gx
}

/// A sum over taps for every pixel of `y`.
struct Stencil<'a> {
    x: &'a [f32],
    /// Rows and columns of an image of `x`.
    size: [usize; 2],
    rows: Axis,
    cols: Axis,
    filter: &'a Filter,
    d: Dims,
    epilogue: Epilogue<'a>,
    y: &'a mut [f32],
}

impl WithSimd for Stencil<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, size: [h, w], rows, cols, filter, d, epilogue, y } = self;
        let c = d.c;
        assert!(x.len() >= d.n * h * w * c && y.len() == d.n * rows.len() * cols.len() * c, "{d:?}");
        y.par_chunks_mut(cols.len() * c).enumerate().for_each(|(row, y)| {
            let (image, first) = (row / rows.len(), row * cols.len() * c);
            simd.vectorize(Inlined(|| {
                for (column, (y, cols)) in y.chunks_exact_mut(c).zip(&cols).enumerate() {
                    // Where each tap's pixel and weights begin.
                    let mut places = [[0; 2]; MAX_TAPS];
                    let mut num = 0;
                    for [ky, sy] in &rows[row % rows.len()] {
                        for [kx, sx] in cols {
                            places[num] = [((image * h + sy) * w + sx) * c, (ky * d.kw + kx) * c];
                            num += 1;
                        }
                    }
                    let at = first + column * c;
                    // SAFETY: pixels and taps begin inside `x` and the filter, which hold all their channels; the caller
                    // checked the epilogue for `y`.
                    unsafe {
                        match places[..num].first_chunk::<9>().filter(|_| num == 9) {
                            Some(places) => pixel(simd, x, &filter.taps, places, epilogue, at, y),
                            None => pixel(simd, x, &filter.taps, &places[..num], epilogue, at, y),
                        }
                    }
                }
            }));
        });
    }
}

/// One pixel, which begins at `at` in the output.
///
/// # Safety
/// At each of `places` there are as many elements of `x` and of `taps` as of `y`, whole vectors; the epilogue has them too.
#[inline(always)]
unsafe fn pixel<S: Simd>(
    simd: S,
    x: &[f32],
    taps: &[f32],
    places: &(impl AsRef<[[usize; 2]]> + ?Sized),
    epilogue: Epilogue,
    at: usize,
    y: &mut [f32],
) {
    for lane in (0..y.len()).step_by(S::F32_LANES) {
        let mut sum = simd.splat_f32s(0.0);
        // SAFETY: by the contract.
        unsafe {
            for [pixel, tap] in places.as_ref() {
                sum = simd.mul_add_e_f32s(load::<S>(x, pixel + lane), load::<S>(taps, tap + lane), sum);
            }
            store::<S>(y, lane, epilogue.apply(simd, sum, lane, at + lane));
        }
    }
}

/// The gradient of the weight, `(co, lanes, kh, kw)`.
pub(super) fn grad_w(x: &[f32], gy: &[f32], d: Dims, arch: Arch) -> Vec<f32> {
    let num = d.kh * d.kw;
    let mut gw = vec![0.0; d.co * d.lanes() * num];
    for lane in 0..d.lanes() {
        // One sum per image, added in their order: the same bits for any number of threads.
        let mut sums = vec![0.0; d.n * num * d.co];
        arch.dispatch(GradW { x: &d.spread(x, lane), gy, d: spread(d), sums: &mut sums });
        for sum in sums.chunks_exact(num * d.co) {
            for (tap, sum) in sum.chunks_exact(d.co).enumerate() {
                for (channel, sum) in sum.iter().enumerate() {
                    gw[(channel * d.lanes() + lane) * num + tap] += sum;
                }
            }
        }
    }
    gw
}

struct GradW<'a> {
    x: &'a [f32],
    gy: &'a [f32],
    d: Dims,
    /// `(n, kh * kw, c)`.
    sums: &'a mut [f32],
}

impl WithSimd for GradW<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, gy, d, sums } = self;
        let c = d.c;
        assert!(x.len() >= d.n * d.h * d.w * c && gy.len() >= d.pixels() * c, "{d:?}");
        let rows = axis_forward(d.ho, d.h, d.kh, d);
        let cols = axis_forward(d.wo, d.w, d.kw, d);
        sums.par_chunks_mut(d.kh * d.kw * c).enumerate().for_each(|(image, sums)| {
            simd.vectorize(Inlined(|| {
                for lane in (0..c).step_by(S::F32_LANES) {
                    for (oy, rows) in rows.iter().enumerate() {
                        for [ky, sy] in rows {
                            // A row of taps stays in registers along a row of pixels.
                            let mut row = [simd.splat_f32s(0.0); 8];
                            assert!(d.kw <= row.len(), "a filter of {} columns", d.kw);
                            for (ox, cols) in cols.iter().enumerate() {
                                // SAFETY: the pixels are in `gy` and `x`, with all their channels.
                                unsafe {
                                    let gy = load::<S>(gy, ((image * d.ho + oy) * d.wo + ox) * c + lane);
                                    for [kx, sx] in cols {
                                        let x = load::<S>(x, ((image * d.h + sy) * d.w + sx) * c + lane);
                                        row[*kx] = simd.mul_add_e_f32s(x, gy, row[*kx]);
                                    }
                                }
                            }
                            for (kx, value) in row.into_iter().enumerate().take(d.kw) {
                                let at = (ky * d.kw + kx) * c + lane;
                                // SAFETY: the tap and the lane are in the sums of this image.
                                unsafe { store::<S>(sums, at, simd.add_f32s(load::<S>(sums, at), value)) };
                            }
                        }
                    }
                }
            }));
        });
    }
}
