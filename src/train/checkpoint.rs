//! Checkpoints of a training: a backbone and its head, each a safetensors file with PyTorch's names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::losses::MarginHead;
use crate::models::{BACKBONE_FILE, Loaded, Model, save_model};
use crate::weights::{read_safetensors, write_safetensors};

/// File name of the head beside the backbone; the published code calls it header.
const HEADER_FILE: &str = "header.safetensors";

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

impl Checkpoint {
    /// Returns a loaded backbone with the head that a training saved beside it, if there is one.
    ///
    /// # Errors
    /// When the head's file is broken.
    pub fn of(loaded: Loaded) -> Result<Self> {
        let header = loaded.path.with_file_name(HEADER_FILE);
        let is_ours = loaded.path.file_name().is_some_and(|name| name == BACKBONE_FILE);
        let header = if is_ours && header.exists() { Some(read_safetensors(&header)?.tensors) } else { None };
        Ok(Self { path: Some(loaded.path), backbone: loaded.model, header })
    }
}

/// Writes `backbone.safetensors` and, where class centres were trained, `header.safetensors` to `folder`, which is made
/// if need be. Without centres an older file of them is removed: it is another backbone's.
///
/// # Errors
/// When the folder cannot be made or written to; older files stay whole.
pub fn save_checkpoint(folder: &Path, backbone: &Model, head: Option<&MarginHead>) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let header = folder.join(HEADER_FILE);
    if head.is_none() && header.exists() {
        std::fs::remove_file(&header).map_err(Error::io(&header))?;
    }
    save_model(&folder.join(BACKBONE_FILE), backbone, DType::F32)?;
    let Some(head) = head else { return Ok(()) };
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&header, &head.params().state()?, &metadata)
}
