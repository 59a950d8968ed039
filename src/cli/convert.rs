//! `maskinv convert`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use candle_core::DType;
use clap::{Args, ValueEnum};

use super::model::HubArgs;
use super::model_file::ModelFile;
use crate::cli::tell;

/// Arguments of `maskinv convert`.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// Checkpoint (safetensors, .pth, ONNX or MXNet .params), folder of a trained arm (runs/NAME/ARM), or, with the
    /// feature hub, hf://owner/repo/file or a short name of `download --list`
    #[arg(value_name = "IN")]
    input: String,
    /// New .safetensors file, with PyTorch's parameter names, or .onnx file, with dynamic batch size
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Data type of the tensors in a .safetensors file
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
    #[command(flatten)]
    hub: HubArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Precision {
    /// 32 bits, lossless
    F32,
    /// 16 bits with 11-bit precision
    F16,
    /// 16 bits with 8-bit precision and the range of f32
    Bf16,
}

impl ConvertArgs {
    /// Loads the model and writes it in the new format.
    ///
    /// # Errors
    /// When the model cannot be loaded, or the output exists or cannot be written.
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
        let mut model = loaded.model;
        if dtype != DType::F32 && !model.thresholds().is_empty() {
            let what = "thresholds are dropped, they were measured in f32: calibrate the converted model";
            tell(format_args!("{}: {} {what}", self.input, model.thresholds().len()));
            model = model.with_thresholds(Vec::new());
        }
        file.write(&model, dtype)?;
        tell(format_args!("{}: {}", self.output.display(), model.preprocessing()));
        Ok(())
    }
}
