//! Our networks as ONNX graphs, both ways.
//!
//! Both go through [`Graph`](crate::nn::Graph): it is written node by node, and a file is matched against it node by
//! node from the output back, so that a file is taken only if it computes what our network computes.

mod export;
mod import;

pub use export::to_onnx;
pub use import::from_onnx;
