//! `maskinv info`.

use anyhow::Result;
use clap::Args;

use super::model::HubArgs;
use super::{print, print_json};
use crate::models::Loaded;

/// Arguments of `maskinv info`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Checkpoints (safetensors, .pth, ONNX or MXNet .params), folders of trained arms (runs/NAME/ARM), or, with the
    /// feature hub, hf://owner/repo/file or short names of `download --list`
    #[arg(required = true, value_name = "MODEL")]
    models: Vec<String>,
    #[command(flatten)]
    hub: HubArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl InfoArgs {
    /// Loads each model and prints its description.
    ///
    /// # Errors
    /// When a model cannot be loaded; the message lists missing, unexpected and misshapen tensors.
    pub fn run(self) -> Result<()> {
        let loaded = self.models.iter().map(|name| self.hub.load(name)).collect::<Result<Vec<_>>>()?;
        if self.json {
            return print_json(&loaded.iter().map(record).collect::<Result<Vec<_>>>()?);
        }
        for (name, loaded) in self.models.iter().zip(&loaded) {
            print(&describe(name, loaded)?)?;
        }
        Ok(())
    }
}

fn record(loaded: &Loaded) -> Result<serde_json::Value> {
    let model = &loaded.model;
    Ok(serde_json::json!({
        "file": loaded.file.to_string(),
        "bytes": loaded.file.num_bytes()?,
        "format": loaded.format.name(),
        "recognised_by": loaded.layout.to_string(),
        "model": model.config(),
        "num_parameters": model.params().num_parameters(),
        "preprocessing": model.preprocessing(),
        "thresholds": model.thresholds(),
        "notes": loaded.notes,
    }))
}

fn describe(name: &str, loaded: &Loaded) -> Result<String> {
    let config = loaded.model.config();
    let mut network = config.arch.title().to_owned();
    if config.width != 1.0 {
        network += &format!(", width {}", config.width);
    }
    if config.squeeze_excitation {
        network += ", squeeze-excitation";
    }
    let size = config.input_size;
    let megabytes = loaded.file.num_bytes()? as f64 / 1e6;
    let mut lines = vec![
        format!("{name}:"),
        format!("  file           {} ({megabytes:.1} MB, {})", loaded.file, loaded.format.name()),
        format!("  recognised by  {}", loaded.layout),
        format!("  network        {network}, {:.2} M parameters", loaded.model.params().num_parameters() as f64 / 1e6),
        format!("  input          {size}x{size} pixels, {}", loaded.model.preprocessing()),
        format!("  embedding      {} elements", config.embedding_size),
    ];
    lines.extend(loaded.model.thresholds().iter().map(|threshold| format!("  threshold      {threshold}")));
    lines.extend(loaded.notes.iter().map(|note| format!("  note           {note}")));
    Ok(lines.join("\n"))
}
