//! The parameter update of SGD with momentum and weight decay: one pass over parameter, gradient and velocity.

use candle_core::Result;

use super::update::update;

/// Hyper-parameters of one update, as in PyTorch's `torch.optim.SGD`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f64,
    /// Factor of the previous velocity.
    pub momentum: f64,
    /// L2 penalty, added to the gradient as `weight_decay * param`.
    pub weight_decay: f64,
    /// Factor that the gradient is multiplied by first, for clipping.
    pub grad_scale: f64,
}

/// Updates `velocity = momentum * velocity + grad_scale * grad + weight_decay * param`, then `param -= lr * velocity`;
/// all have the same size. A zero velocity makes the first step PyTorch's.
///
/// # Errors
/// When the sizes differ.
pub fn sgd_step(param: &mut [f32], velocity: &mut [f32], grad: &[f32], step: SgdStep) -> Result<()> {
    let (momentum, decay) = (step.momentum as f32, step.weight_decay as f32);
    let (scale, lr) = (step.grad_scale as f32, step.lr as f32);
    update("sgd_step", param, grad, [velocity], |param, grad, [velocity]| {
        for ((p, g), v) in param.iter_mut().zip(grad).zip(velocity) {
            *v = momentum * *v + (scale * g + decay * *p);
            *p -= lr * *v;
        }
    })
}
