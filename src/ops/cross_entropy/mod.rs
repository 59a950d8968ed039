//! Softmax cross-entropy with its backward.

mod cpu;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::margin::check_labels;
use super::slice::{self, for_float};

/// Returns the scalar mean of `-log softmax(logits)[label]` over the rows with a label; 0 if none has one.
///
/// - `logits`: `(N, K)`, f32 or f64
/// - `labels`: `N` targets below `K`, or -1 for a row to ignore
///
/// `logits` receives a gradient.
///
/// # Errors
/// When the number of labels is not `N`, or a label is below -1 or not below `K`.
pub fn cross_entropy(logits: &Tensor, labels: &[i64]) -> Result<Tensor> {
    let (n, k) = logits.dims2()?;
    if labels.len() != n {
        bail!("cross_entropy: {n} rows, but {} labels", labels.len());
    }
    check_labels("cross_entropy", labels, k)?;
    logits.contiguous()?.apply_op1(CrossEntropy { labels: labels.to_vec() })
}

#[derive(Clone)]
struct CrossEntropy {
    labels: Vec<i64>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = for_float!("cross_entropy", x, T => {
            let loss = cpu::forward(slice::cpu::<T>("cross_entropy", x, xl)?, &self.labels);
            <T as candle_core::WithDType>::to_cpu_storage(&[<T as candle_core::WithDType>::from_f64(loss)])
        });
        Ok((y, Shape::from(())))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(x.apply_op2_no_bwd(gy, &GradLogits(self.clone()))?))
    }
}

struct GradLogits(CrossEntropy);

impl CustomOp2 for GradLogits {
    fn name(&self) -> &'static str {
        "cross_entropy_grad"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, gy: &CpuStorage, gyl: &Layout) -> Result<(CpuStorage, Shape)> {
        let gx = for_float!("cross_entropy_grad", x, T => {
            let gy = slice::cpu::<T>("cross_entropy_grad", gy, gyl)?[0];
            let gx = cpu::backward(slice::cpu::<T>("cross_entropy_grad", x, xl)?, &self.0.labels, gy);
            <T as candle_core::WithDType>::to_cpu_storage_owned(gx)
        });
        Ok((gx, xl.shape().clone()))
    }
}
