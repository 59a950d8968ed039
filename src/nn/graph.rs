//! A network as a list of operations: what is written to and matched against files that hold graphs.

use crate::ops::conv::ConvConfig;

/// Number of a node in its [`Graph`].
pub type NodeId = usize;

/// What a node computes from its inputs; in evaluation, so dropout is nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// The images.
    Input,
    /// Convolution without bias; parameter `weight`.
    Conv2d(ConvConfig),
    /// Batch normalisation by running statistics; parameters `weight`, `bias`, `running_mean`, `running_var`.
    BatchNorm,
    /// A slope per channel below zero; parameter `weight`.
    PRelu,
    /// Fully connected; parameters `weight` and, if it has one, `bias`.
    Linear {
        /// Whether there is a `bias`.
        has_bias: bool,
    },
    /// Channels, rows, columns into one axis, in this order.
    Flatten,
    /// Sum of two.
    Add,
    /// Product of two, the second with one value per channel.
    Mul,
    /// Mean over the pixels of each channel.
    GlobalAveragePool,
    /// `max(x, 0)`.
    Relu,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
}

/// An operation, where its parameters are, and what it is computed from.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What is computed.
    pub op: Op,
    /// Prefix of its parameters' names; empty if it has none.
    pub path: String,
    /// Nodes before this one.
    pub inputs: Vec<NodeId>,
}

impl Node {
    /// Returns the name of the node's parameter `name`.
    pub fn param(&self, name: &str) -> String {
        format!("{}.{name}", self.path)
    }
}

/// Nodes in an order of computation: the first is the input, the last the output.
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

    /// Appends a node and returns its number.
    pub fn push(&mut self, op: Op, path: &str, inputs: &[NodeId]) -> NodeId {
        self.nodes.push(Node { op, path: path.to_owned(), inputs: inputs.to_vec() });
        self.nodes.len() - 1
    }

    /// Appends `layers`, each computed from the one before and the first from `x`; returns the last one's node.
    pub fn chain(&mut self, x: NodeId, layers: &[&dyn Trace]) -> NodeId {
        layers.iter().fold(x, |x, layer| layer.trace(self, x))
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }
}

/// A layer or network that can say what it computes.
pub trait Trace {
    /// Appends what is computed from node `x` to `graph` and returns the node of the result.
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId;
}
