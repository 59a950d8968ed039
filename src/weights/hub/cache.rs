//! The cache of Python's `huggingface_hub`, for one repository: `blobs/` holds file contents named by ETag,
//! `snapshots/` holds links to them for each commit, and `refs/` holds the commit that each branch last pointed to.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::weights::hub_file::HubFile;

/// Whether a revision is a full commit hash, whose files never change.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The cache entry of one file in a repository.
pub(super) struct Cache<'a> {
    root: PathBuf,
    folder: String,
    file: &'a HubFile,
}

impl<'a> Cache<'a> {
    pub fn new(root: PathBuf, file: &'a HubFile) -> Self {
        Self { root, folder: format!("models--{}--{}", file.owner(), file.repo()), file }
    }

    fn repo(&self) -> PathBuf {
        self.root.join(&self.folder)
    }

    /// Returns the path of the file if it is cached.
    pub fn lookup(&self) -> Option<PathBuf> {
        let revision = self.file.revision();
        let commit = if is_commit(revision) {
            revision.to_owned()
        } else {
            fs::read_to_string(self.repo().join("refs").join(revision)).ok()?.trim().to_owned()
        };
        if !is_commit(&commit) {
            return None;
        }
        Some(self.pointer(&commit)).filter(|p| p.is_file())
    }

    fn pointer(&self, commit: &str) -> PathBuf {
        self.repo().join("snapshots").join(commit).join(self.file.file())
    }

    /// Returns the path for the contents with this ETag, and creates its folder.
    pub fn blob(&self, etag: &str) -> Result<PathBuf> {
        let folder = self.repo().join("blobs");
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        Ok(folder.join(etag))
    }

    /// Locks the contents with this ETag against other downloads, in this process or another program. Dropping the file
    /// releases the lock.
    pub fn lock(&self, etag: &str) -> Result<File> {
        let folder = self.root.join(".locks").join(&self.folder);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let path = folder.join(format!("{etag}.lock"));
        let file = File::create(&path).map_err(Error::io(&path))?;
        file.lock().map_err(Error::io(&path))?;
        Ok(file)
    }

    /// Links the file at `commit` to the contents with this ETag, which must be locked, records the commit of the
    /// revision, and returns the path.
    pub fn link(&self, commit: &str, etag: &str) -> Result<PathBuf> {
        let pointer = self.pointer(commit);
        if let Some(folder) = pointer.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        let blob = self.blob(etag)?;
        // Created under another name and renamed, so that readers see the old link or the new one. The lock reserves
        // the name.
        let made = blob.with_file_name(format!("{etag}.link"));
        if made.symlink_metadata().is_ok() {
            fs::remove_file(&made).map_err(Error::io(&made))?;
        }
        point(&made, self.file, &blob).map_err(Error::io(&made))?;
        fs::rename(&made, &pointer).map_err(Error::io(&pointer))?;
        if !is_commit(self.file.revision()) {
            let folder = self.repo().join("refs");
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            let path = folder.join(self.file.revision());
            write_atomic(&path, commit.as_bytes())?;
        }
        Ok(pointer)
    }

    /// Removes a file and its contents from the cache, so that the next fetch downloads it again.
    pub fn discard(&self, pointer: &Path) -> Result<()> {
        let contents = pointer.canonicalize().map_err(Error::io(pointer))?;
        fs::remove_file(pointer).map_err(Error::io(pointer))?;
        // Do not delete the target of a link that a user made to a place outside the cache.
        let is_blob = self.repo().join("blobs").canonicalize().is_ok_and(|blobs| contents.starts_with(blobs));
        if is_blob && contents.exists() {
            fs::remove_file(&contents).map_err(Error::io(&contents))?;
        }
        Ok(())
    }
}

/// Creates the link to the contents. It is relative, so that the cache can be moved.
#[cfg(unix)]
fn point(made: &Path, file: &HubFile, blob: &Path) -> std::io::Result<()> {
    // Up from snapshots/<commit>/ and from each folder in the file's own path.
    let mut target = PathBuf::from("../..");
    target.extend(std::iter::repeat_n("..", file.file().matches('/').count()));
    target.push("blobs");
    target.extend(blob.file_name());
    std::os::unix::fs::symlink(target, made)
}

/// Copies the contents, because links need privileges on this system that users lack.
#[cfg(not(unix))]
fn point(made: &Path, _file: &HubFile, blob: &Path) -> std::io::Result<()> {
    fs::copy(blob, made).map(|_| ())
}
