//! MobileFaceNet (Chen et al., 2018) in insightface's form.

use candle_core::Result;

use super::{Arch, ModelConfig, scaled};
use crate::nn::{Graph, Init, Layer, NodeId, Op, Scope};
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

    /// Returns the network, eight groups of layers, a 1x1 convolution (`conv_sep`), the head, which maps images
    /// `(N, 3, S, S)` to embeddings `(N, embedding_size)`. Creates its parameters under insightface's names.
    ///
    /// # Errors
    /// When a parameter name is already in use or memory cannot be allocated.
    pub fn build(&self, mut p: Scope) -> Result<Graph> {
        let base = self.base;
        let (narrow, wide, last) = (base * self.scale, 2 * base * self.scale, 8 * base);
        let mut graph = Graph::new();
        let mut x =
            graph.chain(Graph::INPUT, conv_block([3, narrow], 3, ConvConfig { stride: 2, ..SAME }, p.sub("layers.0"))?);
        x = match self.blocks[0] {
            1 => {
                let config = ConvConfig { groups: base, ..SAME };
                graph.chain(x, conv_block([narrow; 2], 3, config, p.sub("layers.1"))?)
            }
            num => residual(&mut graph, x, [narrow, 2 * base], num, p.sub("layers.1"))?,
        };
        x = graph.chain(x, depthwise([narrow; 2], 2 * base, 2, p.sub("layers.2"))?);
        x = residual(&mut graph, x, [narrow, 2 * base], self.blocks[1], p.sub("layers.3"))?;
        x = graph.chain(x, depthwise([narrow, wide], 4 * base, 2, p.sub("layers.4"))?);
        x = residual(&mut graph, x, [wide, 4 * base], self.blocks[2], p.sub("layers.5"))?;
        x = graph.chain(x, depthwise([wide; 2], 8 * base, 2, p.sub("layers.6"))?);
        x = residual(&mut graph, x, [wide, 4 * base], self.blocks[3], p.sub("layers.7"))?;
        x = graph.chain(x, conv_block([wide, last], 1, ConvConfig::default(), p.sub("conv_sep"))?);
        self.head(&mut graph, x, p)?;
        Ok(graph)
    }

    fn head(&self, graph: &mut Graph, mut x: NodeId, mut p: Scope) -> Result<()> {
        let (last, side, size) = (8 * self.base, self.input_size / 16, self.embedding_size);
        let layers = match self.head {
            MobileFaceNetHead::Linear => {
                x = graph.chain(x, conv_block([last, self.base], 1, ConvConfig::default(), p.sub("conv_reduce"))?);
                let fc = Layer::linear([self.base * side * side, size], p.sub("fc"))?;
                [Layer::flatten(), fc, Layer::batch_norm_with_frozen_weight(size, p.sub("features"))?]
            }
            MobileFaceNetHead::GlobalDepthwise => {
                let mut p = p.sub("features.layers");
                let config = ConvConfig { groups: last, ..Default::default() };
                x = graph.chain(x, linear_block([last; 2], side, config, p.sub(0))?);
                let fc = Layer::linear_without_bias([last, size], fan_out_normal(size), p.sub(2))?;
                [Layer::flatten(), fc, Layer::batch_norm(size, p.sub(3))?]
            }
        };
        graph.chain(x, layers);
        Ok(())
    }
}

/// A 3x3 convolution that keeps the size.
const SAME: ConvConfig = ConvConfig { stride: 1, padding: 1, groups: 1 };

/// `N(0, 2 / fan_out)` (He et al., 2015), insightface's initialisation.
fn fan_out_normal(fan_out: usize) -> Init {
    Init::Normal((2.0 / fan_out as f64).sqrt())
}

/// Convolution, batch norm.
fn linear_block(channels: [usize; 2], kernel: usize, config: ConvConfig, mut p: Scope) -> Result<[Layer; 2]> {
    let init = fan_out_normal(channels[1] * kernel * kernel);
    let conv = Layer::conv2d(channels, kernel, config, init, p.sub("layers.0"))?;
    Ok([conv, Layer::batch_norm(channels[1], p.sub("layers.1"))?])
}

/// Convolution, batch norm, PReLU.
fn conv_block(channels: [usize; 2], kernel: usize, config: ConvConfig, mut p: Scope) -> Result<[Layer; 3]> {
    let prelu = Layer::prelu(channels[1], p.sub("layers.2"))?;
    let [conv, norm] = linear_block(channels, kernel, config, p)?;
    Ok([conv, norm, prelu])
}

/// 1x1 convolution to `hidden` channels, depthwise 3x3, 1x1 convolution without activation.
fn depthwise([c_in, c_out]: [usize; 2], hidden: usize, stride: usize, mut p: Scope) -> Result<Vec<Layer>> {
    let mut p = p.sub("layers");
    let mut layers = conv_block([c_in, hidden], 1, ConvConfig::default(), p.sub(0))?.to_vec();
    let config = ConvConfig { stride, groups: hidden, ..SAME };
    layers.extend(conv_block([hidden; 2], 3, config, p.sub(1))?);
    layers.extend(linear_block([hidden, c_out], 1, ConvConfig::default(), p.sub(2))?);
    Ok(layers)
}

/// Appends depthwise blocks, each plus its input.
fn residual(
    graph: &mut Graph,
    mut x: NodeId,
    [channels, hidden]: [usize; 2],
    num_blocks: usize,
    mut p: Scope,
) -> Result<NodeId> {
    for i in 0..num_blocks {
        let y = graph.chain(x, depthwise([channels; 2], hidden, 1, p.sub(format!("layers.{i}")))?);
        x = graph.push(Op::Add, "", &[x, y]);
    }
    Ok(x)
}
