//! The two file formats of `torch.save`: locates the pickle and the bytes of each storage.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use super::rebuild::{Storage, storage_reference};
use crate::error::{Error, Result};
use crate::pickle::{Id, Pickle, Value, shown};

/// `torch.serialization.MAGIC_NUMBER`, 0x1950a86a20f9469cfc6c, little-endian.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const LEGACY_VERSION: i64 = 1001;

/// The locations of a checkpoint's parts.
pub(super) struct Container {
    /// Byte offset of the saved object's pickle.
    pub(super) pickle_start: usize,
    /// Upper bound of the byte offset at which the pickle ends.
    pub(super) pickle_end: usize,
    /// Byte range of each storage in a zip file, by key; `None` for a legacy file, whose storages follow the pickle.
    entries: Option<BTreeMap<String, Range<usize>>>,
}

impl Container {
    pub(super) fn open(path: &Path, bytes: &[u8]) -> Result<Self> {
        if bytes.starts_with(b"PK\x03\x04") { open_zip(path, bytes) } else { open_legacy(path, bytes) }
    }

    /// Returns the storages by key; needs the parsed pickle.
    pub(super) fn storages<'a>(
        self,
        path: &Path,
        bytes: &'a [u8],
        pickle: &Pickle<'_>,
    ) -> Result<BTreeMap<String, Storage<'a>>> {
        match self.entries {
            Some(entries) => Ok(entries.into_iter().map(|(key, at)| (key, Storage::new(&bytes[at]))).collect()),
            None => legacy_storages(path, bytes, self.pickle_start, pickle),
        }
    }
}

fn wrong(path: &Path, offset: usize, what: impl Into<String>) -> Error {
    Error::Format { path: path.to_owned(), offset: offset as u64, what: what.into() }
}

/// Opens a zip file. Compressed entries are refused, so each entry is a range of the file and zip bombs are impossible.
fn open_zip(path: &Path, bytes: &[u8]) -> Result<Container> {
    let zip_wrong = |e: zip::result::ZipError| wrong(path, 0, format!("not a valid zip file: {e}"));
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(zip_wrong)?;
    if archive.has_duplicate_names() {
        return Err(wrong(path, 0, "the zip file has two entries with the same name"));
    }
    let names: Vec<String> = (0..archive.len())
        .map(|i| archive.by_index_data(i).map(|entry| String::from_utf8_lossy(entry.name_raw()).into_owned()))
        .collect::<zip::result::ZipResult<_>>()
        .map_err(zip_wrong)?;
    let folders: Vec<&str> =
        names.iter().filter_map(|n| n.strip_suffix("data.pkl").filter(|f| f.is_empty() || f.ends_with('/'))).collect();
    let &[folder] = &folders[..] else {
        let first: Vec<String> = names.iter().take(5).map(|n| shown(n)).collect();
        let found = format!("found {} among {} entries ({})", folders.len(), names.len(), first.join(", "));
        return Err(wrong(path, 0, format!("not a PyTorch checkpoint: expected one entry data.pkl, {found}")));
    };
    if names.iter().filter_map(|n| n.strip_prefix(folder)).any(|n| n == "constants.pkl" || n.starts_with("code/")) {
        let what = "this is a TorchScript program, not a checkpoint: save its state_dict() in Python \
            (torch.save(torch.jit.load(path).state_dict(), other_path))";
        return Err(Error::Checkpoint { path: path.to_owned(), what: what.to_owned() });
    }
    let mut pickle = 0..0;
    let mut entries = BTreeMap::new();
    for (i, full_name) in names.iter().enumerate() {
        let Some(name) = full_name.strip_prefix(folder) else { continue };
        let key = name.strip_prefix("data/");
        if key.is_none() && !matches!(name, "data.pkl" | "byteorder") {
            continue;
        }
        let entry = archive.by_index_raw(i).map_err(zip_wrong)?;
        let start = entry.header_start() as usize;
        let entry_wrong = |what: &str| wrong(path, start, format!("zip entry {}: {what}", shown(full_name)));
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(entry_wrong("is compressed or encrypted, expected stored bytes as torch.save writes them"));
        }
        let end = |start: u64| start.checked_add(entry.size()).filter(|end| *end <= bytes.len() as u64);
        let at = entry.data_start().and_then(|start| Some(start as usize..end(start)? as usize));
        let at = at.ok_or_else(|| {
            entry_wrong(&format!("claims {} bytes, beyond the end of the file of {}", entry.size(), bytes.len()))
        })?;
        match key {
            Some(key) => drop(entries.insert(key.to_owned(), at)),
            None if name == "data.pkl" => pickle = at,
            None if bytes[at.clone()] != *b"little" => {
                let found = shown(&String::from_utf8_lossy(&bytes[at]));
                let what = format!("expected byte order little, found {found}: save it on a little-endian machine");
                return Err(entry_wrong(&what));
            }
            None => {}
        }
    }
    Ok(Container { pickle_start: pickle.start, pickle_end: pickle.end, entries: Some(entries) })
}

