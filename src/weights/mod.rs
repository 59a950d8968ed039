//! Readers and writers of checkpoint formats, and the locations of published models.

mod bundled;
mod elements;
mod hub;
pub mod manifest;
mod mxnet;
mod onnx;
mod pytorch;
mod reference;
mod safetensors;

pub use self::bundled::{Bundled, WeightsFile};
pub use self::hub::{Hub, HubConfig};
pub use self::mxnet::read_mxnet_params;
pub(crate) use self::onnx::looks_like_onnx;
pub use self::onnx::{OnnxAttribute, OnnxModel, OnnxNode, OnnxValue, read_onnx, write_onnx};
pub use self::pytorch::read_pytorch;
pub use self::reference::{DATASET_SCHEME, HubFile, ModelRef};
pub use self::safetensors::{TensorFile, parse_safetensors, read_safetensors, write_safetensors};
