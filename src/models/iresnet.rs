//! IResNet: the improved residual network of insightface and ElasticFace (Duta et al., 2020; Deng et al., CVPR 2019).

use candle_core::{ModuleT, Result, Tensor, bail};

use super::{ModelConfig, scaled};
use crate::nn::{BatchNorm, Conv2d, Dropout, Graph, Init, Linear, NodeId, Op, PRelu, Scope, SqueezeExcitation, Trace};
use crate::ops::conv::ConvConfig;

/// Standard deviation of the initial convolution weights.
const CONV_INIT: Init = Init::Normal(0.1);
/// Divisor of the channels in a squeeze-excitation block.
const SE_REDUCTION: usize = 16;

/// Sizes of an IResNet.
#[derive(Clone, Debug, PartialEq)]
pub struct IResNetConfig {
    /// Blocks of each of the four stages.
    pub layers: [usize; 4],
    /// Channels of each stage; the published ones are 64, 128, 256, 512.
    pub planes: [usize; 4],
    /// Length of the embedding.
    pub embedding_size: usize,
    /// Side of the input in pixels, a multiple of 16.
    pub input_size: usize,
    /// Dropout rate of the features before `fc`.
    pub dropout: f64,
    /// Whether blocks have squeeze-excitation.
    pub squeeze_excitation: bool,
}

impl IResNetConfig {
    /// Sizes for `config`, with `layers` blocks in the stages.
    pub(super) fn of(config: &ModelConfig, layers: [usize; 4]) -> Self {
        Self {
            layers,
            planes: [64, 128, 256, 512].map(|c| scaled(c, config.width)),
            embedding_size: config.embedding_size,
            input_size: config.input_size,
            dropout: config.dropout,
            squeeze_excitation: config.squeeze_excitation,
        }
    }
}

/// The network: stem, four stages of residual blocks, `fc`, batch norm of the embedding.
#[derive(Debug)]
pub struct IResNet {
    conv1: Conv2d,
    bn1: BatchNorm,
    prelu: PRelu,
    layers: Vec<IBasicBlock>,
    bn2: BatchNorm,
    dropout: Dropout,
    fc: Linear,
    features: BatchNorm,
    input_size: usize,
}

impl IResNet {
    /// Creates the network under insightface's parameter names.
    ///
    /// # Errors
    /// When a parameter name is already in use or memory cannot be allocated.
    pub fn new(config: &IResNetConfig, mut p: Scope) -> Result<Self> {
        let [first, .., last] = config.planes;
        let conv1 =
            Conv2d::new(3, first, 3, ConvConfig { padding: 1, ..Default::default() }, CONV_INIT, p.sub("conv1"))?;
        let bn1 = BatchNorm::new(first, p.sub("bn1"))?;
        let prelu = PRelu::new(first, p.sub("prelu"))?;
        let mut layers = Vec::new();
        let mut c_in = first;
        for (stage, (&blocks, &planes)) in config.layers.iter().zip(&config.planes).enumerate() {
            for block in 0..blocks {
                let stride = if block == 0 { 2 } else { 1 };
                let p = p.sub(format!("layer{}.{block}", stage + 1));
                layers.push(IBasicBlock::new(c_in, planes, stride, config.squeeze_excitation, p)?);
                c_in = planes;
            }
        }
        let side = config.input_size / 16;
        Ok(Self {
            conv1,
            bn1,
            prelu,
            layers,
            bn2: BatchNorm::new(last, p.sub("bn2"))?,
            dropout: Dropout::new(config.dropout, &mut p),
            fc: Linear::new(last * side * side, config.embedding_size, p.sub("fc"))?,
            features: BatchNorm::with_frozen_weight(config.embedding_size, p.sub("features"))?,
            input_size: config.input_size,
        })
    }

    /// Dropout of the features before `fc` in training.
    pub(super) fn dropout(&self) -> &Dropout {
        &self.dropout
    }
}

impl Trace for IResNet {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        let x = graph.chain(x, &[&self.conv1, &self.bn1, &self.prelu]);
        let x = self.layers.iter().fold(x, |x, block| block.trace(graph, x));
        let x = self.bn2.trace(graph, x);
        let x = graph.push(Op::Flatten, "", &[x]);
        graph.chain(x, &[&self.fc, &self.features])
    }
}

