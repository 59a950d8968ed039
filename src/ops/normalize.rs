//! L2 normalisation along an axis.

use candle_core::{Result, Tensor};

/// Added to the squared norm, so that a zero vector stays zero and its gradient stays finite. It changes no norm
/// above 1e-8 in f32.
pub(super) const EPS: f64 = 1e-24;

/// Returns `x / ||x||` with norms along axis `dim`, of the shape and dtype of `x`; zero vectors stay zero.
///
/// # Errors
/// When there is no axis `dim`.
pub fn l2_normalize(x: &Tensor, dim: usize) -> Result<Tensor> {
    let norm = (x.sqr()?.sum_keepdim(dim)? + EPS)?.sqrt()?;
    x.broadcast_div(&norm)
}
