//! Face-recognition backbones: an aligned face in, an embedding out.

mod iresnet;
mod mobilefacenet;

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use serde::{Deserialize, Serialize};

pub use iresnet::{IResNet, IResNetConfig};
pub use mobilefacenet::{MobileFaceNet, MobileFaceNetConfig, MobileFaceNetHead};

use crate::nn::Params;

/// The architectures that can be built by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arch {
    /// IResNet with 2, 2, 2, 2 blocks.
    R18,
    /// IResNet with 3, 4, 6, 3 blocks.
    R34,
    /// IResNet with 3, 4, 14, 3 blocks.
    R50,
    /// IResNet with 3, 13, 30, 3 blocks: MaskInv's.
    #[default]
    R100,
    /// IResNet with 6, 26, 60, 6 blocks.
    R200,
    /// MobileFaceNet as in insightface's published `w600k_mbf.onnx`.
    Mbf,
    /// MobileFaceNet as in arcface_torch's source, with a global depthwise head.
    MbfGdc,
}

impl Arch {
    /// Blocks of the four stages of an IResNet; none for a MobileFaceNet.
    fn layers(self) -> Option<[usize; 4]> {
        match self {
            Self::R18 => Some([2, 2, 2, 2]),
            Self::R34 => Some([3, 4, 6, 3]),
            Self::R50 => Some([3, 4, 14, 3]),
            Self::R100 => Some([3, 13, 30, 3]),
            Self::R200 => Some([6, 26, 60, 6]),
            Self::Mbf | Self::MbfGdc => None,
        }
    }
}

/// What a backbone is built from; the default is the paper's ResNet-100.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Which network.
    pub arch: Arch,
    /// Length of the embedding.
    pub embedding_size: usize,
    /// What the number of channels is multiplied by, for small machines: 1 is the published network.
    pub width: f64,
    /// Side of the input in pixels: 112 is the published network; crops are scaled to it.
    pub input_size: usize,
    /// Share of the features before the last layer that training drops (IResNet only).
    pub dropout: f64,
    /// Whether blocks have squeeze-excitation (IResNet only).
    pub squeeze_excitation: bool,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            arch: Arch::default(),
            embedding_size: 512,
            width: 1.0,
            input_size: 112,
            dropout: 0.0,
            squeeze_excitation: false,
        }
    }
}

impl ModelConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let wrong = |what: String| Err(crate::Error::Config(format!("model.{what}")));
        if !(1..=2048).contains(&self.embedding_size) {
            return wrong(format!("embedding_size: expected 1 to 2048, found {}", self.embedding_size));
        }
        if !(self.width > 0.0 && self.width <= 2.0) {
            return wrong(format!("width: expected above 0 and up to 2, found {}", self.width));
        }
        if !(16..=224).contains(&self.input_size) || !self.input_size.is_multiple_of(16) {
            return wrong(format!("input_size: expected a multiple of 16 from 16 to 224, found {}", self.input_size));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong(format!("dropout: expected 0 <= dropout < 1, found {}", self.dropout));
        }
        if self.arch.layers().is_none() && (self.dropout > 0.0 || self.squeeze_excitation) {
            return wrong("arch: a MobileFaceNet has neither dropout nor squeeze-excitation".into());
        }
        Ok(())
    }
}

/// A backbone with its parameters.
#[derive(Debug)]
pub struct Model {
    net: Net,
    params: Params,
    config: ModelConfig,
}

#[derive(Debug)]
enum Net {
    IResNet(Box<IResNet>),
    MobileFaceNet(Box<MobileFaceNet>),
}

impl Model {
    /// Returns a trainable network, f32, with the published initialisation drawn from `seed`.
    ///
    /// # Errors
    /// When the config is out of range or memory cannot be had.
    pub fn new(config: &ModelConfig, device: &Device, seed: u64) -> Result<Self> {
        Self::build(config, Params::new(DType::F32, device, seed))
    }

    /// Returns a network that never receives gradients, such as a teacher; load its parameters next.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn frozen(config: &ModelConfig, device: &Device) -> Result<Self> {
        Self::build(config, Params::frozen(DType::F32, device))
    }

    /// Returns a network whose parameters are created in `params`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn build(config: &ModelConfig, mut params: Params) -> Result<Self> {
        config.validate().map_err(candle_core::Error::wrap)?;
        let p = params.root();
        let net = match config.arch.layers() {
            Some(layers) => Net::IResNet(Box::new(IResNet::new(&IResNetConfig::of(config, layers), p)?)),
            None => Net::MobileFaceNet(Box::new(MobileFaceNet::new(&MobileFaceNetConfig::of(config), p)?)),
        };
        Ok(Self { net, params, config: config.clone() })
    }

    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// What the network was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
}

impl ModuleT for Model {
    /// Images `(N, 3, S, S)`, RGB, `(x / 255 - 0.5) / 0.5`, to embeddings `(N, embedding_size)`, not normalised.
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match &self.net {
            Net::IResNet(net) => net.forward_t(x, train),
            Net::MobileFaceNet(net) => net.forward_t(x, train),
        }
    }
}

/// `channels * width`, at least 1.
fn scaled(channels: usize, width: f64) -> usize {
    ((channels as f64 * width).round() as usize).max(1)
}
