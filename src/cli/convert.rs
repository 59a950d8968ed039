//! `maskinv convert`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use candle_core::DType;
use clap::{Args, ValueEnum};

use super::model::HubArgs;
use crate::models::{export_onnx, save_model};

/// Which model, and what it becomes.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// A checkpoint (safetensors, .pth, ONNX, MXNet .params), a folder of a training, hf://owner/repo/file or a short name
    #[arg(value_name = "IN")]
    input: String,
    /// A new .safetensors file, with PyTorch's names, or .onnx, for any batch size
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Type of the numbers in a .safetensors file
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
    #[command(flatten)]
    hub: HubArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Precision {
    /// 32 bits: nothing is lost
    F32,
    /// 16 bits, 11 of precision
    F16,
    /// 16 bits, 8 of precision, the range of f32
    Bf16,
}

impl ConvertArgs {
    /// Loads the model and writes it.
    ///
    /// # Errors
    /// When it cannot be loaded, or the output exists or cannot be written.
    pub fn run(self) -> Result<()> {
        if self.output.exists() {
            bail!("{}: exists", self.output.display());
        }
        let extension = self.output.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let is_onnx = match extension {
            "safetensors" => false,
            "onnx" if self.dtype == Precision::F32 => true,
            "onnx" => bail!("--dtype is for .safetensors: an ONNX graph computes in f32"),
            other => bail!("{}: expected .safetensors or .onnx, found {other:?}", self.output.display()),
        };
        let loaded = self.hub.load_with_notes(&self.input)?;
        if is_onnx {
            export_onnx(&self.output, &loaded.model)?;
        } else {
            let dtype = match self.dtype {
                Precision::F32 => DType::F32,
                Precision::F16 => DType::F16,
                Precision::Bf16 => DType::BF16,
            };
            save_model(&self.output, &loaded.model, dtype)?;
        }
        eprintln!("{}: {}", self.output.display(), loaded.model.preprocessing());
        Ok(())
    }
}
