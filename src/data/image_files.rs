//! Image files that are given one by one.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::decode::read_image_file;
use super::{Dataset, is_image, is_junk, is_other_image};
use crate::error::{Error, Result};
use crate::files::folder_of;

/// Image files. Each folder counts as one person; [`TestSet::people`](super::TestSet::people) drops the labels if the
/// pairs contradict them.
pub struct ImageFiles {
    files: Vec<PathBuf>,
    labels: Vec<u32>,
    people: Vec<String>,
}

impl ImageFiles {
    /// Returns the images in `folder` and its sub-folders, in name order, and those in formats that are not read.
    /// Hidden folders and those of the system are passed over, and so are folders that were seen by another way.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn find(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let whole = |folder: &Path| folder.canonicalize().map_err(Error::io(folder));
        let (mut found, mut others, mut seen) = (Vec::new(), Vec::new(), BTreeSet::from([whole(folder)?]));
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(&folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
            let mut entries = entries.map_err(Error::io(&folder))?;
            entries.retain(|entry| !is_junk(&entry.file_name()));
            // Real folders before links to them, and in name order: which of two ways is taken does not depend on the
            // disk.
            entries.sort_by_key(|entry| (entry.path().is_symlink(), entry.file_name()));
            let mut inside = Vec::new();
            for path in entries.into_iter().map(|entry| entry.path()) {
                if path.is_dir() {
                    if seen.insert(whole(&path)?) {
                        inside.push(path);
                    }
                } else if path.is_file() && path.file_name().is_some_and(is_image) {
                    found.push(path);
                } else if path.file_name().is_some_and(is_other_image) {
                    others.push(path);
                }
            }
            folders.extend(inside.into_iter().rev());
        }
        found.sort();
        others.sort();
        Ok((found, others))
    }

    /// Returns the files; people are named by their folders in `root`.
    pub fn new(root: &Path, files: Vec<PathBuf>) -> Self {
        let folder = |file: &PathBuf| {
            let folder = folder_of(file);
            folder.strip_prefix(root).unwrap_or(folder).display().to_string()
        };
        let mut people: Vec<String> = files.iter().map(folder).collect();
        people.sort();
        people.dedup();
        let label = |file| people.binary_search(&folder(file)).expect("the folder of every file was taken") as u32;
        Self { labels: files.iter().map(label).collect(), files, people }
    }
}

impl Dataset for ImageFiles {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn num_identities(&self) -> usize {
        self.people.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.labels[index]
    }

    fn identity_name(&self, label: u32) -> String {
        self.people[label as usize].clone()
    }

    fn name(&self, index: usize) -> String {
        self.files[index].display().to_string()
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        read_image_file(&self.files[index]).map(Some)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.files[index].metadata().ok().map(|data| data.len())
    }
}
