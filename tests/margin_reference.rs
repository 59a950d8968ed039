//! The margin softmax made of candle's tensor ops, which the fused op is compared with.

use candle_core::{D, DType, Result, Tensor};
use maskinv::losses::{MarginConfig, MarginForm, MarginGradient, match_margins};

/// Square of the sine below which the fused op bounds the slope.
const MIN_SQUARE: f64 = 1e-6;

/// Returns a matrix with a 1 at each row's label.
fn one_hot(labels: &[i64], cosine: &Tensor) -> Result<Tensor> {
    let (n, k) = cosine.dims2()?;
    let at = |i: usize| f64::from(u8::from(labels[i / k] == (i % k) as i64));
    Tensor::from_vec((0..n * k).map(at).collect::<Vec<_>>(), (n, k), cosine.device())?.to_dtype(cosine.dtype())
}

/// Returns the scaled logits `(N, K)` of `cosine: (N, K)`, for one margin per row; rows with label -1 have none.
pub fn logits(config: &MarginConfig, cosine: &Tensor, labels: &[i64], margins: &[f64]) -> Result<Tensor> {
    let (op, cosine) = (config.op(), cosine.clamp(-1.0, 1.0)?);
    let target = one_hot(labels, &cosine)?;
    let margins = match op.matching {
        None => margins.to_vec(),
        Some(matching) => {
            let values = (&cosine * &target)?.sum(1)?.detach().to_dtype(DType::F64)?.to_vec1::<f64>()?;
            let known: Vec<_> =
                values.iter().zip(labels).map(|(value, label)| (*label >= 0).then_some(*value)).collect();
            match_margins(&known, margins, matching)
        }
    };
    let column = |f: &dyn Fn(f64) -> f64| {
        let values: Vec<f64> = margins.iter().map(|margin| f(*margin)).collect();
        Tensor::from_vec(values, (margins.len(), 1), cosine.device())?.to_dtype(cosine.dtype())
    };
    let moved = match op.form {
        // cos(theta + m)
        MarginForm::Angular => {
            let sine = (1.0 - cosine.sqr()?)?.maximum(MIN_SQUARE)?.sqrt()?;
            (cosine.broadcast_mul(&column(&f64::cos)?)? - sine.broadcast_mul(&column(&f64::sin)?)?)?
        }
        MarginForm::Cosine => cosine.broadcast_sub(&column(&|margin| margin)?)?,
    };
    let moved = match op.gradient {
        MarginGradient::True => moved,
        MarginGradient::StraightThrough => (&cosine + (moved - &cosine)?.detach())?,
    };
    (&cosine + ((moved - &cosine)? * target)?)? * op.scale
}

/// Returns the mean of `-log softmax(logits)[label]` over the rows with a label.
pub fn cross_entropy(logits: &Tensor, labels: &[i64]) -> Result<Tensor> {
    let counted = labels.iter().filter(|label| **label >= 0).count().max(1) as f64;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_softmax = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    (log_softmax * one_hot(labels, logits)?)?.sum_all()?.neg()? / counted
}
