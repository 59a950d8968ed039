//! Convolution, batch norm, PReLU, linear, dropout and squeeze-excitation layers with PyTorch's parameter names and
//! layouts.

use candle_core::Result;

use super::graph::{Graph, Layer, NodeId, Op};
use super::params::{Init, Scope};
use crate::ops::conv::ConvConfig;

impl Layer {
    /// Convolution without bias, `(N, H, W, c_in)` to `(N, H', W', c_out)`. Creates
    /// `weight: (c_out, c_in / groups, kernel, kernel)`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn conv2d(
        [c_in, c_out]: [usize; 2],
        kernel: usize,
        config: ConvConfig,
        init: Init,
        mut p: Scope,
    ) -> Result<Self> {
        p.param("weight", (c_out, c_in / config.groups, kernel, kernel), init)?;
        Ok(Self::at(Op::Conv2d(config), &p))
    }

    /// Batch normalisation over the last axis, with PyTorch's running statistics (momentum 0.1, unbiased variance).
    /// Creates `weight` (ones), `bias` (zeros), `running_mean`, `running_var` and `num_batches_tracked`.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn batch_norm(channels: usize, mut p: Scope) -> Result<Self> {
        p.param("weight", channels, Init::Const(1.0))?;
        Self::batch_norm_of_weight(channels, p)
    }

    /// Like [`Self::batch_norm`], with a weight that stays 1.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn batch_norm_with_frozen_weight(channels: usize, mut p: Scope) -> Result<Self> {
        p.buffer("weight", channels, Init::Const(1.0))?;
        Self::batch_norm_of_weight(channels, p)
    }

    fn batch_norm_of_weight(channels: usize, mut p: Scope) -> Result<Self> {
        p.param("bias", channels, Init::Const(0.0))?;
        p.running_statistics(channels)?;
        Ok(Self::at(Op::BatchNorm, &p))
    }

    /// PReLU with a slope per channel. Creates `weight: (channels)`, 0.25 each as in PyTorch.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn prelu(channels: usize, mut p: Scope) -> Result<Self> {
        p.param("weight", channels, Init::Const(0.25))?;
        Ok(Self::at(Op::PRelu, &p))
    }

    /// Fully connected layer, `(N, c_in)` to `(N, c_out)`. Creates `weight: (c_out, c_in)` and `bias: (c_out)`, both
    /// uniform in `+-1 / sqrt(c_in)` as in PyTorch.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn linear([c_in, c_out]: [usize; 2], mut p: Scope) -> Result<Self> {
        let init = Init::Uniform(1.0 / (c_in as f64).sqrt());
        p.param("weight", (c_out, c_in), init)?;
        p.param("bias", c_out, init)?;
        Ok(Self::at(Op::Linear { has_bias: true }, &p))
    }

    /// Like [`Self::linear`], without a bias.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn linear_without_bias([c_in, c_out]: [usize; 2], init: Init, mut p: Scope) -> Result<Self> {
        p.param("weight", (c_out, c_in), init)?;
        Ok(Self::at(Op::Linear { has_bias: false }, &p))
    }

    /// Flattening of channels, rows and columns into one axis.
    pub fn flatten() -> Self {
        Self { op: Op::Flatten, path: String::new() }
    }

    /// Dropout that drops each element with `probability`, in `[0, 1)`. Its generator depends on the seed.
    ///
    /// # Errors
    /// When the network already has dropout.
    pub fn dropout(probability: f64, p: &mut Scope) -> Result<Self> {
        p.dropout(probability)?;
        Ok(Self { op: Op::Dropout, path: String::new() })
    }

    fn at(op: Op, p: &Scope) -> Self {
        Self { op, path: p.prefix().to_owned() }
    }
}

/// Appends squeeze-excitation of `x` (Hu et al., CVPR 2018) with two bias-free 1x1 convolutions, as in ElasticFace's
/// IResNet: each channel is scaled by a factor in (0, 1) computed from the means of all channels. Creates
/// `fc1.weight: (hidden, channels, 1, 1)` and `fc2.weight: (channels, hidden, 1, 1)`.
///
/// # Errors
/// When a name is taken.
pub fn squeeze_excitation(
    graph: &mut Graph,
    x: NodeId,
    [channels, hidden]: [usize; 2],
    mut p: Scope,
) -> Result<NodeId> {
    let (init, config) = (Init::Normal(0.1), ConvConfig::default());
    let mean = graph.push(Op::GlobalAveragePool, "", &[x]);
    let squeezed = graph.chain(mean, [Layer::conv2d([channels, hidden], 1, config, init, p.sub("fc1"))?]);
    let hidden_units = graph.push(Op::Relu, "", &[squeezed]);
    let excited = graph.chain(hidden_units, [Layer::conv2d([hidden, channels], 1, config, init, p.sub("fc2"))?]);
    let scale = graph.push(Op::Sigmoid, "", &[excited]);
    Ok(graph.push(Op::Mul, "", &[x, scale]))
}
