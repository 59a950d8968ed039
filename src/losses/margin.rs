//! Softmax with an additive margin: ArcFace, CosFace and ElasticFace.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Result, Tensor, bail};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::elastic::{PlusMatching, match_margins};
use crate::nn::{Gradients, Init, Params, Pool, standard_normal};
use crate::ops::margin::{MarginForm, MarginGradient, add_margin};
use crate::ops::margin_loss::{MarginLossConfig, margin_loss, margin_loss_with_gradients};
use crate::ops::normalize::l2_normalize;

/// The published margin losses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MarginKind {
    /// `s cos(theta + m)` (Deng et al., CVPR 2019).
    ArcFace,
    /// `s (cos(theta) - m)` (Wang et al., CVPR 2018).
    CosFace,
    /// ArcFace with `m` drawn per sample and step from `N(m, sigma)` (Boutros et al., CVPRW 2022), as in MaskInv.
    #[default]
    ElasticArc,
    /// ElasticArc with the larger margins given to the smaller target cosines.
    ElasticArcPlus,
    /// CosFace with `m` drawn as in ElasticArc.
    ElasticCos,
    /// ElasticCos with the larger margins given to the smaller target cosines.
    ElasticCosPlus,
}

impl MarginKind {
    pub(super) fn form(self) -> MarginForm {
        match self {
            Self::ArcFace | Self::ElasticArc | Self::ElasticArcPlus => MarginForm::Angular,
            Self::CosFace | Self::ElasticCos | Self::ElasticCosPlus => MarginForm::Cosine,
        }
    }

    fn is_elastic(self) -> bool {
        !matches!(self, Self::ArcFace | Self::CosFace)
    }

    pub(super) fn is_plus(self) -> bool {
        matches!(self, Self::ElasticArcPlus | Self::ElasticCosPlus)
    }
}

/// Settings of a margin loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MarginConfig {
    /// Margin loss.
    pub kind: MarginKind,
    /// Factor from cosines to the logits of the softmax.
    pub scale: f64,
    /// Mean margin, in radians or cosine; `None` for the published one of `kind`.
    pub margin: Option<f64>,
    /// Standard deviation of drawn margins; `None` for the published one of `kind`.
    pub sigma: Option<f64>,
    /// Gradient of an angular margin.
    pub gradient: MarginGradient,
    /// Rule by which the "+" forms match margins to samples.
    pub plus_matching: PlusMatching,
}

impl Default for MarginConfig {
    /// ElasticFace-Arc with s 64, m 0.5, sigma 0.05 (Boutros et al., CVPRW 2022, section 4.1).
    fn default() -> Self {
        Self {
            kind: MarginKind::ElasticArc,
            scale: 64.0,
            margin: None,
            sigma: None,
            gradient: MarginGradient::True,
            plus_matching: PlusMatching::Ranked,
        }
    }
}

impl MarginConfig {
    /// Returns the mean margin: the one set, or the published one.
    pub fn mean(&self) -> f64 {
        self.margin.unwrap_or(match self.kind.form() {
            MarginForm::Angular => 0.5,
            MarginForm::Cosine => 0.35,
        })
    }

    /// Returns the standard deviation of drawn margins: the one set, or the published one.
    pub fn std(&self) -> f64 {
        self.sigma.unwrap_or(match self.kind {
            MarginKind::ArcFace | MarginKind::CosFace => 0.0,
            MarginKind::ElasticArc | MarginKind::ElasticCos => 0.05,
            MarginKind::ElasticArcPlus => 0.0175,
            MarginKind::ElasticCosPlus => 0.02,
        })
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let wrong = |what: String| Err(crate::Error::Config(format!("loss.{what}")));
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return wrong(format!("scale: expected a positive number, found {}", self.scale));
        }
        if !(0.0..=std::f64::consts::PI).contains(&self.mean()) {
            return wrong(format!("margin: expected 0 to pi, found {}", self.mean()));
        }
        if !(0.0..=1.0).contains(&self.std()) {
            return wrong(format!("sigma: expected 0 to 1, found {}", self.std()));
        }
        if !self.kind.is_elastic() && self.std() > 0.0 {
            return wrong(format!("sigma: expected 0, as {:?} draws no margins, found {}", self.kind, self.std()));
        }
        Ok(())
    }

    /// Draws `n` margins from `N(mean, std)`; constant ones for ArcFace and CosFace.
    pub fn draw(&self, n: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
        let (mean, std) = (self.mean(), self.std());
        (0..n).map(|_| if std > 0.0 { mean + std * standard_normal(rng) } else { mean }).collect()
    }

    /// Returns the mean cross-entropy, a scalar, of the rows with a label; 0 if none has one.
    ///
    /// - `embedding`: `(N, d)`; `kernel`: `(d, K)`, the class centres; both f32 or f64, normalised here
    /// - `labels`: `N` targets below `K`, or -1 for a row to ignore
    /// - `margins`: `N`; the "+" forms reorder them by the target cosines
    ///
    /// # Errors
    /// When the shapes or lengths differ or a label is out of range.
    pub fn loss(&self, embedding: &Tensor, kernel: &Tensor, labels: &[i64], margins: &[f64]) -> Result<Tensor> {
        margin_loss(embedding, kernel, &self.op(labels, margins)?, self.matching(margins))
    }

    /// Returns the settings of the op for these labels.
    fn op(&self, labels: &[i64], margins: &[f64]) -> Result<MarginLossConfig> {
        if margins.len() != labels.len() {
            bail!("margin: {} labels, but {} margins", labels.len(), margins.len());
        }
        let (form, gradient, scale) = (self.kind.form(), self.gradient, self.scale);
        Ok(MarginLossConfig { labels: labels.to_vec(), form, gradient, scale })
    }

    /// Returns the function that assigns margins to rows once their target cosines are known.
    fn matching(&self, margins: &[f64]) -> impl Fn(&[Option<f64>]) -> Vec<f64> + Send + Sync + 'static {
        let (margins, is_plus, matching) = (margins.to_vec(), self.kind.is_plus(), self.plus_matching);
        move |cosines| if is_plus { match_margins(cosines, &margins, matching) } else { margins.clone() }
    }

    /// Returns the scaled logits `(N, K)` of `cosine: (N, K)` for one margin per row: [`Self::loss`] is their
    /// cross-entropy.
    ///
    /// - `labels`: `N` targets below `K`, or -1 for a row without a margin
    /// - `margins`: `N`; the "+" forms reorder them by the target cosines
    ///
    /// # Errors
    /// When the lengths differ from `N` or a label is out of range.
    pub fn logits(&self, cosine: &Tensor, labels: &[i64], margins: &[f64]) -> Result<Tensor> {
        let matched;
        let margins = if self.kind.is_plus() && margins.len() == labels.len() {
            matched = match_margins(&target_cosines(cosine, labels)?, margins, self.plus_matching);
            &matched
        } else {
            margins
        };
        add_margin(cosine, labels, margins, self.kind.form(), self.gradient)? * self.scale
    }
}

