//! Depthwise convolution in f32. Groups of several channels run through the same loops, on a copy of the input whose
//! channels are arranged to match the outputs.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::Dims;
use super::kernel::sums::{join, with_zeros};
use super::kernel::{CHANNELS, Epilogue, Prologue};
use crate::ops::lanes::{load, store};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::vectorize;
use crate::parallel::Each;

/// Largest number of terms of an output: taps times input channels of a group.
const MAX_PLACES: usize = 64;
/// Output rows that a worker thread takes at a time.
const BAND: usize = 8;
/// Pixels that a worker thread takes at a time.
const PIXELS: usize = 256;
/// Largest number of input channels if groups have several channels.
const MAX_SPREAD: usize = 1024;

/// Whether a convolution can be computed by these loops.
pub(super) fn fits(d: Dims) -> bool {
    d.groups > 1
        && d.lanes() <= 4
        && d.c.is_multiple_of(CHANNELS)
        && d.co.is_multiple_of(CHANNELS)
        && d.kw <= 8
        && if d.lanes() == 1 { d.c == d.co } else { d.c <= MAX_SPREAD }
        && d.lanes() * d.kh * d.kw <= MAX_PLACES
}

/// Number of elements of a packed filter.
pub(super) fn filter_len(d: Dims) -> usize {
    d.lanes() * d.kh * d.kw * d.co
}

/// Packs `w: (co, lanes, kh, kw)` to `(lanes, kh * kw, co)`, the order in which it is read.
pub(super) fn pack(w: &[f32], d: Dims, packed: &mut [f32]) {
    let num = d.kh * d.kw;
    for (i, tap) in packed.iter_mut().enumerate() {
        *tap = w[i % d.co * d.lanes() * num + i / d.co];
    }
}

/// Taps and pixels, `[tap, pixel]`, that each pixel along one axis is computed from.
type Axis = Vec<Vec<[usize; 2]>>;

/// Whether taps and pixels of an axis are below these numbers.
fn is_inside(axis: &[Vec<[usize; 2]>], taps: usize, pixels: usize) -> bool {
    axis.iter().flatten().all(|[tap, at]| *tap < taps && *at < pixels)
}

/// Returns the taps and input pixels of each output pixel.
fn axis_forward(outputs: usize, inputs: usize, taps: usize, d: Dims) -> Axis {
    let pair = |o: usize, k: usize| Some([k, (o * d.stride + k).checked_sub(d.padding).filter(|&i| i < inputs)?]);
    (0..outputs).map(|o| (0..taps).filter_map(|k| pair(o, k)).collect()).collect()
}

/// Returns the taps and output pixels that each input pixel's gradient comes from.
fn axis_backward(inputs: usize, outputs: usize, taps: usize, d: Dims) -> Axis {
    let pair = |i: usize, k: usize| {
        let at = (i + d.padding).checked_sub(k).filter(|at| at.is_multiple_of(d.stride))? / d.stride;
        (at < outputs).then_some([k, at])
    };
    (0..inputs).map(|i| (0..taps).filter_map(|k| pair(i, k)).collect()).collect()
}

/// Writes `epilogue(conv(prologue(x), filter))` to `y`; `filter` is packed by [`pack`].
pub(super) fn convolve(
    x: &[f32],
    filter: &[f32],
    d: Dims,
    arch: Arch,
    (prologue, epilogue): (Prologue, Epilogue),
    y: &mut [f32],
) {
    let (rows, cols) = (&axis_forward(d.ho, d.h, d.kh, d), &axis_forward(d.wo, d.w, d.kw, d));
    let lanes = d.lanes();
    arch.dispatch(Stencil { x, prologue, c: d.c, size: [d.h, d.w], rows, cols, lanes, filter, d, epilogue, y });
}

