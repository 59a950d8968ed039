//! Model weights that a training saves: a backbone and its head, each a safetensors file with PyTorch's names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::models::{BACKBONE_FILE, Loaded, Model, load_model, save_model};
use crate::weights::{TensorFile, read_pytorch, read_safetensors, write_safetensors};

/// File name of the head beside the backbone; the published code calls it header.
const HEADER_FILE: &str = "header.safetensors";
/// Key of the names of the identities in the metadata of the head's file: a JSON list, by class.
const IDENTITIES: &str = "identities";
/// Name of the class centres among the head's parameters.
pub(super) const KERNEL: &str = "kernel";

/// A trained backbone, frozen, and the class centres of its head.
///
/// ```no_run
/// use std::path::Path;
///
/// use maskinv::models::load_model;
/// use maskinv::train::{Checkpoint, Experiment, preset};
///
/// # fn main() -> maskinv::Result<()> {
/// let teacher = Checkpoint::of(load_model(Path::new("295672backbone.pth"), None)?)?;
/// let experiment = Experiment::new(preset("procedural")?)?.with_teacher(teacher);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    /// The name for messages: the file that it was loaded from, or the arm.
    pub name: String,
    /// The backbone.
    pub backbone: Model,
    /// The head, if there was a file with it.
    pub header: Option<Header>,
}

/// The parameters of a head, and whose class centres they are.
#[derive(Clone, Debug)]
pub struct Header {
    /// The parameters by name; the class centres are `kernel (d, K)`.
    pub tensors: BTreeMap<String, Tensor>,
    /// Names of the identities, by class; none in files of other programs.
    pub identities: Option<Vec<String>>,
}

impl Header {
    fn of(file: TensorFile, path: &Path) -> Result<Self> {
        let wrong = |e| {
            let what = format!("metadata {IDENTITIES}: expected a list of names: {e}");
            Error::Format { path: path.to_owned(), offset: 0, what }
        };
        let names = file.metadata.get(IDENTITIES).map(|json| serde_json::from_str(json).map_err(wrong));
        Ok(Self { tensors: file.tensors, identities: names.transpose()? })
    }

    /// Returns the parameters with the class centres in the order of `names`, the identities of a data set.
    ///
    /// # Errors
    /// Names the first identity that is not the data set's; whose centres these are is known for files of this crate.
    pub(super) fn arranged(&self, names: &[String]) -> std::result::Result<BTreeMap<String, Tensor>, String> {
        let Some(identities) = self.identities.as_ref().filter(|identities| identities[..] != *names) else {
            return Ok(self.tensors.clone());
        };
        let class_of: BTreeMap<&String, u32> = identities.iter().zip(0..).collect();
        let order: Option<Vec<u32>> = names.iter().map(|name| class_of.get(name).copied()).collect();
        match order.filter(|_| class_of.len() == names.len() && identities.len() == names.len()) {
            Some(order) => {
                let order = Tensor::new(order, &Device::Cpu).map_err(|e| e.to_string())?;
                let arranged = |(name, tensor): (&String, &Tensor)| match name == KERNEL {
                    true => tensor.index_select(&order, 1).map(|tensor| (name.clone(), tensor)),
                    false => Ok((name.clone(), tensor.clone())),
                };
                self.tensors.iter().map(arranged).collect::<candle_core::Result<_>>().map_err(|e| e.to_string())
            }
            None => {
                let mut both = identities.iter().zip(names).enumerate();
                Err(match both.find(|(_, (theirs, ours))| theirs != ours) {
                    Some((class, (theirs, ours))) => {
                        format!("class {class} is {theirs} in the file and {ours} in the data")
                    }
                    None => format!("{} identities in the file, {} in the data", identities.len(), names.len()),
                })
            }
        }
    }
}

impl Checkpoint {
    /// Loads weights that an experiment saved, to run on `machine`.
    pub(super) fn saved(folder: &Path, machine: &Machine) -> Result<Self> {
        Ok(Self::of(load_model(folder, None)?)?.on(machine))
    }

    /// Returns the weights, to run on `machine`.
    pub(super) fn on(self, machine: &Machine) -> Self {
        Self { backbone: self.backbone.on(machine), ..self }
    }

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
        let header = header.map(|file| Header::of(file, path)).transpose()?;
        Ok(Self { name: loaded.file.to_string(), backbone: loaded.model, header })
    }
}

/// Writes `backbone.safetensors` to `folder`, which is created if necessary, and `header.safetensors` if class centres
/// were trained, with the names of their identities. Without them, an old `header.safetensors` is removed, since it
/// belongs to a different backbone.
///
/// # Errors
/// When the folder cannot be created or written to; older files stay intact.
pub fn save_checkpoint(folder: &Path, backbone: &Model, header: Option<&Header>) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join(HEADER_FILE);
    if header.is_none() && path.exists() {
        std::fs::remove_file(&path).map_err(Error::io(&path))?;
    }
    save_model(&folder.join(BACKBONE_FILE), backbone, DType::F32)?;
    let Some(Header { tensors, identities }) = header else { return Ok(()) };
    let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    if let Some(identities) = identities {
        let names = serde_json::to_string(identities).map_err(|e| Error::Config(e.to_string()))?;
        metadata.insert(IDENTITIES.to_owned(), names);
    }
    write_safetensors(&path, tensors, &metadata)
}
