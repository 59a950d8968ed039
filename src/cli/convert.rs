//! `maskinv convert`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use candle_core::DType;
use clap::{Args, ValueEnum};

use super::model::HubArgs;
use super::model_file::ModelFile;

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
        let file = ModelFile::new(&self.output)?;
        if file.is_onnx() && self.dtype != Precision::F32 {
            bail!("--dtype is for .safetensors: an ONNX graph computes in f32");
        }
        let loaded = self.hub.load_with_notes(&self.input)?;
        let dtype = match self.dtype {
            Precision::F32 => DType::F32,
            Precision::F16 => DType::F16,
            Precision::Bf16 => DType::BF16,
        };
        file.write(&loaded.model, dtype)?;
        eprintln!("{}: {}", self.output.display(), loaded.model.preprocessing());
        Ok(())
    }
}
