//! Image files that are given one by one.

use std::path::{Path, PathBuf};

use super::Dataset;
use super::decode::read_bytes;
use crate::error::Result;
use crate::files::folder_of;

/// Image files. Each folder counts as one person; [`TestSet::people`](super::TestSet::people) drops the labels if the
/// pairs contradict them.
pub struct ImageFiles {
    files: Vec<PathBuf>,
    labels: Vec<u32>,
    people: Vec<String>,
}

impl ImageFiles {
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
        read_bytes(&self.files[index]).map(Some)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.files[index].metadata().ok().map(|data| data.len())
    }
}
