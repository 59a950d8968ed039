//! A data set as a folder of identities: one sub-folder per person, the person's aligned crops in it.

use std::ffi::{OsStr, OsString};
use std::fs::DirEntry;
use std::path::{Path, PathBuf};

use super::decode::{is_image, read_face};
use super::sample::{ALIGNED_LANDMARKS, Dataset, Sample};
use crate::error::{Error, Result};

/// Files that desktops leave in every folder they show.
const JUNK: [&str; 3] = [".DS_Store", "Thumbs.db", "desktop.ini"];

/// A folder of identities as a [`Dataset`]; labels follow the byte order of the identities' names.
///
/// Every image has [`ALIGNED_LANDMARKS`]: the crops are taken to be aligned to the 112x112 template.
#[derive(Clone, Debug)]
pub struct FaceFolder {
    root: PathBuf,
    /// In byte order of the names.
    identities: Vec<Identity>,
    /// Grouped by identity; within one in byte order of the names.
    images: Vec<Image>,
    num_skipped: usize,
}

/// Which identities of a folder to use; the default uses all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FolderFilter {
    /// Leave out identities with fewer images than this.
    pub min_images: usize,
    /// Use only identities with these names, all of which must be there; `None` for every identity of the folder.
    pub identities: Option<Vec<String>>,
}

#[derive(Clone, Debug)]
struct Identity {
    name: String,
    /// Index of its first image.
    first: usize,
}

#[derive(Clone, Debug)]
struct Image {
    file_name: OsString,
    label: u32,
}

impl FaceFolder {
    /// Lists a folder: `root/<identity>/<image>`, with images named `*.jpg`, `jpeg`, `png`, `bmp`, `webp`, `pgm` or
    /// `ppm` in upper or lower case.
    ///
    /// Files beside the identities that are not images (a licence, a pair list) are left alone, and so are `.DS_Store`,
    /// `Thumbs.db` and `desktop.ini` anywhere. No image is opened.
    ///
    /// # Errors
    /// [`Error::Io`] when a folder cannot be read; [`Error::Data`] when there are no identities, an identity has no
    /// image or holds anything else, or there are images or hidden folders where identities belong.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        Self::open_filtered(root, &FolderFilter::default())
    }

    /// Lists the identities of a folder that a filter lets through; labels count only these.
    ///
    /// # Errors
    /// As [`FaceFolder::open`], and [`Error::Data`] when the folder lacks an identity that the filter names or the
    /// filter leaves none. Folders of identities that the filter does not name are not looked into.
    pub fn open_filtered(root: impl AsRef<Path>, filter: &FolderFilter) -> Result<Self> {
        let root = root.as_ref().to_owned();
        let mut names = identity_names(&root)?;
        let num_found = names.len();
        if let Some(wanted) = &filter.identities {
            let mut wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
            wanted.sort_unstable();
            if let Some(missing) = wanted.iter().find(|w| names.binary_search_by(|n| n.as_str().cmp(w)).is_err()) {
                return Err(data_error(&root, format!("expected a folder of identity {missing}, found none")));
            }
            names.retain(|n| wanted.binary_search(&n.as_str()).is_ok());
        }
        let mut folder = Self { root, identities: Vec::new(), images: Vec::new(), num_skipped: 0 };
        for name in names {
            let files = image_names(&folder.root.join(&name))?;
            if files.len() < filter.min_images {
                folder.num_skipped += 1;
                continue;
            }
            let label = u32::try_from(folder.identities.len())
                .map_err(|_| data_error(&folder.root, format!("expected at most {} identities", u32::MAX)))?;
            folder.identities.push(Identity { name, first: folder.images.len() });
            folder.images.extend(files.into_iter().map(|file_name| Image { file_name, label }));
        }
        if folder.identities.is_empty() {
            let what = match num_found {
                0 => "expected a folder per identity, found none".to_owned(),
                n => format!("the filter leaves none of {n} identities (at least {} images each)", filter.min_images),
            };
            return Err(data_error(&folder.root, what));
        }
        Ok(folder)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The name of the identity with a label, which is its folder's.
    ///
    /// # Panics
    /// When `label` is not below [`Dataset::num_identities`].
    pub fn identity_name(&self, label: u32) -> &str {
        &self.identities[label as usize].name
    }

    /// The path of image `index`.
    ///
    /// # Panics
    /// When `index` is not below [`Dataset::len`].
    pub fn path(&self, index: usize) -> PathBuf {
        let image = &self.images[index];
        self.root.join(self.identity_name(image.label)).join(&image.file_name)
    }

    /// The index of the image that pair lists call `identity number`: `<identity>/<identity>_NNNN.<extension>`, with
    /// any number of leading zeros. `None` when there is no such image; the first in byte order when there are more.
    pub fn find(&self, identity: &str, number: u32) -> Option<usize> {
        let label = self.identities.binary_search_by(|i| i.name.as_str().cmp(identity)).ok()?;
        let first = self.identities[label].first;
        let end = self.identities.get(label + 1).map_or(self.images.len(), |next| next.first);
        let is_it = |image: &Image| image_number(&image.file_name, identity) == Some(number);
        self.images[first..end].iter().position(is_it).map(|offset| first + offset)
    }
}

impl Dataset for FaceFolder {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn num_identities(&self) -> usize {
        self.identities.len()
    }

    fn num_skipped_identities(&self) -> usize {
        self.num_skipped
    }

    fn label(&self, index: usize) -> u32 {
        self.images[index].label
    }

    fn name(&self, index: usize) -> String {
        self.path(index).display().to_string()
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let image = read_face(&self.path(index))?;
        Ok(Sample { image, label: self.images[index].label, landmarks: ALIGNED_LANDMARKS })
    }
}

fn data_error(path: &Path, what: String) -> Error {
    Error::Data { path: path.to_owned(), what }
}

/// The entries of a folder but for desktop junk.
fn entries(path: &Path) -> Result<Vec<(DirEntry, bool)>> {
    let mut result = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?;
        if JUNK.iter().any(|j| entry.file_name() == *j) {
            continue;
        }
        let mut kind = entry.file_type().map_err(Error::io(path))?;
        if kind.is_symlink() {
            // Subsets are often made of links, to images or to whole identities.
            kind = std::fs::metadata(entry.path()).map_err(Error::io(&entry.path()))?.file_type();
        }
        result.push((entry, kind.is_dir()));
    }
    Ok(result)
}

/// The names of the sub-folders, sorted.
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

/// The names of the images of an identity, sorted; not empty.
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

/// `7` of `Jane_Doe_0007.jpg` in the folder of `Jane_Doe`.
fn image_number(file_name: &OsStr, identity: &str) -> Option<u32> {
    let stem = Path::new(file_name).file_stem()?.to_str()?;
    let digits = stem.strip_prefix(identity)?.strip_prefix('_')?;
    if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}
