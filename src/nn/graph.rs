//! A network as a list of operations: the one statement of its maths, from which the engine's program, the candle
//! module and graph files such as ONNX are made.

use super::params::param_name;
use crate::ops::conv::ConvConfig;
use crate::ops::pool::Window;

/// Index of a node in its [`Graph`].
pub type NodeId = usize;

/// Operation of a node.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Op {
    /// The input images.
    Input,
    /// Convolution without bias; parameter `weight`.
    Conv2d(ConvConfig),
    /// Batch normalisation; parameters `weight`, `bias`, `running_mean`, `running_var`.
    BatchNorm,
    /// PReLU with a slope per channel; parameter `weight`.
    PRelu,
    /// Fully connected; parameters `weight` and, if it has one, `bias`.
    Linear {
        /// Whether there is a `bias`.
        has_bias: bool,
    },
    /// Channels, rows and columns flattened into one axis, in this order.
    Flatten,
    /// Dropout of the parameters' generator in training ([`Params::dropout`](super::Params::dropout)); nothing in
    /// evaluation.
    Dropout,
    /// Sum of two inputs.
    Add,
    /// Product of two inputs, the second with one value per channel.
    Mul,
    /// Mean over the pixels of each channel.
    GlobalAveragePool,
    /// Largest value of each window of pixels, for each channel.
    MaxPool(Window),
    /// Nearest upsampling: each pixel becomes a square of `factor` by `factor` pixels.
    Upsample {
        /// Length of the square's sides, at least 1.
        factor: usize,
    },
    /// The channels of all inputs, one after the other.
    Concat,
    /// `max(x, 0)`.
    Relu,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
}

/// An operation, and the path under which its parameters were created.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// The operation.
    pub op: Op,
    /// Prefix of its parameters' names; empty if it has none.
    pub path: String,
}

/// An operation, the path of its parameters, and its inputs.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// Prefix of its parameters' names; empty if it has none.
    pub path: String,
    /// Inputs, all earlier nodes.
    pub inputs: Vec<NodeId>,
}

impl Node {
    /// Returns the name of the node's parameter `name`.
    pub fn param(&self, name: &str) -> String {
        param_name(&self.path, name)
    }
}

/// Nodes in order of computation: the first is the input, the last the output unless others are named
/// ([`Self::set_outputs`]).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use maskinv::nn::{Graph, Init, Layer, Op, Params};
/// use maskinv::ops::conv::ConvConfig;
///
/// # fn main() -> candle_core::Result<()> {
/// let mut params = Params::new(DType::F64, &Device::Cpu, 0);
/// let mut scope = params.root();
/// let mut graph = Graph::new();
/// let conv = Layer::conv2d([3, 4], 1, ConvConfig::default(), Init::Normal(0.1), scope.sub("conv"))?;
/// let x = graph.chain(Graph::INPUT, [conv, Layer::batch_norm(4, scope.sub("norm"))?]);
/// graph.push(Op::Relu, "", &[x]);
/// let images = Tensor::zeros((2, 3, 5, 5), DType::F64, &Device::Cpu)?;
/// assert_eq!(graph.forward_t(&params, &images, true)?.dims(), [2, 5, 5, 4]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    nodes: Vec<Node>,
    /// Empty for the last node.
    outputs: Vec<NodeId>,
}

impl Default for Graph {
    fn default() -> Self {
        Self { nodes: vec![Node { op: Op::Input, path: String::new(), inputs: Vec::new() }], outputs: Vec::new() }
    }
}

impl Graph {
    /// The node of the input.
    pub const INPUT: NodeId = 0;

    /// Returns a graph of the input alone.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a node and returns its index.
    pub fn push(&mut self, op: Op, path: &str, inputs: &[NodeId]) -> NodeId {
        self.nodes.push(Node { op, path: path.to_owned(), inputs: inputs.to_vec() });
        self.nodes.len() - 1
    }

    /// Appends layers, the first computed from `x` and each other from the one before; returns the last one's node.
    pub fn chain(&mut self, x: NodeId, layers: impl IntoIterator<Item = Layer>) -> NodeId {
        layers.into_iter().fold(x, |x, Layer { op, path }| self.push(op, &path, &[x]))
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Names the outputs, such as the maps of a detector; a network with several runs in inference only.
    ///
    /// # Panics
    /// When an output is no node.
    pub fn set_outputs(&mut self, outputs: impl Into<Vec<NodeId>>) {
        self.outputs = outputs.into();
        assert!(self.outputs.iter().all(|output| *output < self.nodes.len()), "outputs {:?}", self.outputs);
    }

    /// The outputs; the last node if none were named.
    pub fn outputs(&self) -> Vec<NodeId> {
        if self.outputs.is_empty() { vec![self.nodes.len() - 1] } else { self.outputs.clone() }
    }

    /// Returns the graph of evaluation, without dropout.
    pub fn in_evaluation(&self) -> Self {
        let (mut nodes, mut moved) = (Vec::new(), Vec::new());
        for node in &self.nodes {
            let inputs: Vec<NodeId> = node.inputs.iter().map(|input| moved[*input]).collect();
            if node.op == Op::Dropout {
                moved.push(inputs[0]);
                continue;
            }
            moved.push(nodes.len());
            nodes.push(Node { inputs, ..node.clone() });
        }
        Self { nodes, outputs: self.outputs.iter().map(|output| moved[*output]).collect() }
    }
}
