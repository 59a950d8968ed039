//! Tensors in files.

mod safetensors;

pub use self::safetensors::{TensorFile, read_safetensors, write_atomic, write_safetensors};