/// Writes the gradient of the input, passed through `epilogue`, to `gx`.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims, arch: Arch, epilogue: Epilogue, gx: &mut [f32]) {
    assert!(gx.len() == d.n * d.h * d.w * d.c && epilogue.fits(d.c, gx.len()), "{d:?}");
    let (rows, cols) = (&axis_backward(d.h, d.ho, d.kh, d), &axis_backward(d.w, d.wo, d.kw, d));
    let by_output = |filter: &[f32], epilogue, y: &mut [f32]| {
        let (prologue, size, c) = (Prologue::default(), [d.ho, d.wo], d.co);
        arch.dispatch(Stencil { x: gy, prologue, c, size, rows, cols, lanes: 1, filter, d, epilogue, y });
    };
    with_scratch(filter_len(d), |filter| {
        pack(w, d, filter);
        if d.is_depthwise() {
            return by_output(filter, epilogue, gx);
        }
        with_scratch(d.n * d.h * d.w * d.co, |of_outputs| {
            for (lane, filter) in filter.chunks_exact(d.kh * d.kw * d.co).enumerate() {
                // Gradient per output channel, then summed over the outputs of a group.
                by_output(filter, Epilogue::default(), of_outputs);
                let pieces = gx.par_chunks_mut(PIXELS * d.c).zip(of_outputs.par_chunks(PIXELS * d.co));
                pieces.each(&|(gx, of_outputs)| {
                    let groups = of_outputs.chunks_exact(d.co / d.groups);
                    for (gx, group) in gx.chunks_exact_mut(d.lanes()).zip(groups) {
                        gx[lane] = group.iter().sum();
                    }
                });
            }
        });
        if !epilogue.is_identity() {
            arch.dispatch(Finish { epilogue, channels: d.c, y: gx });
        }
    });
}

/// Applies the epilogue to `y` in place.
struct Finish<'a> {
    epilogue: Epilogue<'a>,
    channels: usize,
    y: &'a mut [f32],
}

impl WithSimd for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { epilogue, channels, y } = self;
        y.par_chunks_mut(PIXELS * channels).enumerate().each(&|(piece, y)| {
            vectorize(simd, FinishPixels { epilogue, channels, at: piece * PIXELS * channels, y });
        });
    }
}

/// Applies the epilogue to whole pixels, which start at element `at` of the output.
struct FinishPixels<'a> {
    epilogue: Epilogue<'a>,
    channels: usize,
    at: usize,
    y: &'a mut [f32],
}

impl WithSimd for FinishPixels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { epilogue, channels, at, y } = self;
        assert!(channels.is_multiple_of(S::F32_LANES) && y.len().is_multiple_of(channels), "{channels} channels");
        assert!(epilogue.covers(channels, at + y.len()), "constants per channel, a residual of the output's shape");
        for lane in (0..y.len()).step_by(S::F32_LANES) {
            // SAFETY: vectors of `y` are whole and those of one pixel's channels, which the epilogue covers.
            unsafe {
                let value = epilogue.apply(simd, load::<S>(y, lane), lane % channels, at + lane);
                store::<S>(y, lane, value);
            }
        }
    }
}

/// Sum over the taps, for each channel of a group, for every pixel of `y`.
struct Stencil<'a> {
    x: &'a [f32],
    prologue: Prologue<'a>,
    /// Channels of `x`; `size` is rows and columns of one of its images.
    c: usize,
    size: [usize; 2],
    rows: &'a Axis,
    cols: &'a Axis,
    /// Channels of `x` that a channel of `y` depends on: if one, the same channel; if more, those of its group.
    lanes: usize,
    /// `(lanes, kh * kw, co)`.
    filter: &'a [f32],
    d: Dims,
    epilogue: Epilogue<'a>,
    y: &'a mut [f32],
}

