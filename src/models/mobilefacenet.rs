//! MobileFaceNet (Chen et al., 2018) in insightface's form.

use candle_core::{ModuleT, Result, Tensor};

use super::iresnet::channels_last;
use super::{Arch, ModelConfig, scaled};
use crate::nn::{BatchNorm, Conv2d, Graph, Init, Linear, NodeId, Op, PRelu, Scope, Trace};
use crate::ops::conv::ConvConfig;

/// Sizes of a MobileFaceNet.
#[derive(Clone, Debug, PartialEq)]
pub struct MobileFaceNetConfig {
    /// Depthwise blocks at the four resolutions.
    pub blocks: [usize; 4],
    /// Channels between the blocks as a multiple of `base`, doubled in the later stages.
    pub scale: usize,
    /// Base channels; 64 is the published network.
    pub base: usize,
    /// Length of the embedding.
    pub embedding_size: usize,
    /// Side of the input in pixels, a multiple of 16.
    pub input_size: usize,
    /// Layers that turn the last feature map into the embedding.
    pub head: MobileFaceNetHead,
}

/// The last layers of a MobileFaceNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MobileFaceNetHead {
    /// 1x1 convolution to the base channels, linear layer over the map, batch norm with a frozen weight, as in the
    /// published `w600k_mbf.onnx`.
    Linear,
    /// Global depthwise convolution, linear layer without bias, batch norm, as in arcface_torch's source.
    GlobalDepthwise,
}

impl MobileFaceNetConfig {
    /// Sizes for `config`.
    pub(super) fn of(config: &ModelConfig) -> Self {
        let head = match config.arch {
            Arch::MbfGdc => MobileFaceNetHead::GlobalDepthwise,
            _ => MobileFaceNetHead::Linear,
        };
        Self {
            blocks: [1, 4, 6, 2],
            scale: 2,
            base: scaled(64, config.width),
            embedding_size: config.embedding_size,
            input_size: config.input_size,
            head,
        }
    }
}

/// The network: eight groups of layers, a 1x1 convolution (`conv_sep`), the head.
#[derive(Debug)]
pub struct MobileFaceNet {
    stem: ConvBlock,
    second: Stage,
    stages: Vec<Stage>,
    conv_sep: ConvBlock,
    head: Head,
    input_size: usize,
}

#[derive(Debug)]
enum Head {
    Linear { conv_reduce: ConvBlock, fc: Linear, features: BatchNorm },
    GlobalDepthwise { depthwise: LinearBlock, fc: Linear, bn: BatchNorm },
}

#[derive(Debug)]
enum Stage {
    Conv(ConvBlock),
    Down(Box<DepthWise>),
    Residual(Vec<DepthWise>),
}

impl MobileFaceNet {
    /// Creates the network under insightface's parameter names.
    ///
    /// # Errors
    /// When a parameter name is already in use or memory cannot be allocated.
    pub fn new(config: &MobileFaceNetConfig, mut p: Scope) -> Result<Self> {
        let base = config.base;
        let (narrow, wide) = (base * config.scale, 2 * base * config.scale);
        let same = ConvConfig { padding: 1, ..Default::default() };
        let down = ConvConfig { stride: 2, ..same };
        let stem = ConvBlock::new(3, narrow, 3, down, p.sub("layers.0"))?;
        let second = if config.blocks[0] == 1 {
            Stage::Conv(ConvBlock::new(narrow, narrow, 3, ConvConfig { groups: base, ..same }, p.sub("layers.1"))?)
        } else {
            Stage::residual(narrow, 2 * base, config.blocks[0], p.sub("layers.1"))?
        };
        let stages = vec![
            Stage::Down(Box::new(DepthWise::new(narrow, narrow, 2 * base, 2, p.sub("layers.2"))?)),
            Stage::residual(narrow, 2 * base, config.blocks[1], p.sub("layers.3"))?,
            Stage::Down(Box::new(DepthWise::new(narrow, wide, 4 * base, 2, p.sub("layers.4"))?)),
            Stage::residual(wide, 4 * base, config.blocks[2], p.sub("layers.5"))?,
            Stage::Down(Box::new(DepthWise::new(wide, wide, 8 * base, 2, p.sub("layers.6"))?)),
            Stage::residual(wide, 4 * base, config.blocks[3], p.sub("layers.7"))?,
        ];
        let last = 8 * base;
        let conv_sep = ConvBlock::new(wide, last, 1, ConvConfig::default(), p.sub("conv_sep"))?;
        let side = config.input_size / 16;
        let size = config.embedding_size;
        let head = match config.head {
            MobileFaceNetHead::Linear => Head::Linear {
                conv_reduce: ConvBlock::new(last, base, 1, ConvConfig::default(), p.sub("conv_reduce"))?,
                fc: Linear::new(base * side * side, size, p.sub("fc"))?,
                features: BatchNorm::with_frozen_weight(size, p.sub("features"))?,
            },
            MobileFaceNetHead::GlobalDepthwise => {
                let mut p = p.sub("features.layers");
                let config = ConvConfig { groups: last, ..Default::default() };
                Head::GlobalDepthwise {
                    depthwise: LinearBlock::new(last, last, side, config, p.sub(0))?,
                    fc: Linear::without_bias(last, size, fan_out_normal(size), p.sub(2))?,
                    bn: BatchNorm::new(size, p.sub(3))?,
                }
            }
        };
        Ok(Self { stem, second, stages, conv_sep, head, input_size: config.input_size })
    }
}

