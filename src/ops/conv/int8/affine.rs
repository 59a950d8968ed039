//! Numbers as unsigned bytes.

use candle_core::{Result, bail};

use super::product::Column;
use crate::ops::conv::Prologue;

/// Largest byte.
const MOST: f32 = 255.0;

/// Bytes `q` for numbers `scale (q - zero)`. Zero has a byte of its own, so that padding is exact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// Distance of neighbouring numbers, above 0.
    pub scale: f32,
    /// The byte of zero.
    pub zero: u8,
}

impl Affine {
    /// Returns the bytes of a scale and the byte of zero.
    ///
    /// # Errors
    /// When the scale is not a positive number.
    pub fn new(scale: f32, zero: u8) -> Result<Self> {
        if !(scale.is_finite() && scale >= f32::MIN_POSITIVE) {
            bail!("the scale of an activation: expected a positive number, found {scale}");
        }
        Ok(Self { scale, zero })
    }

    /// Returns the bytes that cover the numbers from `lowest` to `highest`, and zero.
    ///
    /// # Errors
    /// When they are not finite or not in this order.
    pub fn covering(lowest: f32, highest: f32) -> Result<Self> {
        if !(lowest <= highest && (highest - lowest).is_finite()) {
            bail!("8 bits for the numbers from {lowest} to {highest}");
        }
        let (lowest, highest) = (lowest.min(0.0), highest.max(0.0));
        // Numbers so small that their steps would underflow are zeros.
        let scale = (highest - lowest) / MOST;
        if scale < f32::MIN_POSITIVE {
            return Ok(Self { scale: 1.0, zero: 0 });
        }
        Ok(Self { scale, zero: (-lowest / scale).round_ties_even().clamp(0.0, MOST) as u8 })
    }

    /// Returns the byte of the nearest number, of two the even one; that of 0 for NaN.
    #[inline(always)]
    pub fn quantise(self, value: f32) -> u8 {
        (self.steps(value) + i32::from(self.zero)) as u8
    }

    /// Returns the number of a byte.
    pub fn value(self, byte: u8) -> f32 {
        self.scale * f32::from(i16::from(byte) - i16::from(self.zero))
    }

    /// Steps from zero to a number, within the bytes.
    #[inline(always)]
    fn steps(self, value: f32) -> i32 {
        let zero = f32::from(self.zero);
        let steps = (value * self.scale.recip()).round_ties_even();
        // In this order a NaN becomes the lower bound in vectors too, and then 0.
        let steps = if steps > -zero { steps } else { -zero };
        let steps = if steps < MOST - zero { steps } else { MOST - zero };
        let steps = if value.is_nan() { 0.0 } else { steps };
        // SAFETY: from -255 to 255.
        unsafe { steps.to_int_unchecked() }
    }

    /// Writes the columns of numbers that a prologue is applied to.
    #[inline(always)]
    pub(super) fn quantise_all<C: Column>(self, values: &[f32], prologue: Prologue, columns: &mut [C]) {
        let len = columns.len();
        let values = &values[..len];
        // Closures might not be inlined, and so be compiled without the machine's vectors.
        macro_rules! each {
            (|$i:ident, $x:ident| $value:expr) => {
                for $i in 0..len {
                    let $x = values[$i];
                    columns[$i] = C::of_steps(self, self.steps($value));
                }
            };
        }
        match (prologue.affine, prologue.slope) {
            (None, None) => each!(|i, x| x),
            (None, Some(slope)) => {
                let slope = &slope[..len];
                each!(|i, x| prelu(x, slope[i]));
            }
            (Some([scale, shift]), None) => {
                let (scale, shift) = (&scale[..len], &shift[..len]);
                each!(|i, x| x.mul_add(scale[i], shift[i]));
            }
            (Some([scale, shift]), Some(slope)) => {
                let (scale, shift, slope) = (&scale[..len], &shift[..len], &slope[..len]);
                each!(|i, x| prelu(x.mul_add(scale[i], shift[i]), slope[i]));
            }
        }
    }
}

#[inline(always)]
fn prelu(x: f32, slope: f32) -> f32 {
    if x > 0.0 { x } else { x * slope }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_within_half_a_step_and_zero_exactly() -> Result<()> {
        for [lowest, highest] in [[-1.0, 3.0], [0.5, 2.0], [-4.0, -1.0], [-0.3, 0.3]] {
            let affine = Affine::covering(lowest, highest)?;
            assert_eq!(affine.value(affine.quantise(0.0)), 0.0);
            for i in 0..=1000 {
                let value = lowest + (highest - lowest) * i as f32 / 1000.0;
                let found = affine.value(affine.quantise(value));
                // At the ends, the zero's rounding may cost another half.
                assert!((found - value).abs() <= affine.scale * 1.001, "{value} as {found} of {affine:?}");
                let inside = value > lowest + affine.scale && value < highest - affine.scale;
                assert!(!inside || (found - value).abs() <= affine.scale * 0.501, "{value} as {found} of {affine:?}");
            }
            assert_eq!([f32::NEG_INFINITY, f32::INFINITY, 1e30].map(|value| affine.quantise(value)), [0, 255, 255]);
            assert_eq!(affine.quantise(f32::NAN), affine.zero);
        }
        assert_eq!(Affine::covering(0.0, 0.0)?, Affine { scale: 1.0, zero: 0 });
        assert!(Affine::covering(1.0, 0.0).is_err() && Affine::covering(f32::NAN, 1.0).is_err());
        assert!(Affine::covering(0.0, f32::INFINITY).is_err());
        Ok(())
    }
}
