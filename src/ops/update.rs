//! In-place pass over a parameter, its gradient and the optimiser's moments of it.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::simd::simd;
use super::slice;
use crate::parallel::{self, Each};

/// Elements that a worker thread takes at a time.
const BLOCK: usize = 64 * 1024;

/// Calls `f` with every element of `to` and the corresponding element of `from`.
pub(crate) fn each_pair(to: &mut [f32], from: &[f32], f: impl Fn(&mut f32, f32) + Sync) {
    to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK)).each(&|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, from)| f(to, *from));
    });
}

/// Optimiser state of a parameter: `M` numbers per element.
pub(super) struct Moments<'a, const M: usize>(pub [&'a mut [f32]; M]);

/// Calls `f` with blocks of the parameter, the gradient and the moments.
pub(super) fn update<const M: usize>(
    op: &'static str,
    param: &Tensor,
    grad: &[f32],
    moments: Moments<M>,
    f: impl Fn(&mut [f32], &[f32], [&mut [f32]; M]) + Sync,
) -> Result<()> {
    param.inplace_op1(&Update { op, grad, moments: Mutex::new(moments), f })
}

struct Update<'a, F, const M: usize> {
    op: &'static str,
    grad: &'a [f32],
    moments: Mutex<Moments<'a, M>>,
    f: F,
}

impl<F: Fn(&mut [f32], &[f32], [&mut [f32]; M]) + Sync, const M: usize> InplaceOp1 for Update<'_, F, M> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, param: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let param = slice::cpu_f32_mut(self.op, param, layout)?;
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        if param.len() != self.grad.len() || moments.0.iter().any(|m| m.len() != param.len()) {
            bail!("{}: {} parameters, {} gradients", self.op, param.len(), self.grad.len());
        }
        let mut rest = moments.0.each_mut().map(|moments| &mut **moments);
        let mut blocks = Vec::new();
        for (param, grad) in param.chunks_mut(BLOCK).zip(self.grad.chunks(BLOCK)) {
            let block = rest.each_mut().map(|rest| {
                let (block, others) = std::mem::take(rest).split_at_mut(grad.len());
                *rest = others;
                block
            });
            blocks.push((param, grad, block));
        }
        blocks.into_par_iter().each(&|(param, grad, moments)| simd(|| (self.f)(param, grad, moments)));
        Ok(())
    }
}

/// Returns the sum of the squares; blocks are added in order.
pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
    let of_block = |x: &[f32]| {
        let mut sums = [0f32; 64];
        simd(|| {
            for x in x.chunks(64) {
                sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
            }
        });
        sums.iter().map(|sum| f64::from(*sum)).sum::<f64>()
    };
    let blocks: Vec<&[f32]> = x.chunks(16 * 1024).collect();
    let blocks = parallel::map(blocks.len(), |block| of_block(blocks[block]));
    blocks.iter().sum()
}
