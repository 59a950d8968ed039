//! An ONNX model as it is in its files, for a runtime that reads them itself.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::external::External;
use super::read::{not_onnx, parse};
use crate::error::{Error, Result};
use crate::files::{folder_of, hex, write_atomic};
use crate::protobuf::{Reader, Value, Writer};

/// Field of a ModelProto with the graph.
const GRAPH: u32 = 7;
/// Field of a ModelProto with a key and a value of the metadata.
const METADATA: u32 = 14;

/// The bytes of an ONNX model and of the files of weights beside it.
pub(crate) struct OnnxFiles {
    path: PathBuf,
    pub bytes: Vec<u8>,
    /// Files of weights, by the name that the model has for them.
    pub external: BTreeMap<String, Vec<u8>>,
    /// Operators of the graph.
    pub operators: BTreeSet<String>,
}

impl std::fmt::Debug for OnnxFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OnnxFiles({})", self.path.display())
    }
}

impl OnnxFiles {
    /// Reads a model's files.
    ///
    /// # Errors
    /// As [`read_onnx`](super::read_onnx).
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let mut external = External::beside(path);
        let model = parse(&bytes, &mut external).map_err(not_onnx(path))?;
        let operators = model.nodes.into_iter().map(|node| node.op_type).collect();
        Ok(Self { path: path.to_owned(), external: external.contents(), bytes, operators })
    }

    /// Returns the SHA-256 of the graph and its weights, without the metadata: 64 hexadecimal digits.
    pub fn digest(&self) -> String {
        let mut hasher = Sha256::new();
        for (number, bytes) in self.messages().filter(|(number, _)| *number == GRAPH) {
            hasher.update(number.to_le_bytes());
            hasher.update(bytes);
        }
        for (name, bytes) in &self.external {
            hasher.update(name.as_bytes());
            hasher.update(bytes);
        }
        hex(&hasher.finalize())
    }

    /// Writes a copy with `metadata` in place of what it has under the same keys.
    ///
    /// # Errors
    /// When the weights are in files of their own and the copy is for another folder, where they are not; when the copy
    /// cannot be written.
    pub fn write_copy(&self, path: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        let folders = [folder_of(path), folder_of(&self.path)].map(Path::canonicalize);
        if let Some(name) = self.external.keys().next()
            && !matches!(&folders, [Ok(a), Ok(b)] if a == b)
        {
            let what = format!(
                "the weights are in {name}, beside {}: expected a copy in the same folder",
                self.path.display()
            );
            return Err(Error::Checkpoint { path: path.to_owned(), what });
        }
        let replaced = |bytes: &[u8]| {
            let mut reader = Reader::new(bytes, 0);
            let key = std::iter::from_fn(|| reader.next().ok().flatten()).find(|field| field.number == 1);
            matches!(key.map(|field| field.value), Some(Value::Bytes { bytes, .. })
                if std::str::from_utf8(bytes).is_ok_and(|key| metadata.contains_key(key)))
        };
        // Entries of the same keys are left out here and written anew; all else is copied field by field.
        let mut copy = Vec::with_capacity(self.bytes.len());
        let mut reader = Reader::new(&self.bytes, 0);
        let mut start = 0;
        while let Some(field) = reader.next().map_err(not_onnx(&self.path))? {
            let end = reader.offset();
            let is_replaced = matches!(field.value, Value::Bytes { bytes, .. } if replaced(bytes));
            if field.number != METADATA || !is_replaced {
                copy.extend_from_slice(&self.bytes[start..end]);
            }
            start = end;
        }
        for (key, value) in metadata {
            let entry = Writer::default().bytes(1, key.as_bytes()).bytes(2, value.as_bytes());
            copy.extend(Writer::default().message(METADATA, entry).finish());
        }
        write_atomic(path, &copy)
    }

    /// The messages and texts of the file, by their fields' numbers.
    fn messages(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let mut reader = Reader::new(&self.bytes, 0);
        // The file was read once without an error.
        std::iter::from_fn(move || reader.next().ok().flatten()).filter_map(|field| match field.value {
            Value::Bytes { bytes, .. } => Some((field.number, bytes)),
            _ => None,
        })
    }
}
