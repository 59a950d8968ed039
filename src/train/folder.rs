//! The results folder of a training, which one process at a time writes to.

use std::path::{Path, PathBuf};

use super::arm::Arm;
use super::outcome::RESULTS_FILE;
use super::run::{CONFIG_FILE, DATA_FILE};
use crate::error::{Error, Result};
use crate::files::{FileLock, Locked, NewFolders, remove_if_there};

/// File that is locked while a process writes to the folder. The kernel releases the lock when the process ends.
const LOCK_FILE: &str = "training.lock";
/// File name of the report in the results folder.
pub const REPORT_PAGE: &str = "report.html";

/// A results folder that only this process writes to.
///
/// The lock is on a file in the folder and lasts until this value is dropped. If nothing was written by then, the
/// folder is removed again, with those above it that were made for it.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    lock: FileLock,
    /// Removes what is still empty when the lock is gone; so it comes last.
    _created: NewFolders,
}

impl RunFolder {
    /// Makes a new folder named `base`, or `base-2`, `base-3` and so on if there is one of that name: also when several
    /// processes ask at once.
    ///
    /// # Errors
    /// When a folder cannot be made or written to.
    pub fn unused(base: &Path) -> Result<Self> {
        let numbered = |n: usize| PathBuf::from(format!("{}-{n}", base.display()));
        for path in std::iter::once(base.to_owned()).chain((2..).map(numbered)) {
            if path.symlink_metadata().is_ok() {
                continue;
            }
            let created = NewFolders::create(&path)?;
            // Another process may have made the folder, or claimed it, in the meantime.
            if created.includes(&path)
                && let Locked::Ours(lock) = FileLock::try_new(&path.join(LOCK_FILE))?
            {
                return Ok(Self { path, lock, _created: created });
            }
        }
        unreachable!("the numbers do not end")
    }

    /// Claims a folder that is missing or empty.
    ///
    /// # Errors
    /// When it has files, another process writes to it, or it cannot be made or written to.
    pub fn empty(path: &Path) -> Result<Self> {
        let folder = Self::claim(path)?;
        match folder.is_empty()? {
            true => Ok(folder),
            false => Err(Error::Data { path: path.to_owned(), what: "expected an empty folder, found files".into() }),
        }
    }

    /// Claims a folder for a new training and removes what an earlier one wrote there. Other files stay.
    ///
    /// # Errors
    /// When another process writes to it, or it cannot be made, written to or cleared.
    pub fn overwritten(path: &Path) -> Result<Self> {
        let folder = Self::claim(path)?;
        if path.join(CONFIG_FILE).is_file() {
            folder.clear()?;
        }
        Ok(folder)
    }

    /// Claims the folder of an earlier training, to resume it.
    ///
    /// # Errors
    /// When it is no such folder, another process writes to it, or it cannot be written to.
    pub fn of_run(path: &Path) -> Result<Self> {
        let folder = Self::claim(path)?;
        match path.join(CONFIG_FILE).is_file() {
            true => Ok(folder),
            false => {
                let what = format!("expected the folder of a training, found no {CONFIG_FILE}");
                Err(Error::Data { path: path.to_owned(), what })
            }
        }
    }

    /// Returns the folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether other processes are kept out: not on file systems that cannot lock files.
    pub fn is_locked(&self) -> bool {
        self.lock.is_held()
    }

    /// Removes what a training has written there.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub(super) fn clear(&self) -> Result<()> {
        for arm in Arm::ALL.map(|arm| self.path.join(arm.name())) {
            remove_if_there(&arm)?;
        }
        // The settings go last: with them, what is left is still known as a training.
        for file in [RESULTS_FILE, REPORT_PAGE, DATA_FILE, CONFIG_FILE] {
            remove_if_there(&self.path.join(file))?;
        }
        Ok(())
    }

    fn claim(path: &Path) -> Result<Self> {
        let created = NewFolders::create(path)?;
        match FileLock::try_new(&path.join(LOCK_FILE))? {
            Locked::Ours(lock) => Ok(Self { path: path.to_owned(), lock, _created: created }),
            Locked::Theirs(holder) => {
                Err(Error::Data { path: path.to_owned(), what: format!("is in use: {holder} is writing to it") })
            }
        }
    }

    fn is_empty(&self) -> Result<bool> {
        let entries = std::fs::read_dir(&self.path).map_err(Error::io(&self.path))?;
        Ok(entries.flatten().all(|entry| entry.file_name() == LOCK_FILE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_writer_and_an_unused_one_leaves_nothing() -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("runs/a");
        let first = RunFolder::unused(&path)?;
        assert_eq!(first.path(), path);
        assert_eq!(RunFolder::unused(&path)?.path(), root.path().join("runs/a-2"));
        for claimed in [RunFolder::empty(&path), RunFolder::of_run(&path), RunFolder::overwritten(&path)] {
            let error = claimed.unwrap_err().to_string();
            let holder = format!("runs/a: is in use: process {} is writing to it", std::process::id());
            assert!(error.ends_with(&holder), "{error}");
        }
        drop(first);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "nothing was written");
        let again = RunFolder::empty(&path)?;
        std::fs::write(path.join(CONFIG_FILE), "").unwrap();
        drop(again);
        assert!(!path.join(LOCK_FILE).exists());
        let error = RunFolder::empty(&path).unwrap_err().to_string();
        assert!(error.contains("expected an empty folder"), "{error}");
        RunFolder::of_run(&path)?;
        Ok(())
    }

    #[test]
    fn many_at_once_get_folders_of_their_own() {
        let root = tempfile::tempdir().unwrap();
        let base = root.path().join("runs/a");
        let folders: Vec<RunFolder> = std::thread::scope(|scope| {
            let claims: Vec<_> = (0..16).map(|_| scope.spawn(|| RunFolder::unused(&base).unwrap())).collect();
            claims.into_iter().map(|claim| claim.join().unwrap()).collect()
        });
        let mut paths: Vec<&Path> = folders.iter().map(RunFolder::path).collect();
        paths.sort();
        paths.dedup();
        assert_eq!(paths.len(), 16);
    }

    #[test]
    fn overwriting_removes_all_of_the_training_before_and_nothing_else() -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        std::fs::create_dir_all(path.join("hg/states")).unwrap();
        for file in [CONFIG_FILE, RESULTS_FILE, DATA_FILE, REPORT_PAGE, "hg/steps.jsonl", "notes.txt"] {
            std::fs::write(path.join(file), "old").unwrap();
        }
        let folder = RunFolder::overwritten(path)?;
        let left: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.len() == 2 && left.iter().any(|name| name == "notes.txt"), "{left:?}");
        drop(folder);
        Ok(())
    }
}
