//! The results folder of a training, which one process at a time writes to.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::arm::Arm;
use super::config::{CONFIG_FILE, Config};
use super::inputs::DATA_FILE;
use super::outcome::RESULTS_FILE;
use crate::error::{Error, Result};
use crate::files::{FileLock, Locked, NewFolders, UNFINISHED, remove_if_there};

/// File that is locked while a process writes to the folder. The kernel releases the lock when the process ends.
const LOCK_FILE: &str = "training.lock";
/// File name of the report in the results folder.
pub const REPORT_PAGE: &str = "report.html";

/// The files of a training beside the folders of its arms.
const FILES: [&str; 4] = [RESULTS_FILE, REPORT_PAGE, DATA_FILE, CONFIG_FILE];

/// Names of everything that a training writes, the settings last.
fn names() -> impl Iterator<Item = &'static str> {
    Arm::ALL.into_iter().map(Arm::name).chain(FILES)
}

/// Moves a file or folder into a folder of the same file system.
fn move_into(path: &Path, folder: &Path) -> Result<()> {
    std::fs::rename(path, folder.join(path.file_name().unwrap_or_default())).map_err(Error::io(path))
}

/// A results folder that only this process writes to.
///
/// The lock is on a file in the folder and lasts until this value is dropped. If nothing was written by then, the
/// folder is removed again, with those above it that were made for it.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// Where the training that is replaced lies until the new one has begun.
    replaced: Mutex<Option<PathBuf>>,
    /// None on a rank that does not write.
    lock: Option<FileLock>,
    /// Removes what is still empty when the lock is gone; so it comes last.
    _created: Option<NewFolders>,
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
                return Ok(Self { path, replaced: Mutex::default(), lock: Some(lock), _created: Some(created) });
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

    /// Claims a folder for a new training that replaces an earlier one there: that is removed once the new one has
    /// begun, and put back if it fails before. Other files stay.
    ///
    /// # Errors
    /// When another process writes to it, it has files under a training's names that no training wrote, or it cannot be
    /// made or written to.
    pub fn overwritten(path: &Path) -> Result<Self> {
        let folder = Self::claim(path)?;
        let before = Config::read(&path.join(CONFIG_FILE)).ok();
        let of_before = match &before {
            Some(config) => config.train.arms.iter().map(|arm| arm.name()).chain(FILES).collect(),
            None => Vec::new(),
        };
        let there: Vec<&str> = names().filter(|name| path.join(name).symlink_metadata().is_ok()).collect();
        if let Some(other) = there.iter().find(|name| !of_before.contains(name)) {
            let what = format!("{other} in it was not written by a training: choose another folder");
            return Err(Error::Data { path: path.to_owned(), what });
        }
        if !there.is_empty() {
            let aside = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(path).map_err(Error::io(path))?.keep();
            *folder.replaced() = Some(aside.clone());
            there.iter().try_for_each(|name| move_into(&path.join(name), &aside))?;
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

    /// Returns the folder that the first of several ranks has claimed, for the others, which write nothing there.
    pub fn of_first_rank(path: &Path) -> Self {
        Self { path: path.to_owned(), replaced: Mutex::default(), lock: None, _created: None }
    }

    /// Returns the folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether other processes are kept out: not on file systems that cannot lock files.
    pub fn is_locked(&self) -> bool {
        self.lock.as_ref().is_none_or(FileLock::is_held)
    }

    /// Removes what a new training has written there and puts back the one that it was to replace.
    ///
    /// # Errors
    /// When something cannot be removed or put back.
    pub(super) fn clear(&self) -> Result<()> {
        if self.lock.is_none() {
            return Ok(());
        }
        // The settings go last: with them, what is left is still known as a training.
        names().try_for_each(|name| remove_if_there(&self.path.join(name)))?;
        let Some(aside) = self.replaced().take() else { return Ok(()) };
        for entry in std::fs::read_dir(&aside).map_err(Error::io(&aside))? {
            move_into(&entry.map_err(Error::io(&aside))?.path(), &self.path)?;
        }
        remove_if_there(&aside)
    }

    /// Removes the training that is replaced: the new one has begun.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub(super) fn has_begun(&self) -> Result<()> {
        let aside = self.replaced().take();
        aside.map_or(Ok(()), |aside| remove_if_there(&aside))
    }

    fn replaced(&self) -> MutexGuard<'_, Option<PathBuf>> {
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claim(path: &Path) -> Result<Self> {
        let created = NewFolders::create(path)?;
        match FileLock::try_new(&path.join(LOCK_FILE))? {
            Locked::Ours(lock) => {
                let (lock, created) = (Some(lock), Some(created));
                Ok(Self { path: path.to_owned(), replaced: Mutex::default(), lock, _created: created })
            }
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

impl Drop for RunFolder {
    fn drop(&mut self) {
        if self.replaced().is_some() {
            // The training ended before it began; the error that led here says more than one of cleaning up.
            let _ = self.clear();
        }
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
    fn overwriting_replaces_the_training_before_once_the_new_one_has_begun() -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        let settings = crate::train::preset("procedural")?.to_toml()?;
        let files = [CONFIG_FILE, RESULTS_FILE, DATA_FILE, REPORT_PAGE, "hg/steps.jsonl", "notes.txt"];
        std::fs::create_dir_all(path.join("hg/states")).unwrap();
        for file in files {
            std::fs::write(path.join(file), if file == CONFIG_FILE { &settings } else { "old" }).unwrap();
        }
        let names = || -> Vec<String> {
            let entries = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = entries.filter(|name| !name.starts_with(UNFINISHED)).collect();
            names.sort();
            names
        };
        let before = names();
        // It fails before its first step, or does not even come to writing.
        let folder = RunFolder::overwritten(path)?;
        assert_eq!(names(), ["notes.txt", LOCK_FILE]);
        std::fs::create_dir(path.join("aug")).unwrap();
        std::fs::write(path.join(CONFIG_FILE), "new").unwrap();
        folder.clear()?;
        drop(folder);
        assert_eq!(names(), before);
        drop(RunFolder::overwritten(path)?);
        assert_eq!(names(), before);
        assert!(files.into_iter().skip(1).all(|file| std::fs::read_to_string(path.join(file)).unwrap() == "old"));
        let folder = RunFolder::overwritten(path)?;
        std::fs::write(path.join(CONFIG_FILE), "new").unwrap();
        folder.has_begun()?;
        drop(folder);
        assert_eq!(names(), [CONFIG_FILE, "notes.txt"]);
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 2, "nothing hidden is left");
        // What no training wrote is not replaced.
        for other in [CONFIG_FILE, "aug", RESULTS_FILE] {
            let root = tempfile::tempdir().unwrap();
            match other {
                "aug" => std::fs::create_dir(root.path().join(other)).unwrap(),
                _ => std::fs::write(root.path().join(other), "mine").unwrap(),
            }
            let error = RunFolder::overwritten(root.path()).unwrap_err().to_string();
            assert!(error.contains(&format!("{other} in it was not written by a training")), "{error}");
            assert!(root.path().join(other).exists());
        }
        Ok(())
    }
}
