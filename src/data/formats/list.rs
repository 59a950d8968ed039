//! A list of image files with labels.

use std::path::{Path, PathBuf};

use super::classes::{Classes, Paths};
use crate::data::decode::{is_image, read_bytes};
use crate::data::sample::Dataset;
use crate::error::{Error, Result};
use crate::files::folder_of;

/// The images listed in a text file, as a [`Dataset`] in the list's order. Every image has
/// [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS).
pub struct ListedFaces {
    folder: PathBuf,
    classes: Classes,
    paths: Paths,
}

impl ListedFaces {
    /// Reads a list with one image per line: its path and its label (a number or a name), separated by a tab, a comma
    /// or blanks; or MXNet's `.lst` lines of key, label and path, separated by tabs. Paths are relative to the list. A
    /// first line of column names is skipped.
    ///
    /// # Errors
    /// When the list cannot be read, a line is malformed, or an image is missing.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let folder = folder_of(path).to_owned();
        let (mut paths, mut labels) = (Paths::default(), Vec::new());
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let error = |what: String| Error::Line { path: path.to_owned(), line: number + 1, what };
            let Some((image, label)) = fields(line) else {
                return Err(error(format!("expected an image's path and its label, found {line:?}")));
            };
            if !is_image(image.as_ref()) {
                if number == 0 {
                    continue;
                }
                return Err(error(format!("expected the path of an image, found {image:?}")));
            }
            if !folder.join(image).is_file() {
                return Err(error(format!("expected an image {}, found none", folder.join(image).display())));
            }
            paths.push(image);
            labels.push(label.to_owned());
        }
        let classes = Classes::from_labels(labels, &paths, path)?;
        Ok(Self { folder, classes, paths })
    }

    fn path(&self, index: usize) -> PathBuf {
        self.folder.join(self.paths.get(index))
    }
}

/// Splits a line into an image's path and its label.
fn fields(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    if let Some((first, rest)) = line.split_once('\t') {
        return Some(match rest.rsplit_once('\t') {
            Some((labels, path)) => (path, labels.split('\t').next().unwrap_or(labels).trim_end_matches(".000000")),
            None => (first, rest),
        });
    }
    line.rsplit_once(',').or_else(|| line.rsplit_once(char::is_whitespace)).map(|(a, b)| (a.trim(), b.trim()))
}

impl Dataset for ListedFaces {
    fn len(&self) -> usize {
        self.classes.num_images()
    }

    fn num_identities(&self) -> usize {
        self.classes.num_identities()
    }

    fn label(&self, index: usize) -> u32 {
        self.classes.label(index)
    }

    fn name(&self, index: usize) -> String {
        self.path(index).display().to_string()
    }

    fn identity_name(&self, label: u32) -> String {
        self.classes.name(label)
    }

    fn file_name(&self, index: usize) -> Option<String> {
        Some(self.paths.file_name(index).to_owned())
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        read_bytes(&self.path(index)).map(Some)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.path(index).metadata().ok().map(|data| data.len())
    }
}
