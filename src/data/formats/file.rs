//! A file with random access.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A file that several threads read at any offset.
///
/// The file is not memory-mapped. With a mapping, its pages would count as this process's memory, and a file truncated
/// while in use would end the process; here it causes an error.
pub(super) struct RandomFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl RandomFile {
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let data = file.metadata().map_err(Error::io(path))?;
        if data.is_dir() {
            return Err(Error::Data { path: path.to_owned(), what: "expected a file, found a folder".to_owned() });
        }
        Ok(Self { path: path.to_owned(), file, len: data.len() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file when it was opened, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn error(&self, offset: u64, what: impl Into<String>) -> Error {
        Error::Format { path: self.path.clone(), offset, what: what.into() }
    }

    /// Returns `len` bytes from `offset`. A range beyond the end of the file is an error, and nothing is allocated for
    /// it.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            let what = format!("expected {len} bytes, found the end of the file at {}", self.len);
            return Err(self.error(offset, what));
        }
        let mut bytes = vec![0; len];
        self.fill(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Returns up to `len` bytes from `offset`: fewer at the end of the file, none beyond it.
    pub fn read_up_to(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let rest = self.len.saturating_sub(offset);
        self.read(offset.min(self.len), usize::try_from(rest).map_or(len, |rest| rest.min(len)))
    }

    #[cfg(unix)]
    fn fill(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, offset).map_err(Error::io(&self.path))
    }

    #[cfg(windows)]
    fn fill(&self, mut offset: u64, mut bytes: &mut [u8]) -> Result<()> {
        while !bytes.is_empty() {
            let num =
                std::os::windows::fs::FileExt::seek_read(&self.file, bytes, offset).map_err(Error::io(&self.path))?;
            if num == 0 {
                return Err(self.error(offset, "expected more bytes, found the end of the file"));
            }
            offset += num as u64;
            bytes = &mut bytes[num..];
        }
        Ok(())
    }
}
