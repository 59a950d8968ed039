//! Depthwise convolution of 8-bit integers.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::finish::{Element, Finish};
use super::{Affine, Dims, Int8Weight, LANES, Source};
use crate::ops::scratch::with_scratch;
use crate::ops::simd::dispatch;
use crate::parallel::Each;
#[cfg(target_arch = "x86_64")]
use crate::vectors;

/// Bytes of the rows of pixels that a worker thread has below its taps at a time.
const SEEN_BYTES: usize = 128 * 1024;

/// A depthwise filter as it is read.
#[derive(Clone, Debug)]
pub(super) struct Taps {
    /// `(blocks of channels, pairs of taps, LANES, 2)`, with zeros where there are no more channels or taps.
    filter: Vec<i16>,
    /// Pairs of taps.
    pairs: usize,
    has_avx2: bool,
}

impl Taps {
    /// Packs a filter `(co, 1, kh, kw)`.
    pub fn new(weight: &Int8Weight) -> Self {
        #[cfg(target_arch = "x86_64")]
        let has_avx2 = vectors::has_avx2();
        #[cfg(not(target_arch = "x86_64"))]
        let has_avx2 = false;
        Self::with(weight, has_avx2)
    }

    pub fn with(weight: &Int8Weight, has_avx2: bool) -> Self {
        let [co, _, kh, kw] = weight.shape();
        let (taps, pairs) = (kh * kw, (kh * kw).div_ceil(2));
        let mut filter = vec![0; co.next_multiple_of(LANES) * pairs * 2];
        for (i, value) in weight.values().iter().enumerate() {
            let (channel, tap) = (i / taps, i % taps);
            let place = (channel / LANES * pairs + tap / 2) * LANES
                + if has_avx2 { unpacked(channel % LANES) } else { channel % LANES };
            filter[2 * place + tap % 2] = i16::from(*value);
        }
        Self { filter, pairs, has_avx2 }
    }
}

/// The place of a lane when two vectors are interleaved within halves of 128 bits: 0 to 3 and 8 to 11 come first.
fn unpacked(lane: usize) -> usize {
    lane / 8 * 4 + lane / 4 % 2 * 8 + lane % 4
}

/// Computes rows of pixels in parallel.
pub(super) fn fill<T: Element>(taps: &Taps, input: Affine, x: Source, d: Dims, finish: Finish, y: &mut [T]) {
    // With the padding left and right, and channels up to whole vectors.
    let (width, c) = (d.w + 2 * d.padding, d.c.next_multiple_of(LANES));
    let row_len = d.wo * d.co;
    let most = (SEEN_BYTES / (2 * width * c)).saturating_sub(d.kh - 1) / d.stride;
    let rows = most.clamp(1, (d.n * d.ho).div_ceil(2 * rayon::current_num_threads()).max(1));
    let offsets: Vec<usize> = (0..2 * taps.pairs)
        // Where the number of taps is odd, the last one comes twice, the second time with a weight of 0.
        .map(|tap| tap.min(d.kh * d.kw - 1))
        .map(|tap| (tap / d.kw * width + tap % d.kw) * c)
        .collect();
    y.par_chunks_mut(rows * row_len).enumerate().each(&|(i, y)| {
        // A piece may end in another image.
        let mut done = 0;
        while done < y.len() / row_len {
            let row = i * rows + done;
            let (image, oy) = (row / d.ho, row % d.ho);
            let num = (y.len() / row_len - done).min(d.ho - oy);
            let below = (num - 1) * d.stride + d.kh;
            with_scratch((below * width * c).div_ceil(2), |seen| {
                let seen = &mut bytemuck::cast_slice_mut::<f32, i16>(seen)[..below * width * c];
                let y = &mut y[done * row_len..][..num * row_len];
                let finish = finish.of_part(row * row_len);
                dispatch(Look { x, input, d, image, oy, c, seen });
                dispatch(Multiply { taps, offsets: &offsets, seen, d, c, finish, y });
            });
            done += num;
        }
    });
}

/// Writes the rows of pixels below the taps of the outputs from row `oy` on to `seen`, less the zero point.
struct Look<'a> {
    x: Source<'a>,
    input: Affine,
    d: Dims,
    image: usize,
    oy: usize,
    /// Channels in `seen`.
    c: usize,
    seen: &'a mut [i16],
}

