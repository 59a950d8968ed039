//! Model weights that a training saves: a backbone and its head, each a safetensors file with PyTorch's names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::losses::MarginHead;
use crate::models::{BACKBONE_FILE, Loaded, Model, save_model};
use crate::weights::{read_pytorch, read_safetensors, write_safetensors};

/// File name of the head beside the backbone; the published code calls it header.
pub(super) const HEADER_FILE: &str = "header.safetensors";

/// A trained backbone, frozen, and the class centres of its head.
#[derive(Debug)]
pub struct Checkpoint {
    /// The name for messages: the file that it was loaded from, or the arm.
    pub name: String,
    /// The backbone.
    pub backbone: Model,
    /// The head's parameters, if there was a file with them.
    pub header: Option<BTreeMap<String, Tensor>>,
}

impl Checkpoint {
    /// Returns a loaded backbone with its head, if this crate or the published code saved one in the same folder.
    ///
    /// # Errors
    /// When the head's file is corrupt.
    pub fn of(loaded: Loaded) -> Result<Self> {
        let path = loaded.file.path().map_or(Path::new(""), PathBuf::as_path);
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let beside = |name: &str| Some(path.with_file_name(name)).filter(|path| path.exists());
        let header = if name == BACKBONE_FILE {
            beside(HEADER_FILE).map(|path| read_safetensors(&path)).transpose()?
        } else {
            // The published code saves pairs such as `295672backbone.pth` and `295672header.pth`.
            let step = name.strip_suffix("backbone.pth");
            step.and_then(|step| beside(&format!("{step}header.pth"))).map(|path| read_pytorch(&path)).transpose()?
        };
        let header = header.map(|file| file.tensors);
        Ok(Self { name: loaded.file.to_string(), backbone: loaded.model, header })
    }
}

/// Writes `backbone.safetensors` to `folder`, which is created if necessary, and `header.safetensors` if class centres
/// were trained. Without them, an old `header.safetensors` is removed, since it belongs to a different backbone.
///
/// # Errors
/// When the folder cannot be created or written to; older files stay intact.
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
