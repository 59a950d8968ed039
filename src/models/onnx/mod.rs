//! Export and import of our networks as ONNX graphs.
//!
//! Both use [`Graph`](crate::nn::Graph). Export writes it node by node. Import matches a file against it node by node
//! from the output back, so that a file is accepted only if it computes what our network computes.

mod export;
mod import;
mod simplify;

pub use export::to_onnx;
pub use import::from_onnx;