fn target_cosines(cosine: &Tensor, labels: &[i64]) -> Result<Vec<Option<f64>>> {
    let (n, k) = cosine.dims2()?;
    if labels.len() != n {
        bail!("margin: {n} rows, but {} labels", labels.len());
    }
    let read = |row: usize, label: i64| match usize::try_from(label) {
        Ok(label) if label < k => {
            let cosine = cosine.detach().get(row)?.get(label)?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            Ok(Some(cosine.clamp(-1.0, 1.0)))
        }
        _ => Ok(None),
    };
    labels.iter().enumerate().map(|(row, &label)| read(row, label)).collect()
}

/// Name of the class centres among the parameters.
pub(super) const KERNEL: &str = "kernel";

/// A classification head: class centres and the margin loss over them.
#[derive(Debug)]
pub struct MarginHead {
    kernel: Tensor,
    params: Params,
    config: MarginConfig,
    /// Reused memory for the gradients: touching fresh memory of that size costs as much as computing them.
    pool: Arc<Pool>,
}

/// Margin loss of a batch with its gradients.
#[derive(Debug)]
pub struct MarginStep {
    /// Mean cross-entropy of the rows with a label.
    pub loss: f64,
    /// Gradient of the embeddings, `(N, embedding_size)`, f32.
    pub of_embedding: Tensor,
    /// Gradients of the head's parameters.
    pub of_head: Gradients,
    /// Cosine between each row and its class centre, in `[-1, 1]`; `None` for a row without a label.
    pub target_cosines: Vec<Option<f64>>,
}

impl MarginHead {
    /// Creates `kernel: (embedding_size, classes)` from `N(0, 0.01)`, with the name and layout of ElasticFace's header
    /// files.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub fn new(
        config: &MarginConfig,
        embedding_size: usize,
        classes: usize,
        device: &Device,
        seed: u64,
    ) -> Result<Self> {
        let mut params = Params::new(DType::F32, device, seed);
        let kernel = params.root().param(KERNEL, (embedding_size, classes), Init::Normal(0.01))?;
        Ok(Self { kernel, params, config: config.clone(), pool: Arc::default() })
    }

    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The class centres, `(embedding_size, classes)`, outside any graph.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn kernel(&self) -> Tensor {
        self.kernel.detach()
    }

    /// The settings of the loss.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn config(&self) -> &MarginConfig {
        &self.config
    }

    /// Returns the mean cross-entropy, a scalar, of embeddings `(N, embedding_size)`, which are normalised here.
    ///
    /// # Errors
    /// When the number of labels is not `N` or a label is out of range.
    pub fn forward(&self, embedding: &Tensor, labels: &[i64], rng: &mut ChaCha8Rng) -> Result<Tensor> {
        let margins = self.config.draw(labels.len(), rng);
        self.config.loss(embedding, &self.kernel, labels, &margins)
    }

    /// Returns the loss of [`Self::forward`] and `weight` times its gradients, outside any graph: for training, it
    /// takes less time and memory.
    ///
    /// # Errors
    /// Same as [`Self::forward`], and when `embedding` is not f32 on the CPU.
    pub fn step(&self, embedding: &Tensor, labels: &[i64], weight: f64, rng: &mut ChaCha8Rng) -> Result<MarginStep> {
        let margins = self.config.draw(labels.len(), rng);
        let (config, matching) = (self.config.op(labels, &margins)?, self.config.matching(&margins));
        let seen = Arc::new(OnceLock::new());
        let cosines = seen.clone();
        let margins = move |targets: &[Option<f64>]| matching(cosines.get_or_init(|| targets.to_vec()));
        let mut of_head = Gradients::flat(&self.params, &self.pool);
        let step = of_head.write(KERNEL, |gradient| {
            margin_loss_with_gradients(embedding, &self.kernel, &config, margins, weight, gradient)
        });
        let Some(step) = step else { bail!("margin: the class centres are not trained") };
        let (loss, of_embedding) = step?;
        let target_cosines = seen.get().cloned().unwrap_or_default();
        Ok(MarginStep { loss, of_embedding, of_head, target_cosines })
    }
}

/// Returns the cosines `(N, K)` of embeddings `(N, d)` and class centres `(d, K)`, both normalised here.
///
/// # Errors
/// When the shapes do not match.
pub fn cosines(embedding: &Tensor, kernel: &Tensor) -> Result<Tensor> {
    l2_normalize(embedding, 1)?.matmul(&l2_normalize(kernel, 0)?)
}