impl WithSimd for Stencil<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, prologue, c, size: [h, w], rows, cols, lanes, filter, d, epilogue, y } = self;
        let row_len = cols.len() * d.co;
        assert!(x.len() == d.n * h * w * c && y.len() == d.n * rows.len() * row_len, "{d:?}");
        assert!(filter.len() == lanes * d.kh * d.kw * d.co && d.co.is_multiple_of(S::F32_LANES), "{d:?}");
        assert!(is_inside(rows, d.kh, h) && is_inside(cols, d.kw, w), "{d:?}");
        assert!(prologue.fits(c) && epilogue.fits(d.co, y.len()) && (lanes > 1 || c == d.co), "{d:?}");
        y.par_chunks_mut(rows.len() * row_len).enumerate().each(&|(image, y)| {
            y.par_chunks_mut(BAND * row_len).enumerate().each(&|(band, y)| {
                let at = (image * rows.len() + band * BAND) * row_len;
                let rows = &rows[band * BAND..][..y.len() / row_len];
                let seen = || rows.iter().flatten().map(|[_, row]| *row);
                let (top, bottom) = seen().min().zip(seen().max().map(|row| row + 1)).unwrap_or((0, 0));
                let band = Band { rows, cols, top, size: [bottom - top, w], lanes, filter, d, epilogue, at };
                let x = &x[(image * h + top) * w * c..][..(bottom - top) * w * c];
                if lanes == 1 && prologue.is_identity() {
                    return band.run(simd, x, y);
                }
                with_scratch(lanes * (bottom - top) * w * d.co, |seen| {
                    for (lane, seen) in seen.chunks_exact_mut((bottom - top) * w * d.co).enumerate() {
                        vectorize(simd, Spread { x, prologue, d, lanes: [lane, lanes], y: seen });
                    }
                    band.run(simd, seen, y);
                });
            });
        });
    }
}

/// Writes, for each output channel of each pixel, `prologue` of input channel `lane` of its group; `lanes` is
/// `[lane, channels of a group]`.
struct Spread<'a> {
    x: &'a [f32],
    prologue: Prologue<'a>,
    d: Dims,
    lanes: [usize; 2],
    y: &'a mut [f32],
}

impl WithSimd for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, prologue, d, lanes, y } = self;
        let [lane, lanes] = lanes;
        if lanes == 1 {
            assert!(x.len() == y.len() && x.len().is_multiple_of(d.co) && prologue.fits(d.co), "{d:?}");
            assert!(d.co.is_multiple_of(S::F32_LANES), "{d:?}");
            for pixel in (0..x.len()).step_by(d.co) {
                for channel in (0..d.co).step_by(S::F32_LANES) {
                    // SAFETY: the pixel's channels are in `x` and `y`, whole vectors, and in the constants.
                    unsafe {
                        let value = prologue.apply(simd, load::<S>(x, pixel + channel), channel);
                        store::<S>(y, pixel + channel, value);
                    }
                }
            }
            return;
        }
        let per_group = d.co / d.groups;
        assert!(x.len() / d.c == y.len() / d.co && d.c.is_multiple_of(S::F32_LANES) && prologue.fits(d.c), "{d:?}");
        assert!(d.c <= MAX_SPREAD, "{d:?}");
        let mut pixel = [0.0; MAX_SPREAD];
        for (x, y) in x.chunks_exact(d.c).zip(y.chunks_exact_mut(d.co)) {
            let x = if prologue.is_identity() {
                x
            } else {
                for channel in (0..d.c).step_by(S::F32_LANES) {
                    // SAFETY: the channel's vector is in the pixel, the buffer and the constants.
                    unsafe { store::<S>(&mut pixel, channel, prologue.apply(simd, load::<S>(x, channel), channel)) };
                }
                &pixel[..d.c]
            };
            match (lanes, per_group) {
                // MobileFaceNet's groups; with constant sizes the loop becomes shuffles.
                (2, 2) => {
                    let (y, _) = y.as_chunks_mut::<2>();
                    for (i, y) in y.iter_mut().enumerate() {
                        *y = [x[2 * i + lane]; 2];
                    }
                }
                _ => {
                    for (y, x) in y.chunks_exact_mut(per_group).zip(x.chunks_exact(lanes)) {
                        y.fill(x[lane]);
                    }
                }
            }
        }
    }
}

