//! What is done with sums.

use pulp::Simd;

use super::LANES;
use super::product::Sums;
use crate::ops::lanes::{load, prelu, store};

/// Maps of sums per output channel: `z = scale * sum + shift`, then `z` above zero and `slope * z` elsewhere. Each has
/// [`LANES`] more elements than there are channels, so that vectors of channels are full.
#[derive(Clone, Debug)]
pub(super) struct Maps {
    scale: Vec<f32>,
    shift: Vec<f32>,
    slope: Vec<f32>,
    channels: usize,
}

impl Maps {
    pub fn new(scale: impl Iterator<Item = f32>, channels: usize) -> Self {
        let len = channels + LANES;
        let mut scale: Vec<f32> = scale.collect();
        scale.resize(len, 0.0);
        Self { scale, shift: vec![0.0; len], slope: vec![1.0; len], channels }
    }

    /// Returns the maps with another one after them, per channel; they had no slopes.
    pub fn followed_by(mut self, [scale, shift]: [&[f32]; 2], slope: Option<&[f32]>) -> Self {
        let lengths = [Some(scale), Some(shift), slope].into_iter().flatten().map(<[f32]>::len);
        assert!(lengths.into_iter().all(|len| len == self.channels), "a map of {} channels", self.channels);
        for i in 0..self.channels {
            self.scale[i] *= scale[i];
            self.shift[i] = self.shift[i].mul_add(scale[i], shift[i]);
        }
        if let Some(slope) = slope {
            self.slope[..slope.len()].copy_from_slice(slope);
        }
        self
    }

    /// Returns maps to numbers of steps of this length.
    pub fn in_steps_of(mut self, step: f32) -> Self {
        self.scale.iter_mut().chain(&mut self.shift).for_each(|value| *value /= step);
        self
    }
}

/// More steps than a byte can have, and fewer than an integer of 32 bits.
const MOST_STEPS: f32 = (1 << 30) as f32;

/// An element of the result.
pub(super) trait Element: Copy + Send {
    /// Writes up to [`LANES`] values, or numbers of steps from the byte `zero`.
    fn write(values: &[f32; LANES], zero: u8, y: &mut [Self]);
}

impl Element for f32 {
    #[inline(always)]
    fn write(values: &[f32; LANES], _: u8, y: &mut [Self]) {
        match y.first_chunk_mut() {
            Some(y) => *y = *values,
            None => y.copy_from_slice(&values[..y.len()]),
        }
    }
}

impl Element for u8 {
    #[inline(always)]
    fn write(steps: &[f32; LANES], zero: u8, y: &mut [Self]) {
        let bytes = to_bytes(steps, zero);
        match y.first_chunk_mut() {
            Some(y) => *y = bytes,
            None => y.copy_from_slice(&bytes[..y.len()]),
        }
    }
}

/// Returns the bytes of numbers of up to [`MOST_STEPS`] steps from `zero`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn to_bytes(steps: &[f32; LANES], zero: u8) -> [u8; LANES] {
    use std::arch::x86_64::*;

    let mut bytes = [0; LANES];
    // SAFETY: every such processor has SSE2, and the loads and the store are of 16 bytes each.
    unsafe {
        let rounded = |at: usize| _mm_cvtps_epi32(_mm_loadu_ps(steps.as_ptr().add(at)));
        let zero = _mm_set1_epi16(i16::from(zero));
        // The lowest number of 32 bits stands for numbers below it. All that follows saturates.
        let low = _mm_adds_epi16(_mm_packs_epi32(rounded(0), rounded(4)), zero);
        let high = _mm_adds_epi16(_mm_packs_epi32(rounded(8), rounded(12)), zero);
        _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm_packus_epi16(low, high));
    }
    bytes
}

/// Returns the bytes of numbers of up to [`MOST_STEPS`] steps from `zero`.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn to_bytes(steps: &[f32; LANES], zero: u8) -> [u8; LANES] {
    let mut bytes = [0; LANES];
    for j in 0..LANES {
        bytes[j] = (steps[j].round_ties_even() as i32).saturating_add(i32::from(zero)).clamp(0, 255) as u8;
    }
    bytes
}

/// The maps, and what is added last.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    maps: &'a Maps,
    /// What is added, of the shape of the result.
    residual: Option<&'a [f32]>,
    /// Place in the result that the elements are counted from.
    start: usize,
    /// The byte of zero, if the results are bytes.
    zero: Option<u8>,
}

impl<'a> Finish<'a> {
    pub fn new(maps: &'a Maps, residual: Option<&'a [f32]>, zero: Option<u8>) -> Self {
        Self { maps, residual, start: 0, zero }
    }

    /// The same for the part of the result from `at` on.
    #[inline(always)]
    pub fn of_part(self, at: usize) -> Self {
        Self { start: self.start + at, ..self }
    }

    /// Writes the results of the sums of one pixel for the channels from `channel` on to `y`, of up to [`LANES`]
    /// elements; `at` is the place of the first of them among the elements that `self` is for.
    #[inline(always)]
    pub fn lanes<S: Simd, T: Element>(&self, simd: S, sums: &[f32; LANES], channel: usize, at: usize, y: &mut [T]) {
        let Self { maps: Maps { scale, shift, slope, channels }, residual, start, zero } = self;
        assert!(channel < *channels && y.len() <= LANES);
        let mut values = [0.0; LANES];
        for lane in (0..LANES).step_by(S::F32_LANES) {
            // SAFETY: maps have [`LANES`] elements more than there are channels, and so many sums and values are there.
            unsafe {
                let [scale, shift] = [load::<S>(scale, channel + lane), load::<S>(shift, channel + lane)];
                let value = simd.mul_add_e_f32s(load::<S>(sums, lane), scale, shift);
                let mut value = prelu(simd, value, load::<S>(slope, channel + lane));
                if zero.is_some() {
                    // In this order a NaN becomes the bound.
                    value = simd.min_f32s(value, simd.splat_f32s(MOST_STEPS));
                }
                store::<S>(&mut values, lane, value);
            }
        }
        if let Some(residual) = residual {
            let residual = &residual[start + at..][..y.len()];
            for j in 0..residual.len() {
                values[j] += residual[j];
            }
        }
        T::write(&values, zero.unwrap_or(0), y);
    }

    /// Writes the results of `rows` pixels' sums, `width` outputs each, for the channels from `channel` on of `co`. `y`
    /// and `self` are for the first pixel's channels and what follows them.
    #[inline(always)]
    pub fn tile<S: Simd, T: Element>(
        &self,
        simd: S,
        sums: &Sums,
        [rows, width]: [usize; 2],
        [channel, co]: [usize; 2],
        y: &mut [T],
    ) {
        for row in 0..rows {
            for lane in (0..width.min(co - channel)).step_by(LANES) {
                let channel = channel + lane;
                let sums = sums[row * width + lane..].first_chunk().expect("a tile's width is whole vectors");
                let at = row * co + channel;
                self.lanes(simd, sums, channel, at, &mut y[at..][..LANES.min(co - channel)]);
            }
        }
    }
}
