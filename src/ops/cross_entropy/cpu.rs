//! CPU kernels over rows of logits. Sums are in f64, and the rows' losses are added in order.

use crate::parallel::{self, Each};
use candle_core::WithDType;
use rayon::prelude::*;

pub(super) fn forward<T: WithDType>(x: &[T], labels: &[i64]) -> f64 {
    let k = (x.len() / labels.len().max(1)).max(1);
    let rows = parallel::map(labels.len(), |row| {
        let label = usize::try_from(labels[row]).ok()?;
        let x = &x[row * k..][..k];
        let (max, sum) = max_and_sum(x);
        Some(max + sum.ln() - x[label].to_f64())
    });
    let counted = rows.iter().flatten().count();
    rows.iter().flatten().sum::<f64>() / counted.max(1) as f64
}

/// Returns `(softmax - one_hot) * gy / (rows with a label)`; 0 in rows without one.
pub(super) fn backward<T: WithDType>(x: &[T], labels: &[i64], gy: T) -> Vec<T> {
    let k = (x.len() / labels.len().max(1)).max(1);
    let counted = labels.iter().filter(|&&l| l >= 0).count();
    let scale = gy.to_f64() / counted.max(1) as f64;
    let mut gx = vec![T::zero(); x.len()];
    gx.par_chunks_mut(k).zip(x.par_chunks(k)).zip(labels).each(&|((gx, x), &label)| {
        let Ok(label) = usize::try_from(label) else { return };
        let (max, sum) = max_and_sum(x);
        gx.iter_mut().zip(x).for_each(|(gx, x)| *gx = T::from_f64((x.to_f64() - max).exp() / sum * scale));
        gx[label] -= T::from_f64(scale);
    });
    gx
}

/// Returns the largest logit and the sum of `exp(logit - largest)`. A NaN anywhere makes the sum NaN.
fn max_and_sum<T: WithDType>(x: &[T]) -> (f64, f64) {
    let max = x.iter().fold(f64::NEG_INFINITY, |m, x| m.max(x.to_f64()));
    (max, x.iter().map(|x| (x.to_f64() - max).exp()).sum())
}
