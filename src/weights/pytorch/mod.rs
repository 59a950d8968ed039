//! Reader of PyTorch checkpoints as data: the pickle describes the tensors, and nothing in it is ever called.
//!
//! `container` splits the file into pickle and storages, `rebuild` makes tensors from views of the storages, `find`
//! selects the tensors of the model, and `walk` traverses pickled modules.

mod container;
mod dict;
mod find;
mod rebuild;
mod walk;

use std::collections::BTreeMap;
use std::path::Path;

use self::container::Container;
use self::rebuild::Rebuilder;
use super::TensorFile;
use crate::error::{Error, Result};
use crate::pickle::Pickle;

/// Reads the tensors of a file written by `torch.save`, zip (torch 1.6 and later) or legacy, to the CPU.
///
/// The tensors are those of the outermost dict or, if it has none, of the first of these keys that leads to tensors:
/// `state_dict`, `model_state_dict`, `net_state_dict`, `state_dict_backbone`, `backbone_state_dict`,
/// `student_state_dict`, `model`, `net`, `network`, `backbone`, `student`, `module`, `params`, `weights`. A pickled
/// `nn.Module` yields the parameters and buffers that its `state_dict()` would contain. Notes say which key was used
/// and which other values were left out. Names are as in the file, including a `module.` prefix.
///
/// Types are kept, except for int8, which becomes i16, and bool, which becomes u8. Views are made contiguous; equal
/// views of one storage share memory. As in PyTorch, which may not write them, checksums of the archive are not
/// verified.
///
/// # Errors
/// When the file cannot be read, has neither format (the message identifies TorchScript and the tar files of torch
/// 0.1), is truncated or inconsistent, was written on a big-endian machine, or has a tensor of an unsupported type
/// (complex) or kind (quantised, sparse). If no tensors are found, the message lists the outermost keys. Memory stays
/// within a constant times the file size, whatever the file claims.
pub fn read_pytorch(path: &Path) -> Result<TensorFile> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let container = Container::open(path, &bytes)?;
    let pickle = Pickle::read(&bytes[container.pickle_start..container.pickle_end])
        .map_err(|e| e.in_file(path, container.pickle_start))?;
    let storages = container.storages(path, &bytes, &pickle)?;
    let mut rebuilder = Rebuilder::new(&pickle, storages, bytes.len());
    let wrong = |what| Error::Checkpoint { path: path.to_owned(), what };
    let found = find::find(&pickle, &mut rebuilder).map_err(wrong)?;
    Ok(TensorFile { tensors: found.tensors, metadata: BTreeMap::new(), notes: found.notes })
}