/// Opens a legacy file, in which three small pickles precede that of the object.
fn open_legacy(path: &Path, bytes: &[u8]) -> Result<Container> {
    if bytes.get(257..262) == Some(b"ustar") {
        let what = "this is a tar file written by torch 0.1: load and save it with a newer PyTorch";
        return Err(wrong(path, 257, what));
    }
    let mut at = 0;
    let mut next = || {
        let pickle = Pickle::read(&bytes[at..]).map_err(|e| e.in_file(path, at))?;
        at += pickle.num_bytes();
        Ok::<_, Error>((pickle, at))
    };
    let is_magic = |pickle: &Pickle<'_>| matches!(pickle.get(pickle.root()), Value::Long(m) if *m == LEGACY_MAGIC);
    let version_at = match next() {
        Ok((magic, end)) if is_magic(&magic) => end,
        _ => {
            let expected = "expected a zip file or the magic number of a legacy file";
            return Err(wrong(path, 0, format!("not a file written by torch.save: {expected}")));
        }
    };
    let (version, info_at) = next()?;
    if version.int(version.root()) != Some(LEGACY_VERSION) {
        let found = version.int(version.root()).map_or_else(|| version.kind(version.root()), |v| v.to_string());
        return Err(wrong(path, version_at, format!("protocol version {found}, expected {LEGACY_VERSION}")));
    }
    let (info, pickle_start) = next()?;
    let Value::Dict(items) = info.get(info.root()) else {
        return Err(wrong(path, info_at, format!("expected a dict of sizes, found {}", info.kind(info.root()))));
    };
    let order = items.iter().find(|(key, _)| info.text(*key) == Some("little_endian"));
    if order.is_some_and(|(_, value)| matches!(info.get(*value), Value::Bool(false))) {
        return Err(wrong(path, info_at, "written on a big-endian machine: save it on a little-endian one"));
    }
    Ok(Container { pickle_start, pickle_end: bytes.len(), entries: None })
}

/// Reads the storages of a legacy file. The list of storage keys follows the object, then each storage: the number of
/// its elements and their bytes.
fn legacy_storages<'a>(
    path: &Path,
    bytes: &'a [u8],
    pickle_start: usize,
    pickle: &Pickle<'_>,
) -> Result<BTreeMap<String, Storage<'a>>> {
    let keys_at = pickle_start + pickle.num_bytes();
    let keys = Pickle::read(&bytes[keys_at..]).map_err(|e| e.in_file(path, keys_at))?;
    let Value::List(key_ids) = keys.get(keys.root()) else {
        let found = keys.kind(keys.root());
        return Err(wrong(path, keys_at, format!("expected a list of storage keys, found {found}")));
    };
    let mut sizes = BTreeMap::new();
    for value in pickle.values() {
        if let Value::PersistentId(id) = value
            && let Some((key, element)) = legacy_element(pickle, *id)
        {
            // As in PyTorch, the first reference decides.
            sizes.entry(key).or_insert(element);
        }
    }
    let mut storages = BTreeMap::new();
    let mut at = keys_at + keys.num_bytes();
    for id in key_ids {
        let text = keys.text(*id);
        let key = text.ok_or_else(|| wrong(path, keys_at, format!("expected a key, found {}", keys.kind(*id))))?;
        let storage_wrong = |what: String| wrong(path, at, format!("storage {}: {what}", shown(key)));
        let size = match sizes.get(key) {
            Some(Ok(size)) => *size,
            Some(Err(e)) => return Err(storage_wrong(e.clone())),
            None => return Err(storage_wrong("no tensor refers to it, so its element type is unknown".to_owned())),
        };
        let (count, rest) = bytes[at..]
            .split_first_chunk()
            .ok_or_else(|| storage_wrong("expected 8 bytes with its length, found the end of the file".to_owned()))?;
        let count = i64::from_le_bytes(*count);
        let num_bytes = usize::try_from(count).ok().and_then(|n| n.checked_mul(size));
        let taken = num_bytes.and_then(|n| rest.get(..n)).ok_or_else(|| {
            storage_wrong(format!("claims {count} elements of {size} bytes, the file has {} bytes left", rest.len()))
        })?;
        if storages.insert(key.to_owned(), Storage::new(taken)).is_some() {
            return Err(storage_wrong("occurs twice".to_owned()));
        }
        at += 8 + taken.len();
    }
    if at != bytes.len() {
        let what = format!("{} bytes follow the last storage, expected none", bytes.len() - at);
        return Err(wrong(path, at, what));
    }
    Ok(storages)
}

/// Returns the key of the storage that a persistent id refers to and the size of one element in bytes; `None` for other
/// references.
fn legacy_element<'p>(pickle: &'p Pickle<'_>, id: Id) -> Option<(&'p str, Result<usize, String>)> {
    let reference = storage_reference(pickle, id)?;
    Some((reference.key, reference.element.map(|element| element.size())))
}
