//! The safetensors format: files are read completely and written atomically.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};

use super::elements::{self, ElementType};
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::parallel;

/// A checkpoint file's tensors, metadata and notes.
#[derive(Clone, Debug)]
pub struct TensorFile {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// Metadata strings of the file's header.
    pub metadata: BTreeMap<String, String>,
    /// Remarks made while reading, one sentence each, to show to the user.
    pub notes: Vec<String>,
}

/// Reads a safetensors file to the CPU. 8-bit signed integers, which candle lacks, become those of 16 bits.
///
/// # Errors
/// When the file cannot be read, or its header or lengths violate the format. Nothing is allocated from an unchecked
/// length.
pub fn read_safetensors(path: &Path) -> Result<TensorFile> {
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is only read, and dropped before this function returns. If another program changes the file
    // meanwhile, numbers are wrong or a bus error follows, as with every safetensors reader that maps files.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
    parse_safetensors(&bytes, path)
}

/// Parses the bytes of a safetensors file and copies its tensors to the CPU; errors name the file `path`.
///
/// # Errors
/// When the header or lengths violate the format. Nothing is allocated from an unchecked length.
pub fn parse_safetensors(bytes: &[u8], path: &Path) -> Result<TensorFile> {
    let wrong = |e: &(dyn std::fmt::Display + Sync)| Error::Format {
        path: path.to_owned(),
        offset: 0,
        what: format!("not a valid safetensors file of {} bytes: {e}", bytes.len()),
    };
    // This also checks that the tensors fill the file exactly.
    let views = SafeTensors::deserialize(bytes).map_err(|e| wrong(&e))?;
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| wrong(&e))?;
    let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    let views = views.tensors();
    let load = |i: usize| {
        let (name, view) = &views[i];
        if view.dtype() == Dtype::I8 {
            let found = elements::tensor(ElementType::I8, view.data(), view.shape());
            return found.map_err(|e| wrong(&format!("tensor {name}: {e}")));
        }
        view.load(&Device::Cpu).map_err(|e| wrong(&format!("tensor {name}: {e}")))
    };
    // Loading is bound by page faults, so it is spread over the cores.
    let tensors = parallel::try_map(views.len(), load)?;
    let tensors = views.iter().map(|(name, _)| name.clone()).zip(tensors).collect();
    Ok(TensorFile { tensors, metadata, notes: Vec::new() })
}

/// Writes a safetensors file atomically: a reader sees the complete old file or the complete new one. Integers of 16
/// bits are written as those of 8 bits, from which they were read.
///
/// # Errors
/// When an integer of 16 bits does not fit 8, the folder cannot be written to or the disk is full; an older file at
/// `path` is then unchanged.
pub fn write_safetensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let wrong = |e: &dyn std::fmt::Display| Error::Checkpoint {
        path: path.to_owned(),
        what: format!("cannot be written: {e}"),
    };
    let views = tensors.iter().map(|(name, tensor)| Ok((name, Stored::of(tensor).map_err(|e| wrong(&e))?)));
    let bytes = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None).map_err(|e| wrong(&e))?;
    let bytes = with_metadata(&bytes, metadata).map_err(|e| wrong(&e))?;
    write_atomic(path, &bytes)
}

/// A tensor in the form in which it is stored.
enum Stored<'a> {
    Same(&'a Tensor),
    Int8(Vec<u8>, &'a [usize]),
}

impl<'a> Stored<'a> {
    fn of(tensor: &'a Tensor) -> candle_core::Result<Self> {
        if tensor.dtype() != DType::I16 {
            return Ok(Self::Same(tensor));
        }
        Ok(Self::Int8(elements::bytes_of_int8(tensor)?, tensor.dims()))
    }
}

impl safetensors::View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Same(tensor) => tensor.dtype(),
            Self::Int8(..) => Dtype::I8,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Same(tensor) => tensor.shape(),
            Self::Int8(_, shape) => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Same(tensor) => tensor.data(),
            Self::Int8(bytes, _) => Cow::Borrowed(bytes),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Same(tensor) => tensor.data_len(),
            Self::Int8(bytes, _) => bytes.len(),
        }
    }
}

/// Returns the file with `metadata` added to its header. The `safetensors` crate would write it in the random order of
/// a hash map, and the same weights should give the same bytes.
fn with_metadata(file: &[u8], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, serde_json::Error> {
    let (length, rest) = file.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes")) as usize;
    let (header, data) = rest.split_at(length);
    let mut header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header)?;
    header.insert("__metadata__".to_owned(), serde_json::to_value(metadata)?);
    let mut header = serde_json::to_vec(&header)?;
    // As in the crate's output, the data starts at a multiple of eight bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header, data].concat())
}
