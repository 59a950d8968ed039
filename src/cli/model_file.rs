//! Model files written by commands.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use candle_core::DType;

use crate::files::check_writable;
use crate::models::{Arch, Model, export_onnx, save_model};

/// A new .safetensors or .onnx file.
pub(super) struct ModelFile {
    path: PathBuf,
    is_onnx: bool,
}

impl ModelFile {
    /// Checks the output path, before any expensive work.
    ///
    /// # Errors
    /// When the file exists or its extension is neither `.safetensors` nor `.onnx`.
    pub fn new(path: &Path) -> Result<Self> {
        if path.exists() {
            bail!("{}: exists already", path.display());
        }
        let is_onnx = match path.extension().and_then(|e| e.to_str()).unwrap_or_default() {
            "safetensors" => false,
            "onnx" => true,
            other => bail!("{}: expected .safetensors or .onnx, found {other:?}", path.display()),
        };
        check_writable(path)?;
        Ok(Self { path: path.to_owned(), is_onnx })
    }

    /// Whether the output is an ONNX graph, which computes in f32.
    pub fn is_onnx(&self) -> bool {
        self.is_onnx
    }

    /// Checks that the model can be written in this format, before any expensive work.
    ///
    /// # Errors
    /// When a network of another architecture is to become safetensors.
    pub fn check(&self, model: &Model) -> Result<()> {
        if !self.is_onnx && model.config().arch == Arch::Onnx {
            bail!("{}: expected .onnx for a network of another architecture, which is copied", self.path.display());
        }
        Ok(())
    }

    /// Writes the model; `dtype` applies to a .safetensors file only.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, model: &Model, dtype: DType) -> Result<()> {
        match self.is_onnx {
            true => export_onnx(&self.path, model)?,
            false => save_model(&self.path, model, dtype)?,
        }
        Ok(())
    }
}
