//! A data set in a folder with one sub-folder of aligned crops per person.

use std::ffi::{OsStr, OsString};
use std::fs::DirEntry;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::export::Export;
use crate::data::dataset::Dataset;
use crate::data::decode::{is_image, read_image_file};
use crate::error::{Error, Result};
use crate::files::{UnfinishedFolder, remove_if_there};

/// Entries that systems leave in folders, beside those whose name starts with a dot.
const JUNK: [&str; 7] =
    ["Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"];

/// Most folders that each hold only the next one, as archives pack a data set.
const MAX_WRAPPERS: usize = 4;
/// Sub-folders that are looked into to tell people from splits.
const MAX_LOOKED_INTO: usize = 8;

/// Returns whether an entry of a folder is hidden or of the system: nobody put it there as data.
pub fn is_junk(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".") || JUNK.iter().any(|junk| name == *junk)
}

/// A folder of identities as a [`Dataset`]; labels follow the byte order of the identities' names.
///
/// ```no_run
/// use maskinv::data::{Dataset, FaceFolder};
///
/// # fn main() -> maskinv::Result<()> {
/// let faces = FaceFolder::open("faces")?;
/// println!("{} images of {} people", faces.len(), faces.num_identities());
/// let first = faces.get(0)?.image;
/// # Ok(())
/// # }
/// ```
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
    notes: Vec<String>,
}

#[derive(Clone, Debug)]
struct Image {
    file_name: OsString,
    label: u32,
}

impl FaceFolder {
    /// Lists the images `root/<identity>/<image>`, named `*.jpg`, `jpeg`, `jpe`, `jfif`, `png`, `bmp`, `webp`, `pgm`,
    /// `ppm` or `pnm` in upper or lower case. Identities are in byte order of their names or, if all names are whole
    /// numbers, in the order of the numbers.
    ///
    /// Files beside the identities that are not images (a licence, a pair list) are ignored, and so are hidden entries
    /// and what systems leave (`Thumbs.db`, `__MACOSX`, `@eaDir`, `lost+found`) anywhere. Other files beside a person's
    /// images and people without images are left out and counted in [`Self::notes`]. No image is opened.
    ///
    /// # Errors
    /// [`Error::Io`] when a folder cannot be read; [`Error::Data`] when no identity has images, a folder lies among a
    /// person's images, or images lie where identities belong.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref().to_owned();
        let mut folder = Self { root, identities: Vec::new(), images: Vec::new(), notes: Vec::new() };
        let (mut others, mut empty) = (Vec::new(), Vec::new());
        for name in identity_names(&folder.root)? {
            let label = u32::try_from(folder.identities.len())
                .map_err(|_| data_error(&folder.root, format!("expected at most {} identities", u32::MAX)))?;
            let files = image_names(&folder.root.join(&name), &mut others)?;
            if files.is_empty() {
                empty.push(name);
                continue;
            }
            folder.identities.push(name);
            folder.images.extend(files.into_iter().map(|file_name| Image { file_name, label }));
        }
        if folder.identities.is_empty() {
            let found = if empty.is_empty() { "none" } else { "folders without images" };
            return Err(data_error(&folder.root, format!("expected a folder per identity, found {found}")));
        }
        others.sort();
        if let [first, ..] = &others[..] {
            let num = others.len();
            folder.notes.push(format!("{num} files that are no images are left out, such as {}", first.display()));
        }
        if let [first, ..] = &empty[..] {
            folder.notes.push(format!("{} people without images are left out, such as {first}", empty.len()));
        }
        Ok(folder)
    }

    /// Returns what is left out.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Path of the folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Path of image `index`; none if there is no such image.
    pub fn path(&self, index: usize) -> Option<PathBuf> {
        self.images.get(index).map(|image| self.path_of(image))
    }

    fn path_of(&self, image: &Image) -> PathBuf {
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
        self.path_of(&self.images[index]).display().to_string()
    }

    fn identity_name(&self, label: u32) -> String {
        self.identities[label as usize].clone()
    }

    fn file_name(&self, index: usize) -> Option<String> {
        self.images[index].file_name.to_str().map(str::to_owned)
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        read_image_file(&self.path_of(&self.images[index])).map(Some)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.path_of(&self.images[index]).metadata().ok().map(|data| data.len())
    }
}

/// Writes a folder of identities, with the images as [`Export`] encodes and names them. An interrupted export leaves an
/// `UnfinishedFolder`, with which the same export goes on.
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
        let files = std::fs::read_dir(root.join(&person)).map_err(Error::io(folder))?;
        // Systems leave notes of their own beside what was written.
        num_done += files.flatten().filter(|file| !is_junk(&file.file_name())).count();
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
        match std::fs::create_dir(&path) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(Error::io(&folder.join(parts[0]))(e)),
            _ => {}
        }
        let path = path.join(parts[1]);
        if std::mem::take(&mut is_first) {
            remove_if_there(&path)?;
        }
        let written = std::fs::File::create_new(&path).and_then(|mut file| file.write_all(&image.bytes));
        written.map_err(|e| match e.kind() {
            ErrorKind::AlreadyExists => {
                let what = format!(
                    "expected a file name of its own for each image, found {} twice (what is neither JPEG nor PNG \
                     becomes PNG): write shards or another file",
                    image.path()
                );
                data_error(folder, what)
            }
            _ => Error::io(&folder.join(parts[0]).join(parts[1]))(e),
        })
    })
}

