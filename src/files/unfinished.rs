//! Folders that appear under their names once they are complete.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::lock::{FileLock, Locked};
use super::{NewFolders, UNFINISHED, folder_of, remove_if_there, write_atomic};
use crate::error::{Error, Result};

/// File in an unfinished folder that says what it is to become.
const KEY_FILE: &str = ".maskinv-key";

/// A folder that is written over a longer time and appears under its name once it is complete.
///
/// Until then it lies beside its place under a hidden name, and one process at a time writes to it. A later command
/// with the same `key` goes on with what an interrupted one left.
#[derive(Debug)]
pub struct UnfinishedFolder {
    path: PathBuf,
    target: PathBuf,
    is_begun_anew: bool,
    _lock: FileLock,
    /// Folders above it that were made for it; removed if they are empty, so after the lock's file.
    _created: NewFolders,
}

impl UnfinishedFolder {
    /// Opens the folder that is to become `target`: a new one, or what an interrupted command with the same `key`, a
    /// description of its inputs and settings, left.
    ///
    /// # Errors
    /// When `target` exists, another process is writing it, or the folder cannot be made.
    pub fn open(target: &Path, key: &str) -> Result<Self> {
        if target.symlink_metadata().is_ok() {
            return Err(Error::Data { path: target.to_owned(), what: "exists already".to_owned() });
        }
        let parent = folder_of(target);
        let created = NewFolders::create(parent)?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let lock = match FileLock::try_new(&parent.join(format!("{UNFINISHED}lock-{name}")))? {
            Locked::Ours(lock) => lock,
            Locked::Theirs(holder) => {
                return Err(Error::Data { path: target.to_owned(), what: format!("{holder} is writing it") });
            }
        };
        let path = parent.join(format!("{UNFINISHED}unfinished-{name}"));
        let before = std::fs::read_to_string(path.join(KEY_FILE)).ok();
        let is_begun_anew = before.as_ref().is_some_and(|before| before != key);
        let folder = Self { path, target: target.to_owned(), is_begun_anew, _lock: lock, _created: created };
        if before.is_some() && !is_begun_anew {
            return Ok(folder);
        }
        remove_if_there(&folder.path)?;
        std::fs::create_dir(&folder.path).map_err(Error::io(target))?;
        match write_atomic(&folder.path.join(KEY_FILE), key.as_bytes()) {
            Ok(()) => Ok(folder),
            Err(error) => Err(folder.discard_for(error)),
        }
    }

    /// Whether something was there that had begun with another key and is gone, so that its work is done again.
    pub fn is_begun_anew(&self) -> bool {
        self.is_begun_anew
    }

    /// Where to write until it is complete.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the complete entries that are there, sorted.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn entries(&self) -> Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(Error::io(&self.path))? {
            let name = entry.map_err(Error::io(&self.path))?.file_name();
            match name.to_string_lossy().starts_with(UNFINISHED) {
                true if name != KEY_FILE => remove_if_there(&self.path.join(name))?,
                true => {}
                false => names.push(name),
            }
        }
        names.sort();
        Ok(names)
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// When it cannot be renamed, for example because there is a folder of that name by now.
    pub fn finish(self) -> Result<()> {
        std::fs::rename(&self.path, &self.target).map_err(Error::io(&self.target))?;
        remove_if_there(&self.target.join(KEY_FILE))
    }

    /// Removes the folder after an error, which it returns. After an interruption it is left instead, to go on with.
    #[must_use]
    pub fn discard_for(self, error: Error) -> Error {
        if error.is_interruption() {
            return self.interrupted();
        }
        self.discard();
        error
    }

    /// Leaves the folder and returns the error of an interruption.
    #[must_use]
    pub fn interrupted(self) -> Error {
        let what = "interrupted, as requested; the same command goes on where it stopped";
        Error::io(&self.target)(std::io::Error::new(ErrorKind::Interrupted, what))
    }

    /// Removes the folder.
    pub fn discard(self) {
        // The error that led here says more than one of cleaning up.
        let _ = remove_if_there(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_writes_a_folder_and_the_same_one_goes_on() -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("sets/faces");
        let first = UnfinishedFolder::open(&target, "a")?;
        std::fs::write(first.path().join("one"), "1").unwrap();
        for key in ["a", "b"] {
            let error = UnfinishedFolder::open(&target, key).unwrap_err().to_string();
            assert!(error.contains(&format!("process {} is writing it", std::process::id())), "{error}");
        }
        assert_eq!(first.entries()?, ["one"]);
        assert!(first.interrupted().is_interruption());
        assert_eq!(UnfinishedFolder::open(&target, "a")?.entries()?, ["one"]);
        let other = UnfinishedFolder::open(&target, "b")?;
        assert!(other.is_begun_anew());
        assert!(other.entries()?.is_empty(), "another command begins anew");
        std::fs::write(other.path().join("two"), "2").unwrap();
        other.finish()?;
        let names = |path: &Path| -> Vec<OsString> {
            std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect()
        };
        assert_eq!((names(&target), names(&root.path().join("sets"))), (vec!["two".into()], vec!["faces".into()]));
        let gone = root.path().join("others/faces");
        UnfinishedFolder::open(&gone, "a")?.discard();
        assert!(!root.path().join("others").exists(), "nothing is left of a failure");
        Ok(())
    }

    #[test]
    fn a_folder_that_cannot_get_its_name_is_kept() -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("faces");
        let folder = UnfinishedFolder::open(&target, "a")?;
        std::fs::write(folder.path().join("one"), "1").unwrap();
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("other"), "").unwrap();
        assert!(folder.finish().is_err());
        std::fs::remove_dir_all(&target).unwrap();
        let again = UnfinishedFolder::open(&target, "a")?;
        assert_eq!(again.entries()?, ["one"]);
        again.finish()?;
        assert!(target.join("one").is_file());
        Ok(())
    }
}
