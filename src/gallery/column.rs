//! The embeddings of a gallery in a file of their own, mapped into memory for searches.
//!
//! A header of 4096 bytes; the embeddings, row by row or in the blocks of
//! [`Int8Rows`]; from the next multiple of 64 on, the faces' numbers and the people's, `i64` each; of 8-bit columns, the
//! rows' scales. All numbers are little-endian. The header has checksums of itself and of all that follows.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crc::Digest;
use half::f16;
use memmap2::Mmap;
use tempfile::NamedTempFile;

use super::CHECKSUM;
use crate::error::{Error, Result};
use crate::files::{UNFINISHED, folder_of};
use crate::ops::search::ROWS as ROWS_OF_BLOCK;
use crate::ops::search::{Hit, Int8Rows, Quantised, Rows, block_len, search};

const MAGIC: &[u8; 8] = b"msklcol1";
/// End of the name of a column that is being written.
const WRITING: &str = ".column";
/// Bytes of the header: a page, so that the embeddings are aligned.
const HEADER: usize = 4096;
/// Alignment of what follows the embeddings.
const ALIGNED: usize = 64;
/// Rows that are quantised and written together, a multiple of a block's.
const ROWS_AT_A_TIME: usize = 4096;

/// Bytes of the header that its checksum is of.
const CHECKED: usize = 48;

/// Precision of a column.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ColumnKind {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 8-bit integers with a scale for each embedding: the smallest and fastest. Searches look at more rows than are
    /// asked for and compute their scores again in f32.
    #[default]
    Int8,
}

impl ColumnKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Int8];

    /// Returns the name in files and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8 => "int8",
        }
    }
}

/// What a column was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// The gallery's state, which every change makes another.
    pub state: [u8; 16],
    /// Whether a row is the mean of a person's embeddings instead of one of them.
    pub is_pooled: bool,
}

/// Embeddings mapped into memory.
#[derive(Debug)]
pub(super) struct Column {
    map: Mmap,
    kind: ColumnKind,
    dim: usize,
    num_rows: usize,
    origin: Origin,
    body: u32,
}

/// Where the parts of a column's file begin.
struct Parts {
    ids: usize,
    people: usize,
    scales: usize,
    end: usize,
}

impl Parts {
    /// Returns none for a number of rows that no file has.
    fn of(kind: ColumnKind, dim: usize, num_rows: usize) -> Option<Self> {
        let embeddings = match kind {
            ColumnKind::F32 => num_rows.checked_mul(dim)?.checked_mul(4)?,
            ColumnKind::F16 => num_rows.checked_mul(dim)?.checked_mul(2)?,
            ColumnKind::Int8 => num_rows.div_ceil(ROWS_OF_BLOCK).checked_mul(block_len(dim))?,
        };
        let ids = embeddings.checked_add(HEADER)?.checked_next_multiple_of(ALIGNED)?;
        let people = ids.checked_add(num_rows.checked_mul(8)?)?;
        let scales = people.checked_add(num_rows.checked_mul(8)?)?;
        let of_scales = if kind == ColumnKind::Int8 { num_rows.checked_mul(4)? } else { 0 };
        Some(Self { ids, people, scales, end: scales.checked_add(of_scales)? })
    }
}

impl Column {
    /// Returns the path of a gallery's column.
    pub fn path_beside(gallery: &Path, kind: ColumnKind, is_pooled: bool) -> PathBuf {
        let mut path = gallery.as_os_str().to_owned();
        path.push(if is_pooled { "-mean-" } else { "-" });
        path.push(kind.name());
        path.into()
    }

    /// Returns the paths of all columns that a gallery may have.
    pub fn paths_beside(gallery: &Path) -> impl Iterator<Item = PathBuf> {
        let kinds = ColumnKind::ALL.into_iter().flat_map(|kind| [(kind, false), (kind, true)]);
        kinds.map(move |(kind, is_pooled)| Self::path_beside(gallery, kind, is_pooled))
    }