fn data_error(path: &Path, what: String) -> Error {
    Error::Data { path: path.to_owned(), what }
}

/// What an entry of a folder is, behind links.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Folder,
    File,
    /// A pipe, a socket, a link to nothing.
    Other,
}

/// Entries of a folder without junk.
fn entries(path: &Path) -> Result<Vec<(DirEntry, Kind)>> {
    let mut result = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?;
        if is_junk(&entry.file_name()) {
            continue;
        }
        let mut kind = entry.file_type().map_err(Error::io(path))?;
        if kind.is_symlink() {
            // Subsets are often made of symbolic links, to images or to entire identities.
            kind = match std::fs::metadata(entry.path()) {
                Err(e) if e.kind() == ErrorKind::NotFound => kind,
                data => data.map_err(Error::io(&entry.path()))?.file_type(),
            };
        }
        let kind = match (kind.is_dir(), kind.is_file()) {
            (true, _) => Kind::Folder,
            (_, true) => Kind::File,
            _ => Kind::Other,
        };
        result.push((entry, kind));
    }
    Ok(result)
}

fn is_image_file((entry, kind): &(DirEntry, Kind)) -> bool {
    *kind == Kind::File && is_image(&entry.file_name())
}

/// Names of the sub-folders, sorted.
fn identity_names(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (entry, kind) in entries(root)? {
        match (entry.file_name().into_string(), kind) {
            (Ok(name), Kind::Folder) => names.push(name),
            (Err(name), Kind::Folder) => {
                let name = name.display();
                return Err(data_error(root, format!("expected a folder name in UTF-8, found {name}")));
            }
            (_, Kind::File) if is_image(&entry.file_name()) => {
                let name = entry.file_name();
                let what = format!(
                    "expected a folder per identity, found image {}: for images of several people in one folder, give \
                     a list of images with labels",
                    name.display()
                );
                return Err(data_error(root, what));
            }
            _ => {}
        }
    }
    // As the numbers that other formats have, so that the same people are in the same order in all of them.
    let numbers: Option<Vec<u64>> = names.iter().map(|name| name.parse().ok()).collect();
    match numbers {
        Some(_) => names.sort_by_key(|name| (name.parse::<u64>().ok(), name.clone())),
        None => names.sort_unstable(),
    }
    Ok(names)
}

/// Names of an identity's images, sorted; adds the paths of other files to `others`.
fn image_names(folder: &Path, others: &mut Vec<PathBuf>) -> Result<Vec<OsString>> {
    let mut names = Vec::new();
    for (entry, kind) in entries(folder)? {
        let name = entry.file_name();
        if kind == Kind::Folder {
            let what = format!(
                "expected images, found folder {}: give the path of the folder that holds the people",
                name.display()
            );
            return Err(data_error(folder, what));
        }
        match kind == Kind::File && is_image(&name) {
            true => names.push(name),
            false => others.push(entry.path()),
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Where the people are in `folder`: there, or one or more levels down, if there is one folder in it that holds
/// folders, as archives are packed.
///
/// # Errors
/// When a folder cannot be read, or several folders hold folders, as `train` and `val` do.
pub(super) fn find_people(folder: &Path) -> Result<PathBuf> {
    let mut folder = folder.to_owned();
    for _ in 0..MAX_WRAPPERS {
        let all = entries(&folder)?;
        if all.iter().any(is_image_file) {
            return Ok(folder);
        }
        let folders: Vec<PathBuf> =
            all.iter().filter(|(_, kind)| *kind == Kind::Folder).map(|(entry, _)| entry.path()).collect();
        let mut of_folders = Vec::new();
        // A few tell: there may be a hundred thousand people.
        for path in folders.iter().take(MAX_LOOKED_INTO) {
            let inside = entries(path)?;
            if !inside.iter().any(is_image_file) && inside.iter().any(|(_, kind)| *kind == Kind::Folder) {
                of_folders.push(path);
            }
        }
        match &of_folders[..] {
            [only] if folders.len() == 1 => folder = (*only).clone(),
            [first, second, ..] if of_folders.len() == folders.len().min(MAX_LOOKED_INTO) => {
                let [first, second] = [first, second].map(|path| path.file_name().unwrap_or_default().display());
                let what =
                    format!("expected a folder per identity, found folders of folders: give one of {first}, {second}");
                return Err(data_error(&folder, what));
            }
            _ => return Ok(folder),
        }
    }
    Ok(folder)
}
