//! Convolutions of any sizes, for channel counts that fill no vectors: matrix products over tiles of patches with one
//! group, direct loops with several.

use rayon::prelude::*;

use super::kernel::{Epilogue, Prologue};
use super::{Dims, dense, grouped};
use crate::ops::simd::simd;
use crate::parallel::Each;

/// Writes `epilogue(conv(x, w))` to `y`.
pub(super) fn convolve(x: &[f32], w: &[f32], d: Dims, epilogue: Epilogue, y: &mut [f32]) {
    if d.groups == 1 {
        dense::forward(x, w, d, y)
    } else {
        grouped::forward(x, w, d, y)
    }
    finish(epilogue, d.co, y);
}

/// Writes the gradient of the input, passed through `epilogue`, to `gx`.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims, epilogue: Epilogue, gx: &mut [f32]) {
    if d.groups == 1 {
        dense::grad_x(gy, w, d, gx)
    } else {
        grouped::grad_x(gy, w, d, gx)
    }
    finish(epilogue, d.c, gx);
}

/// Writes the gradient of the weight to `gw`.
pub(super) fn grad_w(x: &[f32], gy: &[f32], d: Dims, gw: &mut [f32]) {
    if d.groups == 1 { dense::grad_w(x, gy, d, gw) } else { grouped::grad_w(x, gy, d, gw) }
}

/// Writes the map of `x: (.., channels)` to `y`.
pub(super) fn prepare(x: &[f32], prologue: Prologue, channels: usize, y: &mut [f32]) {
    y.par_chunks_mut(channels).zip(x.par_chunks(channels)).each(&|(y, x)| {
        simd(|| {
            for (c, (y, x)) in y.iter_mut().zip(x).enumerate() {
                let z = prologue.affine.map_or(*x, |[scale, shift]| x * scale[c] + shift[c]);
                *y = prologue.slope.map_or(z, |slope| prelu(z, slope[c]));
            }
        });
    });
}

/// Applies the map of outputs to `y: (.., channels)`.
fn finish(epilogue: Epilogue, channels: usize, y: &mut [f32]) {
    let Epilogue { bias, slope, residual } = epilogue;
    if epilogue.is_identity() {
        return;
    }
    y.par_chunks_mut(channels).enumerate().each(&|(row, y)| {
        simd(|| {
            for (c, y) in y.iter_mut().enumerate() {
                let z = *y + bias.map_or(0.0, |bias| bias[c]);
                let z = slope.map_or(z, |slope| prelu(z, slope[c]));
                *y = z + residual.map_or(0.0, |residual| residual[row * channels + c]);
            }
        });
    });
}

#[inline(always)]
fn prelu(z: f32, slope: f32) -> f32 {
    if z > 0.0 { z } else { z * slope }
}
