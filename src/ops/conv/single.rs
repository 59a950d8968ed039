//! f32 convolutions, each by the method that fits it; none where the definition has to do.

use pulp::Arch;

use super::{Dims, depthwise, patches, winograd};

/// The convolution of `x`.
pub(super) fn forward(x: &[f32], w: &[f32], d: Dims) -> Option<Vec<f32>> {
    let forward = match () {
        () if winograd::fits(d) => winograd::forward,
        () if depthwise::fits(d) => depthwise::forward,
        () if patches::fits(d) => patches::forward,
        () => return None,
    };
    Some(forward(x, w, d, Arch::new()))
}

/// The gradient of the input.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims) -> Option<Vec<f32>> {
    let grad_x = match () {
        () if winograd::fits(d) => winograd::grad_x,
        () if depthwise::fits(d) => depthwise::grad_x,
        () if patches::fits_grad_x(d) => patches::grad_x,
        () => return None,
    };
    Some(grad_x(gy, w, d, Arch::new()))
}

/// The gradient of the weight.
pub(super) fn grad_w(x: &[f32], gy: &[f32], d: Dims) -> Option<Vec<f32>> {
    let grad_w = match () {
        () if winograd::fits(d) => winograd::grad_w,
        () if depthwise::fits(d) => depthwise::grad_w,
        () if patches::fits(d) => patches::grad_w,
        () => return None,
    };
    Some(grad_w(x, gy, d, Arch::new()))
}
