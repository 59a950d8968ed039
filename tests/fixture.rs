//! Reads the parity fixtures that the scripts in `tests/fixtures` made with PyTorch.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;

/// The folder of faces and published models. Tests that need it are ignored unless they are asked for.
pub fn data() -> PathBuf {
    std::env::var_os("MASKINV_DATA").expect("MASKINV_DATA names the folder of faces and published models").into()
}

/// Tensors and metadata of one file in `tests/fixtures`.
pub struct Fixture {
    tensors: HashMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl Fixture {
    pub fn load(name: &str) -> Result<Self> {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name).with_extension("safetensors");
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let (_, header) = SafeTensors::read_metadata(&bytes)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        Ok(Self { tensors: candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?, metadata })
    }

    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("no tensor {name} in the fixture"))
    }

    pub fn meta(&self, name: &str) -> Result<&str> {
        Ok(self.metadata.get(name).with_context(|| format!("no metadata {name} in the fixture"))?)
    }

    pub fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T> {
        Ok(serde_json::from_str(self.meta(name)?)?)
    }
}
