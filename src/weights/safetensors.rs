//! The safetensors format, read whole and written atomically.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;

use crate::error::{Error, Result};

/// The tensors of a file, by name, and its metadata.
#[derive(Clone, Debug)]
pub struct TensorFile {
    /// Tensors in name order.
    pub tensors: BTreeMap<String, Tensor>,
    /// The free strings of the header.
    pub metadata: BTreeMap<String, String>,
}

/// Reads a safetensors file to the CPU.
///
/// # Errors
/// When the file cannot be read, or its header or lengths are not what the format promises. No allocation is made from
/// a length that the file only claims.
pub fn read_safetensors(path: &Path) -> Result<TensorFile> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let wrong = |e: &dyn std::fmt::Display| Error::Format {
        path: path.to_owned(),
        offset: 0,
        what: format!("not a valid safetensors file of {} bytes: {e}", bytes.len()),
    };
    // This also checks that the tensors fill the file exactly.
    let views = SafeTensors::deserialize(&bytes).map_err(|e| wrong(&e))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| wrong(&e))?;
    let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut tensors = BTreeMap::new();
    for (name, view) in views.tensors() {
        use candle_core::safetensors::Load;
        let tensor = view.load(&Device::Cpu).map_err(|e| wrong(&format!("tensor {name}: {e}")))?;
        tensors.insert(name, tensor);
    }
    Ok(TensorFile { tensors, metadata })
}

/// Writes a safetensors file beside `path` and renames it: whoever reads sees the old file or the new one, whole.
///
/// # Errors
/// When the folder cannot be written to or is full; an older file at `path` stays as it was.
pub fn write_safetensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let metadata: HashMap<String, String> = metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let bytes = safetensors::serialize(tensors, Some(metadata))
        .map_err(|e| Error::Checkpoint { path: path.to_owned(), what: format!("cannot be written: {e}") })?;
    write_atomic(path, &bytes)
}

/// Writes `bytes` beside `path`, makes them durable, and renames.
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(path))?;
    file.write_all(bytes).map_err(Error::io(path))?;
    file.as_file().sync_all().map_err(Error::io(path))?;
    let persisted = file.persist(path).map_err(|e| Error::Io { path: path.to_owned(), source: e.error })?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private; a result is as readable as any other file.
        let mode = std::fs::Permissions::from_mode(0o644);
        persisted.set_permissions(mode).map_err(Error::io(path))?;
    }
    drop(persisted);
    Ok(())
}
