//! A data set in a folder with one sub-folder of aligned crops per person.

use std::ffi::OsString;
use std::fs::DirEntry;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::export::Export;
use crate::data::decode::{is_image, read_bytes};
use crate::data::sample::Dataset;
use crate::error::{Error, Result};
use crate::files::{UnfinishedFolder, remove_if_there};

/// Files that desktop environments leave in the folders they show.
const JUNK: [&str; 3] = [".DS_Store", "Thumbs.db", "desktop.ini"];

/// A folder of identities as a [`Dataset`]; labels follow the byte order of the identities' names.
///
/// Every image has [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS): the crops are assumed to be aligned to the
/// 112x112 template.
#[derive(Clone, Debug)]
pub struct FaceFolder {
    root: PathBuf,
    /// Names, in byte order.
    identities: Vec<String>,
    /// Grouped by identity, and in byte order of the file names within each.
    images: Vec<Image>,
}

#[derive(Clone, Debug)]
struct Image {
    file_name: OsString,
    label: u32,
}

impl FaceFolder {
    /// Lists the images `root/<identity>/<image>`, named `*.jpg`, `jpeg`, `png`, `bmp`, `webp`, `pgm` or `ppm` in upper
    /// or lower case.
    ///
    /// Files beside the identities that are not images (a licence, a pair list) are ignored, and so are `.DS_Store`,
    /// `Thumbs.db` and `desktop.ini` anywhere. No image is opened.
    ///
    /// # Errors
    /// [`Error::Io`] when a folder cannot be read; [`Error::Data`] when there are no identities, an identity has no
    /// image or contains anything else, or there are images or hidden folders where identities belong.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref().to_owned();
        let mut folder = Self { root, identities: Vec::new(), images: Vec::new() };
        for name in identity_names(&folder.root)? {
            let label = u32::try_from(folder.identities.len())
                .map_err(|_| data_error(&folder.root, format!("expected at most {} identities", u32::MAX)))?;
            let files = image_names(&folder.root.join(&name))?;
            folder.identities.push(name);
            folder.images.extend(files.into_iter().map(|file_name| Image { file_name, label }));
        }
        if folder.identities.is_empty() {
            return Err(data_error(&folder.root, "expected a folder per identity, found none".to_owned()));
        }
        Ok(folder)
    }

    /// Path of the folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Path of image `index`.
    ///
    /// # Panics
    /// When `index` is not below [`Dataset::len`].
    pub fn path(&self, index: usize) -> PathBuf {
        let image = &self.images[index];
        self.root.join(&self.identities[image.label as usize]).join(&image.file_name)
    }
}

impl Dataset for FaceFolder {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn num_identities(&self) -> usize {
        self.identities.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.images[index].label
    }

    fn name(&self, index: usize) -> String {
        self.path(index).display().to_string()
    }

    fn identity_name(&self, label: u32) -> String {
        self.identities[label as usize].clone()
    }

    fn file_name(&self, index: usize) -> Option<String> {
        self.images[index].file_name.to_str().map(str::to_owned)
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        read_bytes(&self.path(index)).map(Some)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.path(index).metadata().ok().map(|data| data.len())
    }
}

/// Writes a folder of identities, with the images as [`Export`] encodes and names them. An interrupted export leaves an
/// [`UnfinishedFolder`], with which the same export goes on.
///
/// # Errors
/// When an image cannot be read, a name is not a valid file name, or a file exists or cannot be written; `folder` is
/// then not created.
pub fn write_folder(export: &mut Export, folder: &Path) -> Result<()> {
    let unfinished = UnfinishedFolder::open(folder, &export.key("to a folder")?)?;
    match write_into(export, &unfinished, folder) {
        Ok(()) => unfinished.finish(),
        Err(error) => Err(unfinished.discard_for(error)),
    }
}

fn write_into(export: &mut Export, unfinished: &UnfinishedFolder, folder: &Path) -> Result<()> {
    let root = unfinished.path();
    let mut num_done = 0;
    for person in unfinished.entries()? {
        num_done += std::fs::read_dir(root.join(&person)).map_err(Error::io(folder))?.count();
    }
    // The last image may be cut: it is written again.
    let num_done = num_done.saturating_sub(1);
    export.go_on_after(num_done);
    let mut is_first = true;
    export.for_each(&mut |image| {
        let parts = [Path::new(image.identity), Path::new(&image.file_name)];
        let is_name = |part: &Path| part.file_name() == Some(part.as_os_str()) && !part.as_os_str().is_empty();
        if let Some(part) = parts.iter().find(|part| !is_name(part)) {
            return Err(data_error(folder, format!("expected a name for a file or folder, found {}", part.display())));
        }
        let path = root.join(parts[0]);
        std::fs::create_dir_all(&path).map_err(Error::io(&path))?;
        let path = path.join(parts[1]);
        if std::mem::take(&mut is_first) {
            remove_if_there(&path)?;
        }
        let written = std::fs::File::create_new(&path).and_then(|mut file| file.write_all(&image.bytes));
        written.map_err(Error::io(&folder.join(parts[0]).join(parts[1])))
    })
}

fn data_error(path: &Path, what: String) -> Error {
    Error::Data { path: path.to_owned(), what }
}

/// Entries of a folder without desktop junk, each with whether it is a folder.
fn entries(path: &Path) -> Result<Vec<(DirEntry, bool)>> {
    let mut result = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?;
        if JUNK.iter().any(|j| entry.file_name() == *j) {
            continue;
        }
        let mut kind = entry.file_type().map_err(Error::io(path))?;
        if kind.is_symlink() {
            // Subsets are often made of symbolic links, to images or to entire identities.
            kind = std::fs::metadata(entry.path()).map_err(Error::io(&entry.path()))?.file_type();
        }
        result.push((entry, kind.is_dir()));
    }
    Ok(result)
}

/// Names of the sub-folders, sorted.
fn identity_names(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (entry, is_folder) in entries(root)? {
        let name = entry.file_name().into_string();
        match (name, is_folder) {
            (Ok(name), true) if name.starts_with('.') => {
                return Err(data_error(root, format!("expected a folder per identity, found hidden folder {name}")));
            }
            (Ok(name), true) => names.push(name),
            (Err(name), true) => {
                let name = name.display();
                return Err(data_error(root, format!("expected a folder name in UTF-8, found {name}")));
            }
            (_, false) if is_image(&entry.file_name()) => {
                let name = entry.file_name();
                let what = format!("expected a folder per identity, found image {}", name.display());
                return Err(data_error(root, what));
            }
            (_, false) => {}
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Names of an identity's images, sorted; never empty.
fn image_names(folder: &Path) -> Result<Vec<OsString>> {
    let mut names = Vec::new();
    for (entry, is_folder) in entries(folder)? {
        let name = entry.file_name();
        if is_folder {
            return Err(data_error(folder, format!("expected images, found folder {}", name.display())));
        }
        if !is_image(&name) {
            return Err(data_error(folder, format!("expected images, found {}", name.display())));
        }
        names.push(name);
    }
    if names.is_empty() {
        return Err(data_error(folder, "expected images, found none".to_owned()));
    }
    names.sort_unstable();
    Ok(names)
}