/// A band of output rows.
#[derive(Clone, Copy)]
struct Band<'a> {
    rows: &'a [Vec<[usize; 2]>],
    cols: &'a Axis,
    /// First image row that the input holds.
    top: usize,
    /// Rows and columns that the input holds.
    size: [usize; 2],
    lanes: usize,
    filter: &'a [f32],
    d: Dims,
    epilogue: Epilogue<'a>,
    /// Index of the band's first element in the output.
    at: usize,
}

impl Band<'_> {
    /// Computes the band from `x: (lanes, rows, columns, co)`.
    #[inline(always)]
    fn run<S: Simd>(self, simd: S, x: &[f32], y: &mut [f32]) {
        let Self { rows, cols, top, size: [h, w], lanes, filter, d, .. } = self;
        let c = d.co;
        assert!(x.len() == lanes * h * w * c && filter.len() == lanes * d.kh * d.kw * c, "{d:?}");
        for (row, (y, rows)) in y.chunks_exact_mut(cols.len() * c).zip(rows).enumerate() {
            // Start of each row of pixels, and of its row of taps.
            let mut starts = [[0; 2]; MAX_PLACES];
            let mut num = 0;
            for lane in 0..lanes {
                for [ky, sy] in rows {
                    starts[num] = [(lane * h + sy - top) * w * c, (lane * d.kh + ky) * d.kw * c];
                    num += 1;
                }
            }
            let at = self.at + row * cols.len() * c;
            vectorize(simd, BandRow { band: self, x, starts: &starts[..num], at, y });
        }
    }

    /// Computes a row of pixels from `R` rows of three taps.
    ///
    /// # Safety
    /// From each row's start, `x` holds the pixels of all columns and the filter holds three taps.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "what iterators do not inline loses the machine's vectors")]
    unsafe fn row<S: Simd, const R: usize>(
        self,
        simd: S,
        x: &[f32],
        starts: &[[usize; 2]; R],
        at: usize,
        y: &mut [f32],
    ) {
        let Self { cols, filter, d, epilogue, .. } = self;
        let c = d.co;
        for lane in (0..c).step_by(S::F32_LANES) {
            let mut taps = [[simd.splat_f32s(0.0); 3]; R];
            for r in 0..R {
                for k in 0..3 {
                    // SAFETY: by the contract, and the lane's vector is in the channels.
                    taps[r][k] = unsafe { load::<S>(filter, starts[r][1] + k * c + lane) };
                }
            }
            for column in 0..cols.len() {
                let from = &cols[column];
                let mut sum = simd.splat_f32s(0.0);
                // SAFETY: by the contract; `Stencil` checked the epilogue and `y`.
                unsafe {
                    if let [[_, a], [_, b], [_, e]] = from.as_slice() {
                        // All three taps, in their order.
                        for r in 0..R {
                            let start = starts[r][0] + lane;
                            sum = simd.mul_add_e_f32s(load::<S>(x, start + a * c), taps[r][0], sum);
                            sum = simd.mul_add_e_f32s(load::<S>(x, start + b * c), taps[r][1], sum);
                            sum = simd.mul_add_e_f32s(load::<S>(x, start + e * c), taps[r][2], sum);
                        }
                    } else {
                        for [k, column] in from {
                            for [start, of_filter] in starts {
                                let tap = load::<S>(filter, of_filter + k * c + lane);
                                sum = simd.mul_add_e_f32s(load::<S>(x, start + column * c + lane), tap, sum);
                            }
                        }
                    }
                    let place = column * c + lane;
                    store::<S>(y, place, epilogue.apply(simd, sum, lane, at + place));
                }
            }
        }
    }

    /// Like [`Self::row`], for any number of rows and taps.
    ///
    /// # Safety
    /// Same as [`Self::row`], with all taps of the filter's rows instead of three.
    #[inline(always)]
    unsafe fn any_row<S: Simd>(self, simd: S, x: &[f32], starts: &[[usize; 2]], at: usize, y: &mut [f32]) {
        let Self { cols, filter, d, epilogue, .. } = self;
        let c = d.co;
        for (column, from) in cols.iter().enumerate() {
            for lane in (0..c).step_by(S::F32_LANES) {
                let mut sum = simd.splat_f32s(0.0);
                // SAFETY: by the contract; `Stencil` checked the epilogue and `y`.
                unsafe {
                    for [start, of_filter] in starts {
                        for [k, column] in from {
                            let tap = load::<S>(filter, of_filter + k * c + lane);
                            sum = simd.mul_add_e_f32s(load::<S>(x, start + column * c + lane), tap, sum);
                        }
                    }
                    let place = column * c + lane;
                    store::<S>(y, place, epilogue.apply(simd, sum, lane, at + place));
                }
            }
        }
    }
}

