//! Export and import of our networks as ONNX graphs.
//!
//! Both use [`Graph`](crate::nn::Graph). Export writes it node by node. Import matches a file against it node by node
//! from the output back, so that a file is accepted only if it computes what our network computes. Before that the
//! graph is simplified: what exporters write in several ways is made one.

mod export;
mod file;
mod import;
mod matching;
mod simplify;

pub use export::to_onnx;
pub use import::from_onnx;

/// What is wrong with a graph, in words.
type Result<T> = std::result::Result<T, String>;
