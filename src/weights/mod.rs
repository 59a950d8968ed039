//! Tensors and graphs in files, and where files of published models are.

mod elements;
mod hub;
pub mod manifest;
mod mxnet;
mod onnx;
mod pytorch;
mod reference;
mod safetensors;

pub use self::hub::{Hub, HubConfig};
pub use self::mxnet::read_mxnet_params;
pub(crate) use self::onnx::looks_like_onnx;
pub use self::onnx::{OnnxAttribute, OnnxModel, OnnxNode, OnnxValue, read_onnx, write_onnx};
pub use self::pytorch::read_pytorch;
pub use self::reference::{DATASET_SCHEME, HubFile, ModelRef};
pub use self::safetensors::{TensorFile, read_safetensors, write_safetensors};
