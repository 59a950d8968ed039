//! The parameter update of AdamW, in place.

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor};
use rayon::prelude::*;

use super::slice;

/// Elements a worker takes at a time.
const BLOCK: usize = 64 * 1024;
/// Added to the root of the mean squared gradient; PyTorch's default.
const EPS: f64 = 1e-8;

/// Hyper-parameters of one update, as in PyTorch's `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the mean gradient and of the mean squared gradient.
    pub betas: [f64; 2],
    /// Share of the parameter, times `lr`, that is taken off in each step.
    pub weight_decay: f64,
    /// What the gradient is multiplied by first, for clipping.
    pub grad_scale: f64,
    /// Number of this step, from 1: the means start at zero, and are corrected for it.
    pub num_steps: u64,
}

/// Updates the two means and the parameter by algorithm 2 of Loshchilov and Hutter (ICLR 2019) with PyTorch's order of
/// operations; all of one shape, f32, the means zero before the first step.
///
/// # Errors
/// When a tensor is not contiguous, not f32 or of another size.
pub fn adamw_step(param: &Tensor, mean: &Tensor, square: &Tensor, grad: &Tensor, step: AdamWStep) -> Result<()> {
    let grad = grad.contiguous()?;
    let [beta1, beta2] = step.betas;
    mean.inplace_op2(&grad, &UpdateMean { beta: beta1, grad_scale: step.grad_scale, power: 1 })?;
    square.inplace_op2(&grad, &UpdateMean { beta: beta2, grad_scale: step.grad_scale, power: 2 })?;
    param.inplace_op3(mean, square, &UpdateParam(step))
}

/// `m = beta * m + (1 - beta) * (grad_scale * grad) ^ power`.
struct UpdateMean {
    beta: f64,
    grad_scale: f64,
    power: i32,
}

impl InplaceOp2 for UpdateMean {
    fn name(&self) -> &'static str {
        "adamw_mean"
    }

    fn cpu_fwd(&self, m: &mut CpuStorage, ml: &Layout, g: &CpuStorage, gl: &Layout) -> Result<()> {
        let m = slice::cpu_f32_mut("adamw_step", m, ml)?;
        let g = slice::cpu::<f32>("adamw_step", g, gl)?;
        if m.len() != g.len() {
            candle_core::bail!("adamw_step: {} parameters, {} gradients", m.len(), g.len());
        }
        let (beta, rest, scale) = (self.beta as f32, (1.0 - self.beta) as f32, self.grad_scale as f32);
        m.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).for_each(|(m, g)| {
            for (m, &g) in m.iter_mut().zip(g) {
                *m = beta * *m + rest * (scale * g).powi(self.power);
            }
        });
        Ok(())
    }
}

/// `p -= lr * weight_decay * p`, then `p -= lr * mean / (sqrt(square) + eps)` with both means corrected.
struct UpdateParam(AdamWStep);

impl InplaceOp3 for UpdateParam {
    fn name(&self) -> &'static str {
        "adamw_param"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        pl: &Layout,
        mean: &CpuStorage,
        ml: &Layout,
        square: &CpuStorage,
        sl: &Layout,
    ) -> Result<()> {
        let p = slice::cpu_f32_mut("adamw_step", p, pl)?;
        let (m, s) = (slice::cpu::<f32>("adamw_step", mean, ml)?, slice::cpu::<f32>("adamw_step", square, sl)?);
        if p.len() != m.len() || p.len() != s.len() {
            candle_core::bail!("adamw_step: {} parameters, {} and {} means", p.len(), m.len(), s.len());
        }
        let AdamWStep { lr, betas: [beta1, beta2], weight_decay, num_steps, .. } = self.0;
        let num_steps = num_steps as f64;
        let keep = (1.0 - lr * weight_decay) as f32;
        let rate = (lr / (1.0 - beta1.powf(num_steps))) as f32;
        let (root, eps) = ((1.0 - beta2.powf(num_steps)).sqrt() as f32, EPS as f32);
        let means = m.par_chunks(BLOCK).zip(s.par_chunks(BLOCK));
        p.par_chunks_mut(BLOCK).zip(means).for_each(|(p, (m, s))| {
            for ((p, &m), &s) in p.iter_mut().zip(m).zip(s) {
                *p = keep * *p - rate * m / (s.sqrt() / root + eps);
            }
        });
        Ok(())
    }
}
