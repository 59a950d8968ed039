//! Reader of MXNet's `.params` files: a list of arrays and a list of their names.
//!
//! The layout is `NDArray::Save` of Apache MXNet (src/ndarray/ndarray.cc), little-endian: a magic number and a reserved
//! word, the count of arrays, the arrays, the count of names, each name with its length. An array starts with the magic
//! number of its version; the oldest files have the number of dimensions in its place.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

use super::TensorFile;
use super::elements::{ElementType, num_elements, tensor};
use crate::error::{Error, Result};
use crate::pickle::shown;

const LIST_MAGIC: u64 = 0x112;
const V1_MAGIC: u32 = 0xf993_fac8;
const V2_MAGIC: u32 = 0xf993_fac9;
const V3_MAGIC: u32 = 0xf993_faca;
/// Maximum number of dimensions, as in MXNet; without it, a forged file could claim four billion.
const MAX_DIMS: u32 = 32;

/// Reads an MXNet parameter file to the CPU: dense arrays of f32, f64, f16, u8, i32 and i64, and of i8 and bool, which
/// become i16 and u8.
///
/// The prefixes `arg:` and `aux:` are removed from names, unless two names would become equal. A note names each array
/// without data, which is left out.
///
/// # Errors
/// When the file cannot be read, is truncated or has trailing bytes, an array is sparse or of an unsupported type, or
/// the names do not match the arrays. Nothing is allocated from an unchecked length.
pub fn read_mxnet_params(path: &Path) -> Result<TensorFile> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let mut reader = Reader { bytes: &bytes, at: 0 };
    read_list(&mut reader).map_err(|what| Error::Format {
        path: path.to_owned(),
        offset: reader.at as u64,
        what: format!("MXNet parameters: {what}"),
    })
}

fn read_list(reader: &mut Reader<'_>) -> Result<TensorFile, String> {
    let magic = reader.u64("the magic number")?;
    if magic != LIST_MAGIC {
        reader.at = 0;
        return Err(format!("magic number 0x{magic:x}, expected 0x{LIST_MAGIC:x}"));
    }
    reader.u64("a reserved word")?;
    let num_arrays = reader.u64("the number of arrays")?;
    let mut arrays = Vec::new();
    for i in 0..num_arrays {
        arrays.push(read_array(reader).map_err(|e| format!("array {i} of {num_arrays}: {e}"))?);
    }
    let num_names = reader.u64("the number of names")?;
    if num_names != num_arrays {
        return Err(format!("expected {num_arrays} names, one per array, found {num_names}"));
    }
    let mut named = BTreeMap::new();
    let mut notes = Vec::new();
    for (i, array) in arrays.into_iter().enumerate() {
        let length = reader.u64("the length of a name")?;
        let name = std::str::from_utf8(reader.take(length, "a name")?).map_err(|e| format!("name {i}: {e}"))?;
        match array {
            Some(_) if named.contains_key(name) => return Err(format!("two arrays are named {}", shown(name))),
            Some(array) => drop(named.insert(name, array)),
            None => notes.push(format!("array {} has no data and is left out", shown(name))),
        }
    }
    if reader.at != reader.bytes.len() {
        return Err(format!("{} bytes follow the last name, expected none", reader.bytes.len() - reader.at));
    }
    let mut uses = BTreeMap::new();
    for name in named.keys() {
        *uses.entry(bare(name)).or_insert(0) += 1;
    }
    let chosen = |name: &str| if uses[bare(name)] > 1 { name.to_owned() } else { bare(name).to_owned() };
    let tensors = named.into_iter().map(|(name, tensor)| (chosen(name), tensor)).collect();
    Ok(TensorFile { tensors, metadata: BTreeMap::new(), notes })
}

/// Returns a name without the prefix that tells parameters from statistics.
fn bare(name: &str) -> &str {
    name.strip_prefix("arg:").or_else(|| name.strip_prefix("aux:")).unwrap_or(name)
}

/// Reads one array; `None` if it was saved without data.
fn read_array(reader: &mut Reader<'_>) -> Result<Option<Tensor>, String> {
    let magic = reader.u32("the version")?;
    if matches!(magic, V2_MAGIC | V3_MAGIC) {
        let storage = reader.u32("the storage type")?;
        if storage != 0 {
            return Err(format!("storage type {storage} is sparse or unknown, expected 0 (dense)"));
        }
    }
    let is_versioned = matches!(magic, V1_MAGIC..=V3_MAGIC);
    let num_dims = if is_versioned { reader.u32("the number of dimensions")? } else { magic };
    // Before version 3, zero dimensions mean no data; version 3 uses -1, because there zero dimensions are a scalar.
    if (num_dims == 0 && magic != V3_MAGIC) || (num_dims == u32::MAX && magic == V3_MAGIC) {
        return Ok(None);
    }
    if num_dims > MAX_DIMS {
        return Err(format!("expected at most {MAX_DIMS} dimensions or a version, found {num_dims}"));
    }
    let mut dims = Vec::new();
    for _ in 0..num_dims {
        let dim = if is_versioned { reader.u64("a size")? } else { u64::from(reader.u32("a size")?) };
        dims.push(usize::try_from(dim).map_err(|e| format!("size {dim}: {e}"))?);
    }
    // The device on which the array was allocated. It is irrelevant: elements are stored in the same way for all.
    reader.u64("the device")?;
    let element = match reader.u32("the element type")? {
        0 => ElementType::F32,
        1 => ElementType::F64,
        2 => ElementType::F16,
        3 => ElementType::U8,
        4 => ElementType::I32,
        5 => ElementType::I8,
        6 => ElementType::I64,
        7 => ElementType::Bool,
        other => return Err(format!("element type {other} is not supported, expected 0 to 7")),
    };
    let num_bytes = num_elements(&dims).and_then(|n| n.checked_mul(element.size()));
    let num_bytes = num_bytes.ok_or_else(|| format!("shape {dims:?} exceeds the address space"))?;
    let bytes = reader.take(num_bytes as u64, "the elements")?;
    tensor(element, bytes, &dims).map(Some).map_err(|e| e.to_string())
}

/// Reader of the file's bytes; after an error, `at` is the start of the missing item.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: u64, what: &str) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(length).ok().and_then(|n| rest.get(..n));
        let taken = taken.ok_or_else(|| format!("expected {length} bytes of {what}, found {}", rest.len()))?;
        self.at += taken.len();
        Ok(taken)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.take(4, what).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes were taken")))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.take(8, what).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes were taken")))
    }
}
