//! Reader and writer of the subset of ONNX that convolutional networks need, on top of protocol buffers.
//! Field numbers are those of `onnx.proto3` (onnx/onnx, IR version 10).

mod external;
mod files;
mod read;
mod write;

use std::collections::BTreeMap;

use candle_core::Tensor;

pub(crate) use files::OnnxFiles;
pub(crate) use read::looks_like_onnx;
pub use read::read_onnx;
pub use write::write_onnx;

/// A graph with its weights.
#[derive(Clone, Debug, Default)]
pub struct OnnxModel {
    /// Version of the default operator set.
    pub opset: i64,
    /// Name and version of the exporter, such as `pytorch 1.8`.
    pub producer: String,
    /// Operations in topological order.
    pub nodes: Vec<OnnxNode>,
    /// Weights and constants by name, on the CPU.
    pub initializers: BTreeMap<String, Tensor>,
    /// Constants whose elements are not numbers, or of a type that no network of ours has: their ONNX types by name.
    pub unsupported: BTreeMap<String, i64>,
    /// Inputs of the graph, without initializers.
    pub inputs: Vec<OnnxValue>,
    /// Outputs of the graph.
    pub outputs: Vec<OnnxValue>,
    /// Metadata strings by key.
    pub metadata: BTreeMap<String, String>,
}

/// One operation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OnnxNode {
    /// The operator, such as `Conv`; one that is not of ONNX's own set has its domain before it, `com.microsoft.Conv`.
    pub op_type: String,
    /// Names of its inputs; empty for an optional input that is left out.
    pub inputs: Vec<String>,
    /// Names of its outputs.
    pub outputs: Vec<String>,
    /// Attributes by name.
    pub attributes: BTreeMap<String, OnnxAttribute>,
}

/// An attribute of an operation.
#[derive(Clone, Debug, PartialEq)]
pub enum OnnxAttribute {
    /// A float.
    Float(f32),
    /// An integer.
    Int(i64),
    /// Integers.
    Ints(Vec<i64>),
    /// Floats.
    Floats(Vec<f32>),
    /// A text.
    Text(String),
    /// Any other type, which this crate's networks do not need.
    Other,
}

/// An f32 input or output of a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct OnnxValue {
    /// Its name.
    pub name: String,
    /// Size of each axis, `None` for a dynamic one; empty if the file does not give a shape.
    pub dims: Vec<Option<i64>>,
}
