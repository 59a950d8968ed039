//! Checkpoints: a backbone and its head, each a safetensors file with PyTorch's names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::losses::MarginHead;
use crate::models::{Model, ModelConfig};
use crate::weights::{read_safetensors, write_safetensors};

/// File names in an arm's folder; the published code calls the pair backbone and header.
const BACKBONE: &str = "backbone.safetensors";
const HEADER: &str = "header.safetensors";
/// Metadata key of the architecture, JSON of [`ModelConfig`].
const MODEL_KEY: &str = "maskinv.model";

/// A trained backbone, frozen, and the class centres of its head.
#[derive(Debug)]
pub struct Checkpoint {
    /// The file it was loaded from, if any.
    pub path: Option<PathBuf>,
    /// The backbone.
    pub backbone: Model,
    /// The head's parameters; absent if there was no file of them.
    pub header: Option<BTreeMap<String, Tensor>>,
}

/// Writes `backbone.safetensors` and `header.safetensors` to `folder`, which is made if need be.
///
/// # Errors
/// When the folder cannot be made or written to; older files stay whole.
pub fn save_checkpoint(folder: &Path, backbone: &Model, head: &MarginHead) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let model = serde_json::to_string(backbone.config()).map_err(|e| Error::Config(e.to_string()))?;
    let preprocessing = "112x112 crops aligned to the ArcFace template, RGB, (x / 255 - 0.5) / 0.5, NCHW";
    let metadata = BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        (MODEL_KEY.to_owned(), model),
        ("maskinv.preprocessing".to_owned(), preprocessing.to_owned()),
    ]);
    write_safetensors(&folder.join(BACKBONE), &backbone.params().state()?, &metadata)?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&folder.join(HEADER), &head.params().state()?, &metadata)
}

/// Loads a frozen backbone: a file that [`save_checkpoint`] wrote, or the folder it is in.
///
/// # Errors
/// When the file cannot be read, does not say its architecture, or does not fit it.
pub fn load_backbone(path: &Path) -> Result<Model> {
    let path = backbone_path(path);
    let file = read_safetensors(&path)?;
    let wrong = |what: String| Error::Checkpoint { path: path.clone(), what };
    let Some(config) = file.metadata.get(MODEL_KEY) else {
        return Err(wrong(format!("expected the architecture in the metadata under {MODEL_KEY}, found none")));
    };
    let config: ModelConfig =
        serde_json::from_str(config).map_err(|e| wrong(format!("{MODEL_KEY} in the metadata: {e}")))?;
    config.validate().map_err(|e| wrong(format!("{MODEL_KEY} in the metadata: {e}")))?;
    let model = Model::frozen(&config, &Device::Cpu)?;
    model.params().load(&file.tensors).map_err(|e| wrong(e.to_string()))?;
    Ok(model)
}

/// Loads a backbone as [`load_backbone`], and the header beside it.
///
/// # Errors
/// As [`load_backbone`]; a missing header is none.
pub fn load_checkpoint(path: &Path) -> Result<Checkpoint> {
    let path = backbone_path(path);
    let backbone = load_backbone(&path)?;
    let header = path.with_file_name(HEADER);
    let header = if header.exists() { Some(read_safetensors(&header)?.tensors) } else { None };
    Ok(Checkpoint { path: Some(path), backbone, header })
}

fn backbone_path(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(BACKBONE) } else { path.to_owned() }
}
