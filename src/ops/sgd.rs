//! The parameter update of SGD with momentum and weight decay, in place.

use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor};
use rayon::prelude::*;

use super::slice;

/// Elements a worker takes at a time.
const BLOCK: usize = 64 * 1024;

/// Hyper-parameters of one update, as in PyTorch's `torch.optim.SGD`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f64,
    /// Share of the previous update that is kept.
    pub momentum: f64,
    /// L2 penalty, added to the gradient as `weight_decay * param`.
    pub weight_decay: f64,
    /// What the gradient is multiplied by first, for clipping.
    pub grad_scale: f64,
}

/// Updates `velocity = momentum * velocity + grad_scale * grad + weight_decay * param`, then
/// `param -= lr * velocity`; all of one shape, f32. A zero velocity makes the first step PyTorch's.
///
/// # Errors
/// When a tensor is not contiguous, not f32 or of another size.
pub fn sgd_step(param: &Tensor, velocity: &Tensor, grad: &Tensor, step: SgdStep) -> Result<()> {
    velocity.inplace_op3(param, &grad.contiguous()?, &UpdateVelocity(step))?;
    param.inplace_op2(velocity, &UpdateParam(step))
}

struct UpdateVelocity(SgdStep);

impl InplaceOp3 for UpdateVelocity {
    fn name(&self) -> &'static str {
        "sgd_velocity"
    }

    fn cpu_fwd(
        &self,
        v: &mut CpuStorage,
        vl: &Layout,
        p: &CpuStorage,
        pl: &Layout,
        g: &CpuStorage,
        gl: &Layout,
    ) -> Result<()> {
        let v = slice::cpu_f32_mut("sgd_step", v, vl)?;
        let (p, g) = (slice::cpu::<f32>("sgd_step", p, pl)?, slice::cpu::<f32>("sgd_step", g, gl)?);
        if v.len() != p.len() || v.len() != g.len() {
            candle_core::bail!("sgd_step: {} parameters, {} gradients, {} velocities", p.len(), g.len(), v.len());
        }
        let (momentum, decay, scale) = (self.0.momentum as f32, self.0.weight_decay as f32, self.0.grad_scale as f32);
        v.par_chunks_mut(BLOCK).zip(p.par_chunks(BLOCK).zip(g.par_chunks(BLOCK))).for_each(|(v, (p, g))| {
            for ((v, &p), &g) in v.iter_mut().zip(p).zip(g) {
                *v = momentum * *v + (scale * g + decay * p);
            }
        });
        Ok(())
    }
}

struct UpdateParam(SgdStep);

impl InplaceOp2 for UpdateParam {
    fn name(&self) -> &'static str {
        "sgd_param"
    }

    fn cpu_fwd(&self, p: &mut CpuStorage, pl: &Layout, v: &CpuStorage, vl: &Layout) -> Result<()> {
        let p = slice::cpu_f32_mut("sgd_step", p, pl)?;
        let v = slice::cpu::<f32>("sgd_step", v, vl)?;
        let lr = self.0.lr as f32;
        p.par_chunks_mut(BLOCK).zip(v.par_chunks(BLOCK)).for_each(|(p, v)| {
            p.iter_mut().zip(v).for_each(|(p, &v)| *p -= lr * v);
        });
        Ok(())
    }
}
