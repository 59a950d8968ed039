//! CPU kernels of the margin: every cosine is clamped, and each row's target gets its margin.

use crate::parallel::Each;
use candle_core::WithDType;
use rayon::prelude::*;

pub(super) fn forward<T: WithDType>(x: &[T], labels: &[i64], target: impl Fn(f64, usize) -> f64 + Sync) -> Vec<T> {
    let mut y = vec![T::zero(); x.len()];
    let k = x.len() / labels.len().max(1);
    y.par_chunks_mut(k.max(1)).zip(x.par_chunks(k.max(1))).enumerate().each(&|(row, (y, x))| {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = clamp(x));
        if let Ok(label) = usize::try_from(labels[row]) {
            y[label] = T::from_f64(target(y[label].to_f64(), row));
        }
    });
    y
}

pub(super) fn backward<T: WithDType>(
    x: &[T],
    gy: &[T],
    labels: &[i64],
    slope: impl Fn(f64, usize) -> f64 + Sync,
) -> Vec<T> {
    let mut gx = vec![T::zero(); x.len()];
    let k = x.len() / labels.len().max(1);
    let rows = gx.par_chunks_mut(k.max(1)).zip(x.par_chunks(k.max(1)).zip(gy.par_chunks(k.max(1))));
    rows.enumerate().each(&|(row, (gx, (x, gy)))| {
        for ((gx, &x), &gy) in gx.iter_mut().zip(x).zip(gy) {
            *gx = if x == clamp(x) { gy } else { T::zero() };
        }
        if let Ok(label) = usize::try_from(labels[row]) {
            gx[label] *= T::from_f64(slope(clamp(x[label]).to_f64(), row));
        }
    });
    gx
}

/// Clamps to `[-1, 1]`. NaN passes, so that a diverged network is noticed.
fn clamp<T: WithDType>(x: T) -> T {
    let one = T::one();
    if x > one {
        one
    } else if x < T::zero() - one {
        T::zero() - one
    } else {
        x
    }
}
