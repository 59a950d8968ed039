//! Atomic writes: output goes to a temporary file, which is then renamed. What a failure leaves is removed.

mod lock;
mod staged;
mod unfinished;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

pub use lock::{FileLock, Locked};
pub use staged::StagedFolder;
pub use unfinished::UnfinishedFolder;

use crate::error::{Error, Result};

/// Returns the folder that contains a file; `.` for a bare file name.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether there is a folder with anything in it.
pub fn has_entries(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// Whether a path, of which the end may be missing, lies in a folder or is it.
pub fn is_inside(path: &Path, folder: &Path) -> bool {
    let whole = |path: &Path| {
        let path = std::path::absolute(path).unwrap_or_default();
        let there = path.ancestors().find_map(|above| Some((above.canonicalize().ok()?, above.to_owned())));
        there.map(|(whole, above)| whole.join(path.strip_prefix(&above).unwrap_or(Path::new(""))))
    };
    match (whole(path), whole(folder)) {
        (Some(path), Some(folder)) => path.starts_with(folder),
        _ => false,
    }
}

/// Name prefix of temporary files and folders; a random suffix follows.
pub const UNFINISHED: &str = ".maskinv-";

/// Removes temporary files and folders that a killed process left in a folder.
///
/// # Errors
/// When one cannot be removed.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            let path = entry.path();
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            removed.map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// Returns a new temporary file beside `path`, for [`persist`] to rename once it is complete. Dropping it deletes it.
///
/// # Errors
/// When the folder is missing or cannot be written to.
pub fn temporary(path: &Path) -> Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(UNFINISHED);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private by default; results get the usual permissions, subject to the user's umask.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder_of(path)).map_err(Error::io(path))
}

/// Like [`temporary`], but only its owner may read the file.
///
/// # Errors
/// When the folder is missing or cannot be written to.
#[cfg(feature = "gallery")]
pub fn private_temporary(path: &Path) -> Result<NamedTempFile> {
    tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder_of(path)).map_err(Error::io(path))
}

/// Writes a file atomically: to a temporary file, which is renamed to `path`. Even after an interruption, `path` holds
/// the old file or the new one, never a partial one.
///
/// # Errors
/// When it cannot be written.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    fill(temporary(path)?, path, bytes)
}

/// Like [`write_atomic`], but only its owner may read the file.
///
/// # Errors
/// When it cannot be written.
#[cfg(feature = "gallery")]
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    fill(private_temporary(path)?, path, bytes)
}

fn fill(mut file: NamedTempFile, path: &Path, bytes: &[u8]) -> Result<()> {
    file.write_all(bytes).map_err(Error::io(path))?;
    persist(file, path)
}

/// Syncs a temporary file to disk and renames it to `path`.
///
/// # Errors
/// When it cannot be written or renamed.
pub fn persist(file: NamedTempFile, path: &Path) -> Result<()> {
    file.as_file().sync_all().map_err(Error::io(path))?;
    file.persist(path).map(drop).map_err(|e| Error::io(path)(e.error))
}

/// Folders that were made for an output. Dropping it removes those of them that are still empty.
#[derive(Debug, Default)]
pub struct NewFolders {
    /// The outermost first.
    created: Vec<PathBuf>,
}

impl NewFolders {
    /// Makes a folder, and those above it, where they are missing.
    ///
    /// # Errors
    /// When one cannot be made; those already made are removed.
    pub fn create(path: &Path) -> Result<Self> {
        let mut folders = Self::default();
        let missing = path.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.is_dir());
        let missing: Vec<&Path> = missing.collect();
        for path in missing.into_iter().rev() {
            match std::fs::create_dir(path) {
                Ok(()) => folders.created.push(path.to_owned()),
                // Another process was faster.
                Err(e) if e.kind() == ErrorKind::AlreadyExists && path.is_dir() => {}
                Err(e) => return Err(Error::io(path)(e)),
            }
        }
        Ok(folders)
    }

    /// Whether this value made the folder.
    pub fn includes(&self, path: &Path) -> bool {
        self.created.iter().any(|created| created == path)
    }
}

impl Drop for NewFolders {
    fn drop(&mut self) {
        // Folders with anything in them stay: they cannot be removed this way.
        self.created.iter().rev().for_each(|path| drop(std::fs::remove_dir(path)));
    }
}

/// Removes a file or a folder with everything in it; that there is none is no error.
///
/// # Errors
/// When it cannot be removed.
pub fn remove_if_there(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(data) if data.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Checks that a file can be written at `path`, so that a wrong name fails before the work for it: its folder exists
/// and takes files, and the path is no folder.
///
/// # Errors
/// Says what is in the way.
pub fn check_writable(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::Data { path: path.to_owned(), what: "expected a file to write, found a folder".to_owned() });
    }
    let folder = folder_of(path);
    if !folder.is_dir() {
        let what = "expected a folder to write to, found none".to_owned();
        return Err(Error::Data { path: folder.to_owned(), what });
    }
    temporary(path).map(drop)
}

/// Checks that a folder can be made or written to at `path`, like [`check_writable`].
///
/// # Errors
/// Says what is in the way.
pub fn check_folder_writable(path: &Path) -> Result<()> {
    let folders = NewFolders::create(path)?;
    let file = temporary(&path.join("x")).map(drop).map_err(|error| match error {
        Error::Io { source, .. } => Error::Io { path: path.to_owned(), source },
        other => other,
    });
    drop(folders);
    file
}

/// Returns the SHA-256 of a file as lowercase hexadecimal digits.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    use sha2::{Digest, Sha256};
    use std::io::Read;
    let mut file = std::fs::File::open(path).map_err(Error::io(path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io(path)(e)),
        }
    }
}

/// Returns bytes as lowercase hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Syncs a folder to disk, so that renames and removals in it are durable.
///
/// # Errors
/// When the folder cannot be opened or synced.
pub fn sync_folder(folder: &Path) -> Result<()> {
    // Other systems cannot open folders, and they write renames through.
    #[cfg(unix)]
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))?;
    let _ = folder;
    Ok(())
}
