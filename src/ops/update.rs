//! In-place pass over a parameter, its gradient and the optimiser's moments of it.

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::simd::simd;
use crate::parallel::{self, Each};

/// Elements that a worker thread takes at a time.
const BLOCK: usize = 64 * 1024;

/// Calls `f` with every element of `to` and the corresponding element of `from`.
pub(crate) fn each_pair(to: &mut [f32], from: &[f32], f: impl Fn(&mut f32, f32) + Sync) {
    to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK)).each(&|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, from)| f(to, *from));
    });
}

/// Calls `f` with blocks of the parameters, the gradients and the moments, `M` numbers per parameter.
///
/// # Errors
/// When the sizes differ.
pub(super) fn update<const M: usize>(
    op: &'static str,
    param: &mut [f32],
    grad: &[f32],
    moments: [&mut [f32]; M],
    f: impl Fn(&mut [f32], &[f32], [&mut [f32]; M]) + Sync,
) -> Result<()> {
    if param.len() != grad.len() || moments.iter().any(|m| m.len() != param.len()) {
        bail!("{op}: {} parameters, {} gradients", param.len(), grad.len());
    }
    let mut rest = moments;
    let mut blocks = Vec::new();
    for (param, grad) in param.chunks_mut(BLOCK).zip(grad.chunks(BLOCK)) {
        let block = rest.each_mut().map(|rest| {
            let (block, others) = std::mem::take(rest).split_at_mut(grad.len());
            *rest = others;
            block
        });
        blocks.push((param, grad, block));
    }
    blocks.into_par_iter().each(&|(param, grad, moments)| simd(|| f(param, grad, moments)));
    Ok(())
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
