//! Offsets of a file's records, from its `.idx` or from scanning the file.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use super::record::{read_header, skip_record};
use crate::data::formats::file::RandomFile;
use crate::error::{Error, Result};

/// Keys and offsets of records, in the index's order.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub keys: Vec<u64>,
    pub offsets: Vec<u64>,
}

impl Index {
    /// Reads an index file of lines `key<TAB>offset`.
    pub fn read(path: &Path, file: &RandomFile) -> Result<Self> {
        let mut lines = BufReader::new(std::fs::File::open(path).map_err(Error::io(path))?);
        let (mut index, mut line, mut number) = (Self::default(), Vec::new(), 0);
        loop {
            line.clear();
            number += 1;
            // A line of two numbers is short; the rest of a longer line fails to parse.
            let read = std::io::Read::take(&mut lines, 64).read_until(b'\n', &mut line).map_err(Error::io(path))?;
            if read == 0 {
                return Ok(index);
            }
            let text = str::from_utf8(&line).unwrap_or_default();
            let mut fields = text.split_whitespace();
            let error = |what: String| Error::Line { path: path.to_owned(), line: number, what };
            let (key, offset) = match (fields.next(), fields.next(), fields.next()) {
                (None, ..) if text.ends_with('\n') => continue,
                (Some(key), Some(offset), None) => (key.parse::<u64>().ok(), offset.parse::<u64>().ok()),
                _ => (None, None),
            };
            let (Some(key), Some(offset)) = (key, offset) else {
                return Err(error(format!(
                    "expected a key and an offset, found {:?}",
                    String::from_utf8_lossy(&line).trim_end()
                )));
            };
            if offset >= file.len() {
                let rec = file.path().display();
                return Err(error(format!(
                    "expected an offset in {rec}, which ends at byte {}, found {offset}: the file is \
                     truncated, or the index is another file's",
                    file.len()
                )));
            }
            index.keys.push(key);
            index.offsets.push(offset);
        }
    }

    /// Scans the file. Keys are the records' ids, or counted from 0 if ids repeat.
    pub fn scan(file: &RandomFile) -> Result<Self> {
        let (mut index, mut at) = (Self::default(), 0);
        while at < file.len() {
            index.keys.push(read_header(file, at)?.0.id);
            index.offsets.push(at);
            at = skip_record(file, at)?;
        }
        if index.keys.iter().collect::<std::collections::HashSet<_>>().len() < index.keys.len() {
            index.keys = (0..index.keys.len() as u64).collect();
        }
        Ok(index)
    }

    /// Sorts the records by key.
    pub fn sort(&mut self) {
        if self.keys.is_sorted() {
            return;
        }
        let mut pairs: Vec<(u64, u64)> = self.keys.iter().copied().zip(self.offsets.iter().copied()).collect();
        pairs.sort_by_key(|pair| pair.0);
        (self.keys, self.offsets) = pairs.into_iter().unzip();
    }
}

/// Rebuilds the index of a `.rec` file, `NAME.idx` beside `NAME.rec`. Returns its path and the number of records.
///
/// # Errors
/// When the file is not RecordIO or is truncated, or the index cannot be written.
pub fn write_index(rec: &Path) -> Result<(PathBuf, usize)> {
    let file = RandomFile::open(rec)?;
    let index = Index::scan(&file)?;
    if index.keys.is_empty() {
        return Err(file.error(0, "expected records, found an empty file"));
    }
    let path = rec.with_extension("idx");
    let temporary = crate::files::temporary(&path)?;
    let mut out = std::io::BufWriter::new(&temporary);
    for (key, offset) in index.keys.iter().zip(&index.offsets) {
        writeln!(out, "{key}\t{offset}").map_err(Error::io(&path))?;
    }
    out.flush().map_err(Error::io(&path))?;
    drop(out);
    crate::files::persist(temporary, &path)?;
    Ok((path, index.keys.len()))
}
