//! The margin on the target cosine of a classification head (ArcFace, Deng et al., CVPR 2019, eq. 3; CosFace, Wang et
//! al., CVPR 2018, eq. 4; ElasticFace, Boutros et al., CVPRW 2022, eq. 4 and 5), with its analytic gradient.

mod cpu;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::slice::{self, for_float};

/// Quantity that the margin is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarginForm {
    /// The angle: `cos(theta + margin)`.
    Angular,
    /// The cosine: `cos(theta) - margin`.
    Cosine,
}

/// Gradient of the angular margin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarginGradient {
    /// The derivative of `cos(theta + m)` with respect to `cos(theta)`, `cos(m) + cos(theta) / sin(theta) * sin(m)`,
    /// with `sin(theta)` bounded away from zero so that it is finite at `|cos(theta)| = 1`. ElasticFace uses it without
    /// the bound.
    #[default]
    True,
    /// 1, as in insightface's ArcFace, which computes the angle without gradient.
    StraightThrough,
}

/// Lower bound of the `sin(theta)` that the true gradient divides by: f32 cosines resolve angles to about 5e-4 rad.
const MIN_SIN: f64 = 1e-3;

/// Returns the cosines clamped to `[-1, 1]` with the margin applied to each row's target, `(N, K)`, before scaling.
///
/// - `cosine`: `(N, K)`, f32 or f64
/// - `labels`: `N` targets below `K`, or -1 for a row without a margin
/// - `margins`: `N`; radians for [`MarginForm::Angular`]
///
/// `cosine` receives a gradient: zero where it was clamped, finite everywhere.
///
/// # Errors
/// When the lengths differ from `N`, or a label is below -1 or not below `K`.
pub fn add_margin(
    cosine: &Tensor,
    labels: &[i64],
    margins: &[f64],
    form: MarginForm,
    gradient: MarginGradient,
) -> Result<Tensor> {
    let (n, k) = cosine.dims2()?;
    if labels.len() != n || margins.len() != n {
        bail!("add_margin: {n} rows, but {} labels and {} margins", labels.len(), margins.len());
    }
    check_labels("add_margin", labels, k)?;
    cosine.contiguous()?.apply_op1(Margin { labels: labels.to_vec(), margins: margins.to_vec(), form, gradient })
}

/// Returns an error unless every label is -1 or below `k`.
pub(crate) fn check_labels(op: &str, labels: &[i64], k: usize) -> Result<()> {
    match labels.iter().position(|&l| l < -1 || l >= k as i64) {
        Some(row) => bail!("{op}: row {row}: expected a label below {k} or -1, found {}", labels[row]),
        None => Ok(()),
    }
}

#[derive(Clone)]
struct Margin {
    labels: Vec<i64>,
    margins: Vec<f64>,
    form: MarginForm,
    gradient: MarginGradient,
}

/// Target logit before scaling, from the clamped cosine.
pub(super) fn margin_value(form: MarginForm, cos: f64, margin: f64) -> f64 {
    match form {
        MarginForm::Angular => (cos.acos() + margin).cos(),
        MarginForm::Cosine => cos - margin,
    }
}

/// Derivative of [`margin_value`] with respect to `cos`.
pub(super) fn margin_slope(form: MarginForm, gradient: MarginGradient, cos: f64, margin: f64) -> f64 {
    match (form, gradient) {
        (MarginForm::Angular, MarginGradient::True) => {
            let sin = (1.0 - cos * cos).max(0.0).sqrt().max(MIN_SIN);
            margin.cos() + cos / sin * margin.sin()
        }
        _ => 1.0,
    }
}

impl CustomOp1 for Margin {
    fn name(&self) -> &'static str {
        "add_margin"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = for_float!("add_margin", x, T => {
            let y = cpu::forward(slice::cpu::<T>("add_margin", x, xl)?, &self.labels, |cos, row| {
                margin_value(self.form, cos, self.margins[row])
            });
            <T as candle_core::WithDType>::to_cpu_storage_owned(y)
        });
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(x.apply_op2_no_bwd(&gy.contiguous()?, &GradCosine(self.clone()))?))
    }
}

struct GradCosine(Margin);

impl CustomOp2 for GradCosine {
    fn name(&self) -> &'static str {
        "add_margin_grad"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, gy: &CpuStorage, gyl: &Layout) -> Result<(CpuStorage, Shape)> {
        let margin = &self.0;
        let gx = for_float!("add_margin_grad", x, T => {
            let (x, gy) = (slice::cpu::<T>("add_margin_grad", x, xl)?, slice::cpu::<T>("add_margin_grad", gy, gyl)?);
            let gx = cpu::backward(x, gy, &margin.labels, |cos, row| {
                margin_slope(margin.form, margin.gradient, cos, margin.margins[row])
            });
            <T as candle_core::WithDType>::to_cpu_storage_owned(gx)
        });
        Ok((gx, xl.shape().clone()))
    }
}
