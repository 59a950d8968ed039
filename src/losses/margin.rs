//! Softmax with an additive margin: ArcFace, CosFace and ElasticFace.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::nn::{DeviceParams, Params, standard_normal};
use crate::ops::backend::Backend;
use crate::ops::margin_loss::{MarginForm, MarginGradient, MarginLossConfig, PlusMatching, Rows, margin_loss};
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
    fn form(self) -> MarginForm {
        match self {
            Self::ArcFace | Self::ElasticArc | Self::ElasticArcPlus => MarginForm::Angular,
            Self::CosFace | Self::ElasticCos | Self::ElasticCosPlus => MarginForm::Cosine,
        }
    }

    fn is_elastic(self) -> bool {
        !matches!(self, Self::ArcFace | Self::CosFace)
    }

    fn is_plus(self) -> bool {
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
    /// Share of the classes that the softmax of a step is over: those of the batch and random others (PartialFC, An et
    /// al., CVPR 2022), on every rank of its own classes. Only their centres are updated. 1 takes all.
    pub sample_rate: f64,
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
            sample_rate: 1.0,
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
        if !(self.sample_rate > 0.0 && self.sample_rate <= 1.0) {
            return wrong(format!("sample_rate: expected above 0 to 1, found {}", self.sample_rate));
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

    /// Returns the settings of the op.
    pub fn op(&self) -> MarginLossConfig {
        let matching = self.kind.is_plus().then_some(self.plus_matching);
        MarginLossConfig { form: self.kind.form(), gradient: self.gradient, scale: self.scale, matching }
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
        margin_loss(embedding, kernel, Rows { labels, margins }, self.op())
    }
}

/// Name of the class centres among the parameters.
const KERNEL: &str = "kernel";

/// A classification head: class centres and the margin loss over them.
#[derive(Debug)]
pub struct MarginHead {
    kernel: Tensor,
    params: Params,
    config: MarginConfig,
    /// Classes whose centres it has, of so many.
    classes: Range<usize>,
    num_classes: usize,
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
        Self::part(config, [embedding_size, classes], 0..classes, device, seed)
    }

    /// Creates the class centres of some classes: those that [`Self::new`] would have.
    pub(crate) fn part(
        config: &MarginConfig,
        [embedding_size, num_classes]: [usize; 2],
        classes: Range<usize>,
        device: &Device,
        seed: u64,
    ) -> Result<Self> {
        let mut params = Params::new(DType::F32, device, seed);
        let shape = [embedding_size, num_classes];
        let kernel = params.root().normal_columns(KERNEL, shape, 0.01, classes.clone())?;
        Ok(Self { kernel, params, config: config.clone(), classes, num_classes })
    }

    /// Loads the class centres of all classes, of which it takes its own.
    pub(crate) fn load(&self, all: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut own = all.clone();
        for kernel in own.values_mut().filter(|kernel| kernel.dims().last() == Some(&self.num_classes)) {
            *kernel = kernel.narrow(1, self.classes.start, self.classes.len())?;
        }
        self.params.load(&own)
    }

    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The settings of the loss.
    pub fn config(&self) -> &MarginConfig {
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

    /// Length of the class centres.
    pub(crate) fn embedding_size(&self) -> Result<usize> {
        Ok(self.kernel.dims2()?.0)
    }

    /// Number of classes, those of other ranks included.
    pub(crate) fn num_classes(&self) -> usize {
        self.num_classes
    }

    /// Moves the class centres of some of its classes to a device.
    pub(crate) fn on<B: Backend>(self, backend: &B, classes: Range<usize>) -> Result<DeviceParams<B>> {
        let (size, own) = (self.kernel.dims2()?.0, self.classes);
        if classes.start < own.start || classes.end > own.end {
            bail!("classes {classes:?} of a head that has {own:?}");
        }
        backend.check_embedding_size(size)?;
        let order = backend.centres_order(size, classes.len());
        let mut parts = self.params.parts();
        drop((self.kernel, self.params));
        if classes.len() < own.len() {
            for kernel in parts.trained.values_mut() {
                *kernel = kernel.narrow(1, classes.start - own.start, classes.len())?.copy()?;
            }
        }
        DeviceParams::new(backend, parts, BTreeMap::from([(KERNEL.to_owned(), order)]))
    }
}

/// Returns the cosines `(N, K)` of embeddings `(N, d)` and class centres `(d, K)`, both normalised here.
///
/// # Errors
/// When the shapes do not match.
pub fn cosines(embedding: &Tensor, kernel: &Tensor) -> Result<Tensor> {
    l2_normalize(embedding, 1)?.matmul(&l2_normalize(kernel, 0)?)
}