    /// Maps a column's file.
    ///
    /// # Errors
    /// When it cannot be read, or is none, or is not whole.
    pub fn open(mut file: &File, path: &Path) -> Result<Self> {
        let wrong = |what: &str| Error::Format { path: path.to_owned(), offset: 0, what: what.to_owned() };
        let mut header = [0; HEADER];
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_exact(&mut header)).map_err(Error::io(path))?;
        let Header { kind, dim, num_rows, origin, body } =
            parse(&header).ok_or_else(|| wrong("expected a column of a gallery"))?;
        let parts = Parts::of(kind, dim, num_rows).ok_or_else(|| wrong("the number of rows is too large"))?;
        // SAFETY: the file was made under another name and renamed when it was whole; nobody writes to it afterwards.
        let map = unsafe { Mmap::map(file) }.map_err(Error::io(path))?;
        if map.len() != parts.end {
            return Err(wrong(&format!("expected {} bytes, found {}", parts.end, map.len())));
        }
        Ok(Self { map, kind, dim, num_rows, origin, body })
    }

    /// Checks all bytes.
    ///
    /// # Errors
    /// When they are not as they were written.
    pub fn check(&self, path: &Path) -> Result<()> {
        match CHECKSUM.checksum(&self.map[HEADER..]) == self.body {
            true => Ok(()),
            false => Err(Error::Format {
                path: path.to_owned(),
                offset: HEADER as u64,
                what: "the column is not as it was written".to_owned(),
            }),
        }
    }

    /// Precision, and elements of an embedding.
    pub fn layout(&self) -> (ColumnKind, usize) {
        (self.kind, self.dim)
    }

    /// What it was made of.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    fn parts(&self) -> Parts {
        Parts::of(self.kind, self.dim, self.num_rows).expect("it was checked")
    }

    /// The numbers of a row's face and person; the face's is 0 in a column of means.
    pub fn row(&self, row: usize) -> (i64, i64) {
        let Parts { ids, people, scales, .. } = self.parts();
        let number = |from: usize, to: usize| bytemuck::cast_slice::<u8, i64>(&self.map[from..to])[row].to_le();
        (number(ids, people), number(people, scales))
    }

    /// Returns the rows with the highest dot products with each query.
    ///
    /// # Errors
    /// When the queries have another length.
    pub fn search(&self, queries: &[f32], num: usize) -> Result<Vec<Vec<Hit>>> {
        let Parts { ids, scales, end, .. } = self.parts();
        let values = match self.kind {
            ColumnKind::F32 => &self.map[HEADER..HEADER + 4 * self.num_rows * self.dim],
            ColumnKind::F16 => &self.map[HEADER..HEADER + 2 * self.num_rows * self.dim],
            ColumnKind::Int8 => &self.map[HEADER..ids],
        };
        let rows = match self.kind {
            ColumnKind::F32 => Rows::F32(bytemuck::cast_slice(values)),
            ColumnKind::F16 => Rows::F16(bytemuck::cast_slice(values)),
            ColumnKind::Int8 => Rows::Int8(Int8Rows {
                blocks: bytemuck::cast_slice(values),
                scales: bytemuck::cast_slice(&self.map[scales..end]),
                num_rows: self.num_rows,
            }),
        };
        Ok(search(rows, queries, self.dim, num)?)
    }
}

/// The header's fields.
struct Header {
    kind: ColumnKind,
    dim: usize,
    num_rows: usize,
    origin: Origin,
    /// Checksum of all that follows the header.
    body: u32,
}

/// Reads the header; none if it is none, or not as it was written.
fn parse(header: &[u8; HEADER]) -> Option<Header> {
    let (fields, checksum) = (header.get(..CHECKED)?, header.get(CHECKED..CHECKED + 4)?);
    if !fields.starts_with(MAGIC) || checksum != CHECKSUM.checksum(fields).to_le_bytes() {
        return None;
    }
    let short = |at: usize| u32::from_le_bytes(fields[at..at + 4].try_into().expect("four bytes"));
    let num_rows = u64::from_le_bytes(fields[16..24].try_into().expect("eight bytes"));
    let state = fields[24..40].try_into().expect("16 bytes");
    let header = Header {
        kind: *ColumnKind::ALL.get(short(8) as usize)?,
        dim: short(12) as usize,
        num_rows: usize::try_from(num_rows).ok()?,
        origin: Origin { state, is_pooled: short(40) != 0 },
        body: short(44),
    };
    (header.dim > 0).then_some(header)
}

