//! Locks on files, which the kernel releases when a process ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::remove_if_there;
use crate::error::{Error, Result};

/// Linux's error of a network file system whose server has no lock service.
const ENOLCK: i32 = 37;

/// A lock on a file, which other processes respect that ask for it. Dropping it removes the file.
#[derive(Debug)]
pub struct FileLock {
    path: PathBuf,
    /// None on file systems that cannot lock files.
    file: Option<File>,
}

/// What asking for a lock gave.
#[derive(Debug)]
pub enum Locked {
    /// This process has it.
    Ours(FileLock),
    /// A description of the process that has it.
    Theirs(String),
}

impl FileLock {
    /// Makes the file at `path`, if there is none, and locks it. Does not wait.
    ///
    /// # Errors
    /// When the file cannot be made or written to.
    pub fn try_new(path: &Path) -> Result<Locked> {
        loop {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false);
            let mut file = options.open(path).map_err(Error::io(path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(Locked::Theirs(holder(&mut file))),
                Err(TryLockError::Error(e)) => {
                    remove_if_there(path)?;
                    return match is_impossible(&e) {
                        true => Ok(Locked::Ours(Self { path: path.to_owned(), file: None })),
                        false => Err(Error::io(path)(e)),
                    };
                }
            }
            // The holder before may have removed the file between our opening and our locking it.
            if !is_same_file(&file, path) {
                continue;
            }
            let text = format!("process {}", std::process::id());
            let written = file.set_len(0).and_then(|()| file.write_all(text.as_bytes()));
            let lock = Self { path: path.to_owned(), file: Some(file) };
            written.map_err(Error::io(path))?;
            return Ok(Locked::Ours(lock));
        }
    }

    /// Whether other processes are kept out: not on file systems that cannot lock files.
    pub fn is_held(&self) -> bool {
        self.file.is_some()
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Elsewhere an open file cannot be removed; there it stays, unlocked.
        if cfg!(unix) && self.is_held() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Whether the file system has no locks.
fn is_impossible(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::Unsupported || (cfg!(target_os = "linux") && error.raw_os_error() == Some(ENOLCK))
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(100).read_to_string(&mut text));
    match read {
        Ok(_) if text.starts_with("process ") => text,
        _ => "another process".to_owned(),
    }
}

#[cfg(unix)]
fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_same_file(_: &File, _: &Path) -> bool {
    true
}
