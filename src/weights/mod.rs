//! Readers and writers of checkpoint formats, and the locations of published models.

mod bundled;
mod elements;
mod hub;
mod hub_file;
pub mod manifest;
mod mxnet;
mod onnx;
mod pytorch;
mod reference;
mod safetensors;

pub use self::bundled::{Bundled, WeightsFile};
pub use self::hub::{Hub, HubConfig};
pub use self::hub_file::HubFile;
pub use self::mxnet::read_mxnet_params;
pub use self::onnx::{OnnxAttribute, OnnxModel, OnnxNode, OnnxValue, read_onnx, write_onnx};
pub(crate) use self::onnx::{OnnxFiles, looks_like_onnx};
pub use self::pytorch::read_pytorch;
pub use self::reference::{DATASET_SCHEME, ModelRef};
pub use self::safetensors::{TensorFile, parse_safetensors, read_safetensors, write_safetensors};