/// Start of the names of a gallery's columns that are being written.
fn unfinished(gallery: &Path) -> OsString {
    let mut name = OsString::from(UNFINISHED);
    name.push(gallery.file_name().unwrap_or_default());
    name
}

/// Returns a new file for a column of a gallery, which only its owner may read.
///
/// # Errors
/// When the folder cannot be written to.
pub(super) fn temporary(gallery: &Path) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    let file = builder.prefix(&unfinished(gallery)).suffix(WRITING).tempfile_in(folder_of(gallery));
    file.map_err(Error::io(gallery))
}

/// Removes columns of a gallery that were being written when their process ended. One that still is becomes a file
/// without a name.
///
/// # Errors
/// When one cannot be removed.
pub(super) fn remove_unfinished(gallery: &Path) -> Result<()> {
    let start = unfinished(gallery);
    for entry in std::fs::read_dir(folder_of(gallery)).map_err(Error::io(gallery))?.flatten() {
        let name = entry.file_name();
        let bytes = name.as_encoded_bytes();
        if bytes.starts_with(start.as_encoded_bytes()) && bytes.ends_with(WRITING.as_bytes()) {
            crate::files::remove_if_there(&entry.path())?;
        }
    }
    Ok(())
}

/// A column's file while it is written.
pub(super) struct ColumnWriter<'a> {
    file: BufWriter<&'a File>,
    /// Checksum of what follows the header.
    body: Digest<'static, u32>,
    path: &'a Path,
    kind: ColumnKind,
    dim: usize,
    /// Rows that are not written yet.
    waiting: Vec<f32>,
    ids: Vec<i64>,
    people: Vec<i64>,
    scales: Vec<f32>,
}

impl<'a> ColumnWriter<'a> {
    /// Writes to an empty file; `path` is its name in errors.
    ///
    /// # Errors
    /// When it cannot be written to.
    pub fn new(file: &'a File, path: &'a Path, kind: ColumnKind, dim: usize) -> Result<Self> {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEADER]).map_err(Error::io(path))?;
        let (ids, people, scales) = (Vec::new(), Vec::new(), Vec::new());
        let (body, waiting) = (CHECKSUM.digest(), Vec::new());
        Ok(Self { file, body, path, kind, dim, waiting, ids, people, scales })
    }

    /// Adds the embedding of a face.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn push(&mut self, face: i64, person: i64, embedding: &[f32]) -> Result<()> {
        assert_eq!(embedding.len(), self.dim, "elements of an embedding");
        self.ids.push(face);
        self.people.push(person);
        self.waiting.extend(embedding);
        if self.waiting.len() == ROWS_AT_A_TIME * self.dim { self.write_waiting() } else { Ok(()) }
    }

    fn write_waiting(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        match self.kind {
            ColumnKind::F32 => self.write(bytemuck::cast_slice(&waiting)),
            ColumnKind::F16 => {
                let short: Vec<f16> = waiting.iter().map(|value| f16::from_f32(*value)).collect();
                self.write(bytemuck::cast_slice(&short))
            }
            ColumnKind::Int8 => {
                let quantised = Quantised::of_rows(&waiting, self.dim);
                let Int8Rows { blocks, scales, .. } = quantised.rows();
                self.scales.extend(scales);
                self.write(bytemuck::cast_slice(blocks))
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.body.update(bytes);
        self.file.write_all(bytes).map_err(Error::io(self.path))
    }

    /// Writes the rest and the header.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn finish(mut self, origin: Origin) -> Result<()> {
        self.write_waiting()?;
        let at = self.file.stream_position().map_err(Error::io(self.path))? as usize;
        let Parts { ids, .. } = Parts::of(self.kind, self.dim, self.ids.len()).expect("the rows were written");
        self.write(&vec![0; ids - at])?;
        let (ids, people) = (std::mem::take(&mut self.ids), std::mem::take(&mut self.people));
        let scales = std::mem::take(&mut self.scales);
        for part in [bytemuck::cast_slice(&ids), bytemuck::cast_slice(&people), bytemuck::cast_slice(&scales)] {
            self.write(part)?;
        }
        let mut header = MAGIC.to_vec();
        let kind = ColumnKind::ALL.iter().position(|kind| *kind == self.kind).expect("all are listed");
        header.extend((kind as u32).to_le_bytes());
        header.extend((self.dim as u32).to_le_bytes());
        header.extend((ids.len() as u64).to_le_bytes());
        header.extend(origin.state);
        header.extend(u32::from(origin.is_pooled).to_le_bytes());
        header.extend(self.body.clone().finalize().to_le_bytes());
        header.extend(CHECKSUM.checksum(&header).to_le_bytes());
        let mut write = || {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&header)?;
            self.file.flush()
        };
        write().map_err(Error::io(self.path))
    }
}