impl ModuleT for IResNet {
    /// Maps images `(N, 3, S, S)` to embeddings `(N, embedding_size)`.
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut y =
            channels_last(x, self.input_size)?.apply(&self.conv1)?.apply_t(&self.bn1, train)?.apply(&self.prelu)?;
        for block in &self.layers {
            y = y.apply_t(block, train)?;
        }
        let y = y.apply_t(&self.bn2, train)?.permute((0, 3, 1, 2))?.flatten_from(1)?.apply_t(&self.dropout, train)?;
        y.apply(&self.fc)?.apply_t(&self.features, train)
    }
}

/// Permutes images `(N, 3, side, side)` to `(N, side, side, 3)`.
pub(super) fn channels_last(x: &Tensor, side: usize) -> Result<Tensor> {
    match x.dims() {
        [_, 3, h, w] if *h == side && *w == side => x.permute((0, 2, 3, 1))?.contiguous(),
        _ => bail!("expected images (N, 3, {side}, {side}), found {:?}", x.shape()),
    }
}

/// Batch norm, 3x3 convolution, batch norm, PReLU, 3x3 convolution, batch norm; plus the input.
#[derive(Debug)]
struct IBasicBlock {
    bn1: BatchNorm,
    conv1: Conv2d,
    bn2: BatchNorm,
    prelu: PRelu,
    conv2: Conv2d,
    bn3: BatchNorm,
    se_block: Option<SqueezeExcitation>,
    downsample: Option<(Conv2d, BatchNorm)>,
}

impl IBasicBlock {
    fn new(c_in: usize, c_out: usize, stride: usize, squeeze_excitation: bool, mut p: Scope) -> Result<Self> {
        let same = ConvConfig { padding: 1, ..Default::default() };
        let downsample = if stride != 1 || c_in != c_out {
            let config = ConvConfig { stride, ..Default::default() };
            let conv = Conv2d::new(c_in, c_out, 1, config, CONV_INIT, p.sub("downsample.0"))?;
            Some((conv, BatchNorm::new(c_out, p.sub("downsample.1"))?))
        } else {
            None
        };
        let reduction = SE_REDUCTION.min(c_out);
        Ok(Self {
            bn1: BatchNorm::new(c_in, p.sub("bn1"))?,
            conv1: Conv2d::new(c_in, c_out, 3, same, CONV_INIT, p.sub("conv1"))?,
            bn2: BatchNorm::new(c_out, p.sub("bn2"))?,
            prelu: PRelu::new(c_out, p.sub("prelu"))?,
            conv2: Conv2d::new(c_out, c_out, 3, ConvConfig { stride, ..same }, CONV_INIT, p.sub("conv2"))?,
            bn3: BatchNorm::new(c_out, p.sub("bn3"))?,
            se_block: if squeeze_excitation {
                Some(SqueezeExcitation::new(c_out, reduction, p.sub("se_block"))?)
            } else {
                None
            },
            downsample,
        })
    }
}

impl Trace for IBasicBlock {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        let mut y = graph.chain(x, &[&self.bn1, &self.conv1, &self.bn2, &self.prelu, &self.conv2, &self.bn3]);
        if let Some(se) = &self.se_block {
            y = se.trace(graph, y);
        }
        let shortcut = match &self.downsample {
            Some((conv, bn)) => graph.chain(x, &[conv, bn]),
            None => x,
        };
        graph.push(Op::Add, "", &[y, shortcut])
    }
}

impl ModuleT for IBasicBlock {
    /// Maps `(N, H, W, c_in)` to `(N, H / stride, W / stride, c_out)`.
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let y = x.apply_t(&self.bn1, train)?.apply(&self.conv1)?.apply_t(&self.bn2, train)?;
        let mut y = y.apply(&self.prelu)?.apply(&self.conv2)?.apply_t(&self.bn3, train)?;
        if let Some(se) = &self.se_block {
            y = y.apply(se)?;
        }
        match &self.downsample {
            Some((conv, bn)) => y + x.apply(conv)?.apply_t(bn, train)?,
            None => y + x,
        }
    }
}
