//! Code that the f32 convolutions share: vectors of channels, small matrix products in registers, and the maps applied
//! to inputs and outputs.

pub(super) mod product;
pub(super) mod sums;

use pulp::{Simd, WithSimd};

use crate::ops::lanes;

/// With a multiple of this many channels, vectors of channels are full on every machine.
pub(super) const CHANNELS: usize = 16;

/// Map applied to each input value before it is used, in this order; the zeros around the image stay zeros.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Prologue<'a> {
    /// Scale and shift per channel.
    pub affine: Option<[&'a [f32]; 2]>,
    /// PReLU slope per channel.
    pub slope: Option<&'a [f32]>,
}

impl Prologue<'_> {
    /// Whether the map changes nothing.
    pub fn is_identity(&self) -> bool {
        self.affine.is_none() && self.slope.is_none()
    }

    /// Whether there are constants for exactly `channels` channels.
    pub fn fits(&self, channels: usize) -> bool {
        self.affine.iter().flatten().chain(&self.slope).all(|constants| constants.len() == channels)
    }

    /// Applies the map to a vector of the channels from `channel` on.
    ///
    /// # Safety
    /// [`Self::fits`] holds, and the vector from `channel` on lies within the channels.
    #[inline(always)]
    pub unsafe fn apply<S: Simd>(&self, simd: S, mut value: S::f32s, channel: usize) -> S::f32s {
        // SAFETY: by the contract.
        unsafe {
            if let Some([scale, shift]) = self.affine {
                value = simd.mul_add_e_f32s(value, lanes::load::<S>(scale, channel), lanes::load::<S>(shift, channel));
            }
            if let Some(slope) = self.slope {
                value = lanes::prelu(simd, value, lanes::load::<S>(slope, channel));
            }
            value
        }
    }

    /// Applies the map to `N` vectors of the channels from `channel` on, loading the constants once.
    ///
    /// # Safety
    /// Same as [`Self::apply`].
    #[inline(always)]
    pub unsafe fn apply_to<S: Simd, const N: usize>(&self, simd: S, values: &mut [S::f32s; N], channel: usize) {
        // SAFETY: by the contract.
        unsafe {
            if let Some([scale, shift]) = self.affine {
                let (scale, shift) = (lanes::load::<S>(scale, channel), lanes::load::<S>(shift, channel));
                for value in values.iter_mut() {
                    *value = simd.mul_add_e_f32s(*value, scale, shift);
                }
            }
            if let Some(slope) = self.slope {
                let slope = lanes::load::<S>(slope, channel);
                for value in values.iter_mut() {
                    *value = lanes::prelu(simd, *value, slope);
                }
            }
        }
    }
}

/// Number of output channels of a packed block.
pub(super) struct Width;

impl WithSimd for Width {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        product::width::<S>()
    }
}

/// Map applied to each output value before it is stored, in this order.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Epilogue<'a> {
    /// Bias per channel.
    pub bias: Option<&'a [f32]>,
    /// PReLU slope per channel.
    pub slope: Option<&'a [f32]>,
    /// Added last, of the shape of the output.
    pub residual: Option<&'a [f32]>,
}

impl Epilogue<'_> {
    /// Whether the map changes nothing.
    pub fn is_identity(&self) -> bool {
        self.bias.is_none() && self.slope.is_none() && self.residual.is_none()
    }

    /// Whether there are constants for exactly `channels` channels and the residual has `elements`.
    pub fn fits(&self, channels: usize, elements: usize) -> bool {
        [self.bias, self.slope].iter().flatten().all(|constants| constants.len() == channels)
            && self.residual.is_none_or(|residual| residual.len() == elements)
    }

    /// Whether there are constants for exactly `channels` channels and the residual has the first `elements`.
    pub fn covers(&self, channels: usize, elements: usize) -> bool {
        [self.bias, self.slope].iter().flatten().all(|constants| constants.len() == channels)
            && self.residual.is_none_or(|residual| residual.len() >= elements)
    }

    /// Applies the map to a vector of the channels from `channel` on, which is at `at` in the output.
    ///
    /// # Safety
    /// [`Self::fits`] holds, and the vectors from `channel` and from `at` on lie within the constants and the residual.
    #[inline(always)]
    pub unsafe fn apply<S: Simd>(&self, simd: S, mut value: S::f32s, channel: usize, at: usize) -> S::f32s {
        // SAFETY: by the contract.
        unsafe {
            if let Some(bias) = self.bias {
                value = simd.add_f32s(value, lanes::load::<S>(bias, channel));
            }
            if let Some(slope) = self.slope {
                value = lanes::prelu(simd, value, lanes::load::<S>(slope, channel));
            }
            if let Some(residual) = self.residual {
                value = simd.add_f32s(value, lanes::load::<S>(residual, at));
            }
            value
        }
    }
}