#[cfg(not(target_endian = "little"))]
compile_error!("columns are mapped as they are written: little-endian");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::normalize::l2_normalize;

    fn embeddings(n: usize, dim: usize) -> Vec<f32> {
        let values: Vec<f32> = (0..n * dim).map(|i| ((i * i) as f32 * 0.37 + i as f32).sin()).collect();
        let values = candle_core::Tensor::from_vec(values, (n, dim), &candle_core::Device::Cpu).unwrap();
        l2_normalize(&values, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_column_has_what_was_written() {
        let origin = Origin { state: *b"0123456789abcdef", is_pooled: false };
        for kind in ColumnKind::ALL {
            for (n, dim) in [(0, 8), (1, 6), (ROWS_AT_A_TIME + 21, 10)] {
                let (file, path) = (tempfile::tempfile().unwrap(), Path::new("column"));
                let values = embeddings(n, dim);
                let mut writer = ColumnWriter::new(&file, path, kind, dim).unwrap();
                for (i, row) in values.chunks_exact(dim).enumerate() {
                    writer.push(100 + i as i64, i as i64 / 3, row).unwrap();
                }
                writer.finish(origin).unwrap();
                let column = Column::open(&file, path).unwrap();
                assert_eq!((column.num_rows(), column.origin(), column.layout()), (n, origin, (kind, dim)));
                column.check(path).unwrap();
                for row in [0, n / 2, n.saturating_sub(1)].into_iter().filter(|_| n > 0) {
                    assert_eq!(column.row(row), (100 + row as i64, row as i64 / 3));
                    let hits = column.search(&values[row * dim..][..dim], 1).unwrap();
                    assert!((hits[0][0].score - 1.0).abs() < 0.02, "{hits:?}");
                }
            }
        }
    }

    #[test]
    fn a_damaged_column_is_refused() {
        let (file, path) = (tempfile::tempfile().unwrap(), Path::new("column"));
        let mut writer = ColumnWriter::new(&file, path, ColumnKind::F32, 4).unwrap();
        writer.push(1, 1, &[0.5; 4]).unwrap();
        writer.finish(Origin { state: [0; 16], is_pooled: false }).unwrap();
        let length = file.metadata().unwrap().len();
        let mut changed = &file;
        changed.seek(SeekFrom::Start(HEADER as u64 + 2)).unwrap();
        changed.write_all(&[0xff]).unwrap();
        let column = Column::open(&file, path).unwrap();
        assert!(column.check(path).unwrap_err().to_string().contains("not as it was written"));
        drop(column);
        file.set_len(length - 1).unwrap();
        assert!(Column::open(&file, path).unwrap_err().to_string().contains("bytes, found"));
        file.set_len(length).unwrap();
        // A number of rows that would be a huge file.
        let mut changed = &file;
        changed.seek(SeekFrom::Start(20)).unwrap();
        changed.write_all(&[0xff; 4]).unwrap();
        assert!(Column::open(&file, path).unwrap_err().to_string().contains("expected a column"));
        file.set_len(10).unwrap();
        assert!(Column::open(&file, path).is_err());
    }
}