/// Computes a row of pixels from the rows of pixels and taps that begin at `starts`.
struct BandRow<'a> {
    band: Band<'a>,
    x: &'a [f32],
    starts: &'a [[usize; 2]],
    at: usize,
    y: &'a mut [f32],
}

impl WithSimd for BandRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { band, x, starts, at, y } = self;
        let Band { cols, size: [_, w], filter, d, .. } = band;
        let (pixels, taps) = (w * d.co, d.kw * d.co);
        let holds = |[start, of_filter]: &[usize; 2]| start + pixels <= x.len() && of_filter + taps <= filter.len();
        assert!(starts.iter().all(holds) && y.len() == cols.len() * d.co, "{d:?}");
        // SAFETY: rows of pixels and taps lie inside `x` and the filter; `Stencil` checked that their columns do.
        unsafe {
            match (band.d.kw, starts) {
                (3, [a, b]) => band.row(simd, x, &[*a, *b], at, y),
                (3, [a, b, c]) => band.row(simd, x, &[*a, *b, *c], at, y),
                (3, [a, b, c, d]) => band.row(simd, x, &[*a, *b, *c, *d], at, y),
                (3, [a, b, c, d, e, f]) => band.row(simd, x, &[*a, *b, *c, *d, *e, *f], at, y),
                (_, starts) => band.any_row(simd, x, starts, at, y),
            }
        }
    }
}

/// Writes the gradient of the weight, `(co, lanes, kh, kw)`, for the convolution of `prologue(x)`.
pub(super) fn grad_w(x: &[f32], prologue: Prologue, gy: &[f32], d: Dims, arch: Arch, gw: &mut [f32]) {
    let num = d.kh * d.kw;
    let size = d.lanes() * num * d.co;
    assert!(gw.len() == size, "{d:?}");
    // One sum per image, added in order: the same bits for any number of threads.
    with_zeros(d.n.max(1) * size, |sums| {
        arch.dispatch(GradW { x, prologue, gy, d, sums: &mut sums[..d.n * size] });
        let total = join(sums, size);
        for (i, gw) in gw.iter_mut().enumerate() {
            let [channel, rest] = [i / (d.lanes() * num), i % (d.lanes() * num)];
            *gw = total[rest * d.co + channel];
        }
    });
}

struct GradW<'a> {
    x: &'a [f32],
    prologue: Prologue<'a>,
    gy: &'a [f32],
    d: Dims,
    /// `(n, lanes, kh * kw, co)`.
    sums: &'a mut [f32],
}

