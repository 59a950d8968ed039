//! The ONNX format, as far as networks of convolutions need it: read from and written to protocol buffers.
//! Field numbers are those of `onnx.proto3` (onnx/onnx, IR version 10).

mod read;
mod write;

use std::collections::BTreeMap;

use candle_core::Tensor;

pub(crate) use read::looks_like_onnx;
pub use read::read_onnx;
pub use write::write_onnx;

/// A graph with its weights.
#[derive(Clone, Debug, Default)]
pub struct OnnxModel {
    /// Version of the default operator set.
    pub opset: i64,
    /// What wrote the file, such as `pytorch 1.8`.
    pub producer: String,
    /// Operations, each after those it depends on.
    pub nodes: Vec<OnnxNode>,
    /// Weights and constants by name, on the CPU.
    pub initializers: BTreeMap<String, Tensor>,
    /// What the graph is fed with; initializers are not among them.
    pub inputs: Vec<OnnxValue>,
    /// What the graph gives back.
    pub outputs: Vec<OnnxValue>,
    /// Free strings.
    pub metadata: BTreeMap<String, String>,
}

/// One operation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OnnxNode {
    /// The operator, such as `Conv`.
    pub op_type: String,
    /// Names of what it reads; empty for an optional input that is left out.
    pub inputs: Vec<String>,
    /// Names of what it computes.
    pub outputs: Vec<String>,
    /// Its settings by name.
    pub attributes: BTreeMap<String, OnnxAttribute>,
}

/// A setting of an operation.
#[derive(Clone, Debug, PartialEq)]
pub enum OnnxAttribute {
    /// A float.
    Float(f32),
    /// An integer.
    Int(i64),
    /// Integers.
    Ints(Vec<i64>),
    /// Anything else, which networks of ours have no use for.
    Other,
}

/// An input or output of a graph, f32.
#[derive(Clone, Debug, PartialEq)]
pub struct OnnxValue {
    /// Its name.
    pub name: String,
    /// Its axes; none where the size is left open. No axes if the file does not say.
    pub dims: Vec<Option<i64>>,
}
