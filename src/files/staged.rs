//! Outputs of several files that appear together.

use std::path::{Path, PathBuf};

use super::{NewFolders, UNFINISHED, check_folder_writable, folder_of};
use crate::error::{Error, Result};

/// Files for a folder, in which others may lie, that get their places together once all are complete. Until then they
/// lie in a hidden folder; dropping this removes it.
#[derive(Debug)]
pub struct StagedFolder {
    target: PathBuf,
    staging: tempfile::TempDir,
}

impl StagedFolder {
    /// Returns an empty stage for `target`, which need not exist yet.
    ///
    /// # Errors
    /// When nothing can be written there.
    pub fn new(target: &Path) -> Result<Self> {
        check_folder_writable(target)?;
        let here = |path| if path == Path::new("") { Path::new(".") } else { path };
        let above = target.ancestors().map(here).find(|path| path.is_dir()).unwrap_or(Path::new("."));
        let staging = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(above).map_err(Error::io(target))?;
        Ok(Self { target: target.to_owned(), staging })
    }

    /// Where to write until all is complete.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Moves all files to their places. Nothing that is there is replaced.
    ///
    /// # Errors
    /// When a file is there already or cannot be moved; those moved before are removed again.
    pub fn finish(self) -> Result<()> {
        let mut files = Vec::new();
        list(self.path(), Path::new(""), &mut files)?;
        if let Some(there) = files.iter().map(|file| self.target.join(file)).find(|p| p.symlink_metadata().is_ok()) {
            return Err(Error::Data { path: there, what: "exists already".to_owned() });
        }
        let (mut folders, mut moved) = (Vec::new(), Vec::new());
        for file in files {
            let to = self.target.join(&file);
            let made = NewFolders::create(folder_of(&to)).map(|made| folders.push(made));
            let result = made.and_then(|()| std::fs::rename(self.path().join(&file), &to).map_err(Error::io(&to)));
            if let Err(error) = result {
                moved.iter().for_each(|path: &PathBuf| drop(std::fs::remove_file(path)));
                return Err(error);
            }
            moved.push(to);
        }
        Ok(())
    }

    /// Removes the files, where the process ends without dropping this.
    pub fn discard(&self) {
        // What led here says more than an error of cleaning up.
        let _ = std::fs::remove_dir_all(self.path());
    }
}

/// Adds the files below `root`, by their paths in it, in name order.
fn list(root: &Path, inside: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let folder = root.join(inside);
    let entries = std::fs::read_dir(&folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let mut entries = entries.map_err(Error::io(&folder))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = inside.join(entry.file_name());
        match entry.path().is_dir() {
            true => list(root, &path, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_appear_together_and_replace_nothing() -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("a/b");
        let staged = |names: &[&str]| -> Result<StagedFolder> {
            let staged = StagedFolder::new(&target)?;
            for name in names {
                let path = staged.path().join(name);
                std::fs::create_dir_all(folder_of(&path)).unwrap();
                std::fs::write(path, *name).unwrap();
            }
            Ok(staged)
        };
        drop(staged(&["x"])?);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "nothing is left of a failure");
        staged(&["x", "c/y"])?.finish()?;
        assert_eq!(std::fs::read_to_string(target.join("c/y")).unwrap(), "c/y");
        std::fs::write(target.join("x"), "mine").unwrap();
        let error = staged(&["a", "c/z", "x"])?.finish().unwrap_err().to_string();
        assert!(error.contains("x: exists already"), "{error}");
        assert!(std::fs::read_to_string(target.join("x")).unwrap() == "mine" && !target.join("a").exists());
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 2, "only x and c");
        Ok(())
    }
}