impl Trace for MobileFaceNet {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        let x = graph.chain(x, &[&self.stem, &self.second]);
        let x = self.stages.iter().fold(x, |x, stage| stage.trace(graph, x));
        let x = self.conv_sep.trace(graph, x);
        let (x, last): (_, [&dyn Trace; 2]) = match &self.head {
            Head::Linear { conv_reduce, fc, features } => (conv_reduce.trace(graph, x), [fc, features]),
            Head::GlobalDepthwise { depthwise, fc, bn } => (depthwise.trace(graph, x), [fc, bn]),
        };
        let x = graph.push(Op::Flatten, "", &[x]);
        graph.chain(x, &last)
    }
}

impl ModuleT for MobileFaceNet {
    /// Maps images `(N, 3, S, S)` to embeddings `(N, embedding_size)`.
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut y = channels_last(x, self.input_size)?.apply_t(&self.stem, train)?.apply_t(&self.second, train)?;
        for stage in &self.stages {
            y = y.apply_t(stage, train)?;
        }
        let y = y.apply_t(&self.conv_sep, train)?;
        match &self.head {
            Head::Linear { conv_reduce, fc, features } => {
                let y = y.apply_t(conv_reduce, train)?.permute((0, 3, 1, 2))?.flatten_from(1)?;
                y.apply(fc)?.apply_t(features, train)
            }
            Head::GlobalDepthwise { depthwise, fc, bn } => {
                y.apply_t(depthwise, train)?.flatten_from(1)?.apply(fc)?.apply_t(bn, train)
            }
        }
    }
}

impl Stage {
    fn residual(channels: usize, hidden: usize, num_blocks: usize, mut p: Scope) -> Result<Self> {
        let block = |i| DepthWise::new(channels, channels, hidden, 1, p.sub(format!("layers.{i}")));
        Ok(Self::Residual((0..num_blocks).map(block).collect::<Result<_>>()?))
    }
}

impl Trace for Stage {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        match self {
            Self::Conv(block) => block.trace(graph, x),
            Self::Down(block) => block.trace(graph, x),
            Self::Residual(blocks) => blocks.iter().fold(x, |x, block| {
                let y = block.trace(graph, x);
                graph.push(Op::Add, "", &[x, y])
            }),
        }
    }
}

impl ModuleT for Stage {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match self {
            Self::Conv(block) => block.forward_t(x, train),
            Self::Down(block) => block.forward_t(x, train),
            Self::Residual(blocks) => blocks.iter().try_fold(x.clone(), |x, block| &x + block.forward_t(&x, train)?),
        }
    }
}

/// `N(0, 2 / fan_out)` (He et al., 2015), insightface's initialisation.
fn fan_out_normal(fan_out: usize) -> Init {
    Init::Normal((2.0 / fan_out as f64).sqrt())
}

/// Convolution, batch norm, PReLU.
#[derive(Debug)]
struct ConvBlock {
    linear: LinearBlock,
    prelu: PRelu,
}

impl ConvBlock {
    fn new(c_in: usize, c_out: usize, kernel: usize, config: ConvConfig, mut p: Scope) -> Result<Self> {
        let prelu = PRelu::new(c_out, p.sub("layers.2"))?;
        Ok(Self { linear: LinearBlock::new(c_in, c_out, kernel, config, p)?, prelu })
    }
}

impl Trace for ConvBlock {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        graph.chain(x, &[&self.linear, &self.prelu])
    }
}

impl ModuleT for ConvBlock {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        x.apply_t(&self.linear, train)?.apply(&self.prelu)
    }
}

/// Convolution, batch norm.
#[derive(Debug)]
struct LinearBlock {
    conv: Conv2d,
    bn: BatchNorm,
}

impl LinearBlock {
    fn new(c_in: usize, c_out: usize, kernel: usize, config: ConvConfig, mut p: Scope) -> Result<Self> {
        let init = fan_out_normal(c_out * kernel * kernel);
        Ok(Self {
            conv: Conv2d::new(c_in, c_out, kernel, config, init, p.sub("layers.0"))?,
            bn: BatchNorm::new(c_out, p.sub("layers.1"))?,
        })
    }
}

impl Trace for LinearBlock {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        graph.chain(x, &[&self.conv, &self.bn])
    }
}

impl ModuleT for LinearBlock {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        x.apply(&self.conv)?.apply_t(&self.bn, train)
    }
}

/// 1x1 convolution to `hidden` channels, depthwise 3x3, 1x1 convolution without activation.
#[derive(Debug)]
struct DepthWise {
    expand: ConvBlock,
    depthwise: ConvBlock,
    project: LinearBlock,
}

impl DepthWise {
    fn new(c_in: usize, c_out: usize, hidden: usize, stride: usize, mut p: Scope) -> Result<Self> {
        let mut p = p.sub("layers");
        let depthwise = ConvConfig { stride, padding: 1, groups: hidden };
        Ok(Self {
            expand: ConvBlock::new(c_in, hidden, 1, ConvConfig::default(), p.sub(0))?,
            depthwise: ConvBlock::new(hidden, hidden, 3, depthwise, p.sub(1))?,
            project: LinearBlock::new(hidden, c_out, 1, ConvConfig::default(), p.sub(2))?,
        })
    }
}

impl Trace for DepthWise {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        graph.chain(x, &[&self.expand, &self.depthwise, &self.project])
    }
}

impl ModuleT for DepthWise {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        x.apply_t(&self.expand, train)?.apply_t(&self.depthwise, train)?.apply_t(&self.project, train)
    }
}
