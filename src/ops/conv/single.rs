//! f32 convolutions, each by the method that fits it; none where the definition has to do.

use pulp::Arch;

use super::{Dims, depthwise, patches, winograd};

type Pass = fn(&[f32], &[f32], Dims, Arch) -> Vec<f32>;

/// The passes of a method.
struct Method {
    forward: Pass,
    grad_x: Option<Pass>,
    grad_w: Pass,
}

impl Method {
    fn of(d: Dims) -> Option<Self> {
        if winograd::fits(d) {
            Some(Self { forward: winograd::forward, grad_x: Some(winograd::grad_x), grad_w: winograd::grad_w })
        } else if depthwise::fits(d) {
            Some(Self { forward: depthwise::forward, grad_x: Some(depthwise::grad_x), grad_w: depthwise::grad_w })
        } else if patches::fits(d) {
            let grad_x = patches::fits_grad_x(d).then_some(patches::grad_x as Pass);
            Some(Self { forward: patches::forward, grad_x, grad_w: patches::grad_w })
        } else {
            None
        }
    }
}

/// The convolution of `x`.
pub(super) fn forward(x: &[f32], w: &[f32], d: Dims) -> Option<Vec<f32>> {
    Some((Method::of(d)?.forward)(x, w, d, Arch::new()))
}

/// The gradient of the input.
pub(super) fn grad_x(gy: &[f32], w: &[f32], d: Dims) -> Option<Vec<f32>> {
    Some((Method::of(d)?.grad_x?)(gy, w, d, Arch::new()))
}

/// The gradient of the weight.
pub(super) fn grad_w(x: &[f32], gy: &[f32], d: Dims) -> Option<Vec<f32>> {
    Some((Method::of(d)?.grad_w)(x, gy, d, Arch::new()))
}
