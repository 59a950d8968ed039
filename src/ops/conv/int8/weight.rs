//! Quantised weights.

use candle_core::{Result, bail};

/// Largest quantised weight; the smallest is its negative.
const LARGEST: f32 = 127.0;

/// A filter `(co, c / groups, kh, kw)` of signed bytes, with a scale for each output channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Int8Weight {
    shape: [usize; 4],
    values: Vec<i8>,
    scales: Vec<f32>,
}

impl Int8Weight {
    /// Returns a filter of quantised values.
    ///
    /// # Errors
    /// When the lengths do not fit, a value is -128, or a scale is not a positive number.
    pub fn new(shape: [usize; 4], values: Vec<i8>, scales: Vec<f32>) -> Result<Self> {
        if values.len() != shape.iter().product::<usize>() || scales.len() != shape[0] || values.is_empty() {
            bail!("int8 weight: {} values and {} scales of {shape:?}", values.len(), scales.len());
        }
        if values.contains(&i8::MIN) {
            bail!("int8 weight: expected values from -127 to 127, found -128");
        }
        if let Some(scale) = scales.iter().find(|scale| !(scale.is_finite() && **scale > 0.0)) {
            bail!("int8 weight: expected positive scales, found {scale}");
        }
        Ok(Self { shape, values, scales })
    }

    /// Quantises a filter, each output channel by its largest absolute value.
    ///
    /// # Errors
    /// When the length does not fit, or a weight is not finite.
    pub fn quantise(w: &[f32], shape: [usize; 4]) -> Result<Self> {
        let per_output: usize = shape[1..].iter().product();
        if w.len() != shape.iter().product::<usize>() || w.is_empty() {
            bail!("int8 weight: {} values of {shape:?}", w.len());
        }
        if let Some(value) = w.iter().find(|value| !value.is_finite()) {
            bail!("int8 weight: {value} among the weights");
        }
        let (mut values, mut scales) = (Vec::with_capacity(w.len()), Vec::with_capacity(shape[0]));
        for w in w.chunks_exact(per_output) {
            let largest = w.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            // Of zeros, and of numbers so small that their steps would underflow, any scale will do.
            let scale = if largest / LARGEST < f32::MIN_POSITIVE { 1.0 } else { largest / LARGEST };
            values.extend(w.iter().map(|value| (value / scale).round_ties_even().clamp(-LARGEST, LARGEST) as i8));
            scales.push(scale);
        }
        Self::new(shape, values, scales)
    }

    /// The shape `(co, c / groups, kh, kw)`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The quantised values, from -127 to 127.
    pub fn values(&self) -> &[i8] {
        &self.values
    }

    /// The scale of each output channel.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Returns the weights that the quantised values stand for.
    pub fn dequantised(&self) -> Vec<f32> {
        let per_output: usize = self.shape[1..].iter().product();
        self.values.iter().enumerate().map(|(i, value)| f32::from(*value) * self.scales[i / per_output]).collect()
    }
}
