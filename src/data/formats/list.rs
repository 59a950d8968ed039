//! A list of image files with labels.

use std::path::{Path, PathBuf};

use super::classes::{Classes, Paths};
use super::list_form::Form;
use crate::data::dataset::Dataset;
use crate::data::decode::read_image_file;
use crate::error::Result;
use crate::files::folder_of;
use crate::lists::{Text, plain_path};

/// The images listed in a text file, as a [`Dataset`] in the list's order. Every image has
/// [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS).
pub struct ListedFaces {
    folder: PathBuf,
    classes: Classes,
    paths: Paths,
    num_repeated: usize,
}

impl ListedFaces {
    /// Reads a list with one image per line: its path and its label (a number or a name), separated by a tab, a comma,
    /// a semicolon or blanks; with a first line of column names, in any order and beside other columns; MXNet's `.lst`
    /// lines of key, label and path, and insightface's of 1, path and label; or paths alone, whose folders are the
    /// labels. Paths are relative to the list.
    ///
    /// # Errors
    /// When the list cannot be read, a line is malformed, an image is missing or has two labels.
    pub fn open(path: &Path) -> Result<Self> {
        let text = Text::read(path)?;
        let folder = folder_of(path).to_owned();
        let exists = |image: &str| place(&folder, image).is_some();
        let (form, num_skipped) = Form::of(&text, &exists)?;
        let (mut paths, mut labels, mut lines) = (Paths::default(), Vec::new(), Vec::new());
        for line in text.lines().skip(num_skipped) {
            let error = |what: String| text.error(line.number, what);
            let (image, label) = form.read(line).map_err(error)?;
            let Some(image) = place(&folder, &image) else {
                return Err(error(format!("expected an image {}, found none", folder.join(&*image).display())));
            };
            paths.push(&image);
            labels.push(label.into_owned());
            lines.push(line.number);
        }
        let num_repeated = drop_repeated(&text, &mut paths, &mut labels, &lines)?;
        let classes = Classes::from_labels(labels, &paths, path)?;
        Ok(Self { folder, classes, paths, num_repeated })
    }

    /// Number of lines left out because an earlier line has the same image and label.
    pub fn num_repeated(&self) -> usize {
        self.num_repeated
    }

    fn path(&self, index: usize) -> PathBuf {
        self.folder.join(self.paths.get(index))
    }
}

/// Returns the path of a listed image relative to `folder`, in one way for each file as far as its text tells: as
/// [`plain_path`] writes it, or without the leading slash, or else as the list does; none if there is no such file.
fn place(folder: &Path, image: &str) -> Option<String> {
    let is_there = |image: &str| !image.is_empty() && folder.join(image).is_file();
    let plain = plain_path(image);
    // Behind a link `..` leads elsewhere than its text says.
    let whole = |image: &str| folder.join(image).canonicalize().ok();
    let plain = if image.contains("..") && whole(image) != whole(&plain) { image.to_owned() } else { plain };
    let inside = std::path::absolute(folder).ok().and_then(|folder| {
        let inside = Path::new(&plain).strip_prefix(plain_path(folder.to_str()?)).ok()?;
        Some(inside.to_str()?.to_owned())
    });
    let inside = inside.as_deref().unwrap_or_default();
    let all = [inside, &plain, plain.trim_start_matches('/'), image];
    all.into_iter().find(|image| is_there(image)).map(str::to_owned)
}

/// Removes lines that repeat an earlier one and returns their number.
fn drop_repeated(text: &Text, paths: &mut Paths, labels: &mut Vec<String>, lines: &[usize]) -> Result<usize> {
    let mut order: Vec<u32> = (0..labels.len() as u32).collect();
    order.sort_by_key(|&i| paths.get(i as usize));
    let mut is_repeated = vec![false; labels.len()];
    for pair in order.windows(2) {
        let [first, second] = [pair[0] as usize, pair[1] as usize];
        if paths.get(first) != paths.get(second) {
            continue;
        }
        if labels[first] != labels[second] {
            let (image, [a, b]) = (paths.get(first), [first, second].map(|i| &labels[i]));
            let what = format!("expected one label of {image}, found {b}, and {a} in line {}", lines[first]);
            return Err(text.error(lines[second], what));
        }
        is_repeated[second] = true;
    }
    let num = is_repeated.iter().filter(|is_repeated| **is_repeated).count();
    if num > 0 {
        let mut kept = Paths::default();
        let all = paths.iter().zip(&is_repeated).filter(|(_, is_repeated)| !**is_repeated);
        all.for_each(|(path, _)| kept.push(path));
        *paths = kept;
        let mut repeated = is_repeated.into_iter();
        labels.retain(|_| !repeated.next().unwrap_or(false));
    }
    Ok(num)
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
        read_image_file(&self.path(index)).map(Some)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.path(index).metadata().ok().map(|data| data.len())
    }
}