impl WithSimd for GradW<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, prologue, gy, d, sums } = self;
        let (c, lanes) = (d.co, d.lanes());
        assert!(x.len() == d.n * d.h * d.w * d.c && gy.len() == d.pixels() * c && prologue.fits(d.c), "{d:?}");
        let (rows, cols) = (axis_forward(d.ho, d.h, d.kh, d), axis_forward(d.wo, d.w, d.kw, d));
        sums.par_chunks_mut(lanes * d.kh * d.kw * c).enumerate().each(&|(image, sums)| {
            let x = &x[image * d.h * d.w * d.c..][..d.h * d.w * d.c];
            let gy = &gy[image * d.ho * d.wo * c..][..d.ho * d.wo * c];
            let run = |x: &[f32], sums: &mut [f32]| {
                vectorize(simd, ImageGradW { x, gy, d, rows: &rows, cols: &cols, sums });
            };
            if lanes == 1 && prologue.is_identity() {
                return run(x, sums);
            }
            with_scratch(d.h * d.w * c, |seen| {
                for (lane, sums) in sums.chunks_exact_mut(d.kh * d.kw * c).enumerate() {
                    vectorize(simd, Spread { x, prologue, d, lanes: [lane, lanes], y: seen });
                    run(seen, sums);
                }
            });
        });
    }
}

/// Adds the contribution of one image to `sums: (kh * kw, co)`.
struct ImageGradW<'a> {
    x: &'a [f32],
    gy: &'a [f32],
    d: Dims,
    rows: &'a Axis,
    cols: &'a Axis,
    sums: &'a mut [f32],
}

impl WithSimd for ImageGradW<'_> {
    type Output = ();

    #[allow(clippy::needless_range_loop, reason = "what iterators do not inline loses the machine's vectors")]
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, gy, d, rows, cols, sums } = self;
        let c = d.co;
        assert!(rows.len() == d.ho && cols.len() == d.wo, "{d:?}");
        assert!(is_inside(rows, d.kh, d.h) && is_inside(cols, d.kw, d.w) && c.is_multiple_of(S::F32_LANES), "{d:?}");
        assert!(x.len() == d.h * d.w * c && gy.len() == d.ho * d.wo * c && sums.len() == d.kh * d.kw * c, "{d:?}");
        let zero = simd.splat_f32s(0.0);
        for lane in (0..c).step_by(S::F32_LANES) {
            // Where all 3x3 taps are inside the image, their sums stay in registers.
            let mut inner = [[zero; 3]; 3];
            for (oy, rows) in rows.iter().enumerate() {
                for (ox, cols) in cols.iter().enumerate() {
                    // SAFETY: `gy` and `x` hold these pixels with all their channels, and the sums hold the tap and the
                    // lane.
                    unsafe {
                        let gy = load::<S>(gy, (oy * d.wo + ox) * c + lane);
                        if let ([[_, top], _, _], [[_, left], _, _], 3, 3) =
                            (rows.as_slice(), cols.as_slice(), d.kh, d.kw)
                        {
                            let start = (top * d.w + left) * c + lane;
                            for ky in 0..3 {
                                for kx in 0..3 {
                                    let x = load::<S>(x, start + (ky * d.w + kx) * c);
                                    inner[ky][kx] = simd.mul_add_e_f32s(x, gy, inner[ky][kx]);
                                }
                            }
                            continue;
                        }
                        for [ky, sy] in rows {
                            for [kx, sx] in cols {
                                let x = load::<S>(x, (sy * d.w + sx) * c + lane);
                                let at = (ky * d.kw + kx) * c + lane;
                                store::<S>(sums, at, simd.mul_add_e_f32s(x, gy, load::<S>(sums, at)));
                            }
                        }
                    }
                }
            }
            if (d.kh, d.kw) == (3, 3) {
                for ky in 0..3 {
                    for kx in 0..3 {
                        let at = (3 * ky + kx) * c + lane;
                        // SAFETY: the tap and the lane are in the sums of this image.
                        unsafe { store::<S>(sums, at, simd.add_f32s(load::<S>(sums, at), inner[ky][kx])) };
                    }
                }
            }
        }
    }
}
