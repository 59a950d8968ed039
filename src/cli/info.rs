//! `maskinv info`.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use anyhow::Result;
use clap::Args;

use super::model::HubArgs;
use super::{print, print_json};
use crate::machine::{Choice, Machine, Precision};
use crate::models::{ConvolutionPass, Loaded};

/// Arguments of `maskinv info`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Checkpoints (safetensors, .pth, ONNX or MXNet .params), folders of trained arms (runs/NAME/ARM), or, with the
    /// feature hub, hf://owner/repo/file or short names of `download --list`
    #[arg(required_unless_present = "device", value_name = "MODEL")]
    models: Vec<String>,
    /// Describe this device too, and how each model's convolutions run there: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    device: Option<Choice>,
    /// GPU precision for --device: bf16, f16, tf32 or f32
    #[arg(long, value_name = "TYPE", default_value = "tf32", requires = "device")]
    precision: Precision,
    /// Images per batch for --device
    #[arg(long, value_name = "N", default_value = "128", requires = "device")]
    batch_size: NonZeroUsize,
    #[command(flatten)]
    hub: HubArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl InfoArgs {
    /// Loads each model and prints its description, and that of the device.
    ///
    /// # Errors
    /// When a model cannot be loaded (the message lists missing, unexpected and misshapen tensors), or the device not
    /// opened.
    pub fn run(self) -> Result<()> {
        let machine = self.device.map(|device| Machine::open(device, self.precision)).transpose()?;
        let loaded = self.models.iter().map(|name| self.hub.load(name)).collect::<Result<Vec<_>>>()?;
        let mut records = Vec::new();
        for (name, loaded) in self.models.iter().zip(loaded) {
            let (mut record, text) = (record(&loaded)?, describe(name, &loaded)?);
            let convolutions = match &machine {
                Some(machine) => loaded.model.on(machine).convolutions(self.batch_size.into())?,
                None => Vec::new(),
            };
            if machine.is_some() {
                record["convolutions"] = serde_json::to_value(&convolutions)?;
            }
            records.push(record);
            if !self.json {
                print(&text)?;
                let heads = convolutions.first().map(|_| ConvolutionPass::heads());
                let rows = convolutions.iter().map(ToString::to_string);
                heads.into_iter().chain(rows).try_for_each(|row| print(&format!("  {row}")))?;
            }
        }
        let facts = machine.as_ref().map(Machine::facts).unwrap_or_default();
        let notices = machine.as_ref().map(Machine::take_notices).unwrap_or_default();
        if let (true, Some(machine)) = (self.json, &machine) {
            let facts: BTreeMap<_, _> = facts.into_iter().collect();
            let device = serde_json::json!({ "name": machine.to_string(), "facts": facts, "notices": notices });
            return print_json(&serde_json::json!({ "models": records, "device": device }));
        }
        if self.json {
            return print_json(&records);
        }
        if let Some(machine) = &machine {
            print(&format!("{machine}:"))?;
            facts.iter().try_for_each(|(title, value)| print(&format!("  {title:13}  {value}")))?;
            notices.iter().try_for_each(|notice| print(&format!("  note           {notice}")))?;
        }
        Ok(())
    }
}

fn record(loaded: &Loaded) -> Result<serde_json::Value> {
    let model = &loaded.model;
    let head = model.mask_head();
    let head = head.map(|head| serde_json::json!({ "fitted_on": head.fitted_on, "accuracy": head.accuracy }));
    let quantised = model.quantised().map(|quantised| {
        let layers: Vec<&String> = quantised.layers.keys().collect();
        serde_json::json!({ "layers": layers, "calibrated_on": quantised.calibrated_on })
    });
    Ok(serde_json::json!({
        "file": loaded.file.to_string(),
        "bytes": loaded.file.num_bytes()?,
        "format": loaded.format.name(),
        "recognised_by": loaded.layout.to_string(),
        "model": model.config(),
        "num_parameters": model.num_parameters(),
        "preprocessing": model.preprocessing(),
        "thresholds": model.thresholds(),
        "mask_head": head,
        "quantised": quantised,
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
        format!("  network        {network}, {:.2} M parameters", loaded.model.num_parameters() as f64 / 1e6),
        format!("  input          {size}x{size} pixels, {}", loaded.model.preprocessing()),
        format!("  embedding      {} elements", config.embedding_size),
    ];
    lines.extend(loaded.model.quantised().map(|quantised| format!("  int8           {quantised}")));
    lines.extend(loaded.model.thresholds().iter().map(|threshold| format!("  threshold      {threshold}")));
    lines.extend(loaded.model.mask_head().map(|head| format!("  mask head      {head}")));
    lines.extend(loaded.notes.iter().map(|note| format!("  note           {note}")));
    Ok(lines.join("\n"))
}
