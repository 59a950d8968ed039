//! PyTorch checkpoints, read as data: a pickle says which tensors there are and nothing in it is ever called.
//!
//! `container` takes the file apart into the pickle and the storages, `rebuild` makes tensors of views of the storages,
//! `find` chooses which of the tensors are the model's, `walk` goes through pickled modules.

mod container;
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

/// Reads the tensors of a file that `torch.save` wrote, zip (torch 1.6 and later) or legacy, to the CPU.
///
/// The tensors are those of the outermost dict or, when it has none, of the first of these keys that leads to some:
/// `state_dict`, `model_state_dict`, `net_state_dict`, `state_dict_backbone`, `backbone_state_dict`,
/// `student_state_dict`, `model`, `net`, `network`, `backbone`, `student`, `module`, `params`, `weights`. A pickled
/// `nn.Module` gives the parameters and buffers its `state_dict()` would have had. Notes say which key was taken and what
/// beside the tensors was left out. Names are as in the file, a `module.` prefix included.
///
/// Types stay as they are, but for int8, which becomes i16, and bool, which becomes u8. Views are made contiguous; equal
/// views of one storage share memory. Checksums of the archive are not compared, as in PyTorch, which may write none.
///
/// # Errors
/// When the file cannot be read, is none of the two formats (TorchScript and the tar files of torch 0.1 are named), is cut
/// off or inconsistent, was written on a big-endian machine, or has a tensor of a type or kind that is not supported
/// (quantised, sparse, complex). When no tensors are found the error lists the outermost keys. Memory stays within a
/// constant times the size of the file, whatever it claims.
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
