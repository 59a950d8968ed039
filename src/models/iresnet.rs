//! IResNet: the improved residual network of insightface and ElasticFace (Duta et al., 2020; Deng et al., CVPR 2019).

use candle_core::Result;

use super::{ModelConfig, scaled};
use crate::nn::{Graph, Init, Layer, NodeId, Op, Scope, squeeze_excitation};
use crate::ops::conv::ConvConfig;

/// Standard deviation of the initial convolution weights.
const CONV_INIT: Init = Init::Normal(0.1);
/// A 3x3 convolution that keeps the size.
const SAME: ConvConfig = ConvConfig { stride: 1, padding: 1, groups: 1 };
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

    /// Returns the network, stem, four stages of residual blocks, `fc`, batch norm of the embedding, which maps images
    /// `(N, 3, S, S)` to embeddings `(N, embedding_size)`. Creates its parameters under insightface's names.
    ///
    /// # Errors
    /// When a parameter name is already in use or memory cannot be allocated.
    pub fn build(&self, mut p: Scope) -> Result<Graph> {
        let [first, .., last] = self.planes;
        let mut graph = Graph::new();
        let stem = [
            Layer::conv2d([3, first], 3, SAME, CONV_INIT, p.sub("conv1"))?,
            Layer::batch_norm(first, p.sub("bn1"))?,
            Layer::prelu(first, p.sub("prelu"))?,
        ];
        let mut x = graph.chain(Graph::INPUT, stem);
        let mut c_in = first;
        for (stage, (&blocks, &planes)) in self.layers.iter().zip(&self.planes).enumerate() {
            for block in 0..blocks {
                let stride = if block == 0 { 2 } else { 1 };
                let p = p.sub(format!("layer{}.{block}", stage + 1));
                x = self.block(&mut graph, x, [c_in, planes], stride, p)?;
                c_in = planes;
            }
        }
        let side = self.input_size / 16;
        let head = [
            Layer::batch_norm(last, p.sub("bn2"))?,
            Layer::flatten(),
            Layer::dropout(self.dropout, &mut p)?,
            Layer::linear([last * side * side, self.embedding_size], p.sub("fc"))?,
            Layer::batch_norm_with_frozen_weight(self.embedding_size, p.sub("features"))?,
        ];
        graph.chain(x, head);
        Ok(graph)
    }

    /// Appends batch norm, 3x3 convolution, batch norm, PReLU, 3x3 convolution, batch norm; plus the input.
    fn block(
        &self,
        graph: &mut Graph,
        x: NodeId,
        [c_in, c_out]: [usize; 2],
        stride: usize,
        mut p: Scope,
    ) -> Result<NodeId> {
        // Its parameters are drawn first.
        let downsample = if stride != 1 || c_in != c_out {
            let config = ConvConfig { stride, ..Default::default() };
            let conv = Layer::conv2d([c_in, c_out], 1, config, CONV_INIT, p.sub("downsample.0"))?;
            Some([conv, Layer::batch_norm(c_out, p.sub("downsample.1"))?])
        } else {
            None
        };
        let strided = ConvConfig { stride, ..SAME };
        let layers = [
            Layer::batch_norm(c_in, p.sub("bn1"))?,
            Layer::conv2d([c_in, c_out], 3, SAME, CONV_INIT, p.sub("conv1"))?,
            Layer::batch_norm(c_out, p.sub("bn2"))?,
            Layer::prelu(c_out, p.sub("prelu"))?,
            Layer::conv2d([c_out, c_out], 3, strided, CONV_INIT, p.sub("conv2"))?,
            Layer::batch_norm(c_out, p.sub("bn3"))?,
        ];
        let mut y = graph.chain(x, layers);
        if self.squeeze_excitation {
            y = squeeze_excitation(graph, y, [c_out, c_out / SE_REDUCTION.min(c_out)], p.sub("se_block"))?;
        }
        let shortcut = downsample.map_or(x, |layers| graph.chain(x, layers));
        Ok(graph.push(Op::Add, "", &[y, shortcut]))
    }
}
