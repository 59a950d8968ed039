//! A network as a list of operations, which graph files such as ONNX are written from and matched against.

use crate::ops::conv::ConvConfig;

/// Index of a node in its [`Graph`].
pub type NodeId = usize;

/// Operation of a node in evaluation mode, so there is no dropout.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// The input images.
    Input,
    /// Convolution without bias; parameter `weight`.
    Conv2d(ConvConfig),
    /// Batch normalisation by running statistics; parameters `weight`, `bias`, `running_mean`, `running_var`.
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
    /// Sum of two inputs.
    Add,
    /// Product of two inputs, the second with one value per channel.
    Mul,
    /// Mean over the pixels of each channel.
    GlobalAveragePool,
    /// `max(x, 0)`.
    Relu,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
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
        format!("{}.{name}", self.path)
    }
}

/// Nodes in order of computation: the first is the input, the last the output.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    nodes: Vec<Node>,
}

impl Graph {
    /// Returns the graph of a network.
    pub fn of(network: &dyn Trace) -> Self {
        let mut graph = Self { nodes: vec![Node { op: Op::Input, path: String::new(), inputs: Vec::new() }] };
        network.trace(&mut graph, 0);
        graph
    }

    /// Appends a node and returns its index.
    pub fn push(&mut self, op: Op, path: &str, inputs: &[NodeId]) -> NodeId {
        self.nodes.push(Node { op, path: path.to_owned(), inputs: inputs.to_vec() });
        self.nodes.len() - 1
    }

    /// Appends `layers`, the first computed from `x` and each other from the one before; returns the last one's node.
    pub fn chain(&mut self, x: NodeId, layers: &[&dyn Trace]) -> NodeId {
        layers.iter().fold(x, |x, layer| layer.trace(self, x))
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }
}

/// A layer or network that can describe its computation.
pub trait Trace {
    /// Appends the nodes computed from node `x` to `graph` and returns the node of the result.
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId;
}
