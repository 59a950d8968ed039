//! The parameter update of AdamW: one pass over parameter, gradient and the two means.

use candle_core::Result;

use super::update::update;

/// Added to the root of the mean squared gradient; PyTorch's default.
const EPS: f64 = 1e-8;

/// Hyper-parameters of one update, as in PyTorch's `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the mean gradient and of the mean squared gradient.
    pub betas: [f64; 2],
    /// Decoupled weight decay: a step takes `lr * weight_decay` times the parameter off the parameter.
    pub weight_decay: f64,
    /// Factor that the gradient is multiplied by first, for clipping.
    pub grad_scale: f64,
    /// Number of this step, from 1, for the bias correction: the means start at zero.
    pub num_steps: u64,
}

/// Updates the two means and the parameter by algorithm 2 of Loshchilov and Hutter (ICLR 2019) with PyTorch's order of
/// operations. All have the same size; the means must be zero before the first step.
///
/// # Errors
/// When the sizes differ.
pub fn adamw_step(param: &mut [f32], means: [&mut [f32]; 2], grad: &[f32], step: AdamWStep) -> Result<()> {
    let [beta1, beta2] = step.betas;
    let [keep_mean, keep_square] = [beta1 as f32, beta2 as f32];
    let [new_mean, new_square] = [(1.0 - beta1) as f32, (1.0 - beta2) as f32];
    let (scale, num_steps) = (step.grad_scale as f32, step.num_steps as f64);
    let keep = (1.0 - step.lr * step.weight_decay) as f32;
    let rate = (step.lr / (1.0 - beta1.powf(num_steps))) as f32;
    let (root, eps) = ((1.0 - beta2.powf(num_steps)).sqrt() as f32, EPS as f32);
    update("adamw_step", param, grad, means, |param, grad, [mean, square]| {
        for (((p, g), m), s) in param.iter_mut().zip(grad).zip(mean).zip(square) {
            let g = scale * g;
            *m = keep_mean * *m + new_mean * g;
            *s = keep_square * *s + new_square * (g * g);
            *p = keep * *p - rate * *m / (s.sqrt() / root + eps);
        }
    })
}