impl WithSimd for Look<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, input, d, image, oy, c, seen } = self;
        let width = d.w + 2 * d.padding;
        for (i, seen) in seen.chunks_exact_mut(width * c).enumerate() {
            // Rows above the image wrap to values beyond it.
            let iy = (oy * d.stride + i).wrapping_sub(d.padding);
            if iy >= d.h {
                seen.fill(0);
                continue;
            }
            let (left, right) = (d.padding * c, (d.padding + d.w) * c);
            seen[..left].fill(0);
            seen[right..].fill(0);
            if c == d.c {
                x.pixels(input, (image * d.h + iy) * d.w, d.w, c, &mut seen[left..right]);
                continue;
            }
            for (column, seen) in seen[left..right].chunks_exact_mut(c).enumerate() {
                x.pixel(input, (image * d.h + iy) * d.w + column, d.c, &mut seen[..d.c]);
                seen[d.c..].fill(0);
            }
        }
    }
}

/// Computes rows of results.
struct Multiply<'a, T> {
    taps: &'a Taps,
    /// Distances of the taps from the first one.
    offsets: &'a [usize],
    seen: &'a [i16],
    d: Dims,
    /// Channels in `seen`.
    c: usize,
    finish: Finish<'a>,
    y: &'a mut [T],
}

impl<T: Element> WithSimd for Multiply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { taps, offsets, seen, d, c, finish, y } = self;
        let last = offsets.last().map_or(0, |last| last + (d.wo - 1) * d.stride * c + c);
        let (below, num) = (d.stride * (d.w + 2 * d.padding) * c, y.len() / (d.wo * d.co));
        assert!(seen.len() >= last + (num - 1) * below, "rows below the taps");
        assert_eq!(taps.filter.len(), c * taps.pairs * 2);
        for row in 0..num {
            for channel in (0..c).step_by(LANES) {
                let filter = &taps.filter[channel * taps.pairs * 2..][..taps.pairs * 2 * LANES];
                for ox in 0..d.wo {
                    let seen = &seen[row * below + ox * d.stride * c + channel..];
                    let mut sums = [0.0; LANES];
                    #[cfg(target_arch = "x86_64")]
                    if taps.has_avx2 {
                        // SAFETY: the machine has the instructions, and the vectors at the taps lie within the rows.
                        unsafe { x86::sums(seen.as_ptr(), offsets, filter, &mut sums) };
                    }
                    if !taps.has_avx2 {
                        portable(seen, offsets, filter, &mut sums);
                    }
                    let at = (row * d.wo + ox) * d.co + channel;
                    finish.lanes(simd, &sums, channel, at, &mut y[at..][..LANES.min(d.co - channel)]);
                }
            }
        }
    }
}

#[inline(always)]
fn portable(seen: &[i16], offsets: &[usize], filter: &[i16], sums: &mut [f32; LANES]) {
    let mut totals = [0; LANES];
    for pair in 0..offsets.len() / 2 {
        let (a, b) = (&seen[offsets[2 * pair]..][..LANES], &seen[offsets[2 * pair + 1]..][..LANES]);
        let filter = &filter[2 * LANES * pair..][..2 * LANES];
        for j in 0..LANES {
            totals[j] += i32::from(a[j]) * i32::from(filter[2 * j]) + i32::from(b[j]) * i32::from(filter[2 * j + 1]);
        }
    }
    *sums = totals.map(|total| total as f32);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::LANES;

    /// # Safety
    /// There is a vector of 16 values at each of the offsets, and a pair of weights for each pair of them.
    #[target_feature(enable = "avx2")]
    #[inline]
    pub(super) unsafe fn sums(seen: *const i16, offsets: &[usize], filter: &[i16], sums: &mut [f32; LANES]) {
        let (mut low, mut high) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        let filter: *const __m256i = filter.as_ptr().cast();
        // Plain loops: iterators and closures may be compiled without these instructions.
        for pair in 0..offsets.len() / 2 {
            // SAFETY: by the contract.
            unsafe {
                let a = _mm256_loadu_si256(seen.add(*offsets.get_unchecked(2 * pair)).cast());
                let b = _mm256_loadu_si256(seen.add(*offsets.get_unchecked(2 * pair + 1)).cast());
                let (of_low, of_high) =
                    (_mm256_loadu_si256(filter.add(2 * pair)), _mm256_loadu_si256(filter.add(2 * pair + 1)));
                low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), of_low));
                high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), of_high));
            }
        }
        let (first, second) = (_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
        // SAFETY: 16 sums of 32 bits are two vectors.
        unsafe {
            _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_cvtepi32_ps(first));
            _mm256_storeu_ps(sums.as_mut_ptr().add(8), _mm256_cvtepi32_ps(second));
        }
    }
}
