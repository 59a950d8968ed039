//! Export of a data set into another format.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use image::ImageFormat;
use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use crate::data::decode::is_image;
use crate::data::{Dataset, Fingerprint, encode_image};
use crate::error::{Error, Result};
use crate::files::{NewFolders, folder_of, hex};

/// The images of a data set, in order, to be written in another format. JPEG and PNG images keep their stored bytes;
/// all others are encoded as PNG.
pub struct Export<'a> {
    dataset: &'a dyn Dataset,
    progress: &'a mut dyn FnMut(usize),
    stop: Option<&'a AtomicBool>,
    /// Images that are written already.
    num_done: usize,
}

/// An image to be written.
pub(super) struct ExportImage<'a> {
    /// Label of the person.
    pub label: u32,
    /// Name of the person in the data set.
    pub identity: &'a str,
    /// File name with the extension of its format; `PERSON_NUMBER` as in LFW if the data set has no file names.
    pub file_name: String,
    pub bytes: Vec<u8>,
}

impl ExportImage<'_> {
    /// `PERSON/IMAGE`.
    pub fn path(&self) -> String {
        format!("{}/{}", self.identity, self.file_name)
    }
}

impl<'a> Export<'a> {
    /// Returns an export of `dataset`; `progress` receives the number of images done.
    pub fn new(dataset: &'a dyn Dataset, progress: &'a mut dyn FnMut(usize)) -> Self {
        Self { dataset, progress, stop: None, num_done: 0 }
    }

    /// Returns the export with a stop flag: once `stop` is set, it ends with an error. Of a folder or of shards, what
    /// was written stays for the same export to go on with; of other formats it is removed.
    pub fn stopped_by(self, stop: &'a AtomicBool) -> Self {
        Self { stop: Some(stop), ..self }
    }

    /// Returns the images whose file names differ from another one's of the same person in the extension alone.
    pub(super) fn with_shared_stems(&self) -> HashSet<usize> {
        let of_image = |index: usize| {
            let name = self.dataset.file_name(index)?;
            let mut hasher = DefaultHasher::new();
            (self.dataset.label(index), Path::new(&name).file_stem()?).hash(&mut hasher);
            Some((hasher.finish(), index))
        };
        let mut stems: Vec<(u64, usize)> = (0..self.len()).filter_map(of_image).collect();
        stems.sort_unstable();
        let shared = stems.chunk_by(|a, b| a.0 == b.0).filter(|same| same.len() > 1);
        shared.flatten().map(|(_, index)| *index).collect()
    }

    /// Passes over the first `num` images, which an interrupted export has written.
    pub(super) fn go_on_after(&mut self, num: usize) {
        self.num_done = num;
    }

    pub(super) fn len(&self) -> usize {
        self.dataset.len()
    }

    /// Describes what is exported and how, to recognise what an interrupted export has written.
    pub(super) fn key(&self, how: &str) -> Result<String> {
        let fingerprint = Fingerprint::of(self.dataset);
        let json = serde_json::to_string(&fingerprint).map_err(|e| Error::Config(e.to_string()))?;
        Ok(format!("maskinv {} {how}\n{}", env!("CARGO_PKG_VERSION"), hex(&Sha256::digest(json))))
    }

    pub(super) fn num_identities(&self) -> usize {
        self.dataset.num_identities()
    }

    pub(super) fn identity_names(&self) -> Vec<String> {
        self.dataset.identity_names()
    }

    /// Returns the range of each person's images, if images are grouped by person in the order of the labels.
    pub(super) fn ranges(&self) -> Option<Vec<Range<usize>>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for index in 0..self.len() {
            match (self.dataset.label(index) as usize, ranges.len()) {
                (label, num) if label == num => ranges.push(index..index + 1),
                (label, num) if label + 1 == num => ranges[label].end = index + 1,
                _ => return None,
            }
        }
        Some(ranges)
    }

    /// Passes each image to `take`.
    pub(super) fn for_each(&mut self, take: &mut dyn FnMut(ExportImage) -> Result<()>) -> Result<()> {
        let names = self.identity_names();
        let mut counts = vec![0; names.len()];
        for index in 0..self.len() {
            if self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                let what = std::io::Error::new(ErrorKind::Interrupted, "interrupted, as requested; nothing is written");
                return Err(Error::io(Path::new("conversion"))(what));
            }
            let label = self.dataset.label(index);
            let identity = names[label as usize].as_str();
            counts[label as usize] += 1;
            let number = counts[label as usize];
            if index < self.num_done {
                continue;
            }
            let (bytes, format) = self.image(index)?;
            let extensions = format.extensions_str();
            let file_name = match self.dataset.file_name(index) {
                Some(name) if extensions.iter().any(|x| name.to_ascii_lowercase().ends_with(&format!(".{x}"))) => name,
                // The extension is not that of the encoded format.
                Some(name) if is_image(name.as_ref()) => {
                    Path::new(&name).with_extension(extensions[0]).display().to_string()
                }
                Some(name) => format!("{name}.{}", extensions[0]),
                None => format!("{identity}_{number:04}.{}", extensions[0]),
            };
            take(ExportImage { label, identity, file_name, bytes })?;
            (self.progress)(index + 1);
        }
        Ok(())
    }

    fn image(&self, index: usize) -> Result<(Vec<u8>, ImageFormat)> {
        if let Some(bytes) = self.dataset.encoded(index)?
            && let Ok(format @ (ImageFormat::Jpeg | ImageFormat::Png)) = image::guess_format(&bytes)
        {
            return Ok((bytes, format));
        }
        let encoded = encode_image(&self.dataset.get(index)?.image, ImageFormat::Png);
        let bytes = encoded.map_err(|what| Error::Image { path: self.dataset.name(index).into(), what })?;
        Ok((bytes, ImageFormat::Png))
    }
}

/// A file of an export, which gets its name once it is complete. Dropping it removes it, and the folders made for it.
pub(super) struct Output {
    file: NamedTempFile,
    path: PathBuf,
    /// Removed if they are empty, so after the file.
    _created: NewFolders,
}

impl Output {
    /// Returns a temporary file to be moved to `path`; creates its folder.
    pub fn new(path: &Path) -> Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(Error::Data { path: path.to_owned(), what: "exists already".to_owned() });
        }
        let created = NewFolders::create(folder_of(path))?;
        Ok(Self { file: crate::files::temporary(path)?, path: path.to_owned(), _created: created })
    }

    pub fn as_file(&self) -> &File {
        self.file.as_file()
    }

    /// Syncs the finished file to disk and moves it to its path, unless something exists there by now.
    pub fn finish(self) -> Result<()> {
        self.file.as_file().sync_all().map_err(Error::io(&self.path))?;
        self.file.persist_noclobber(&self.path).map(drop).map_err(|e| Error::io(&self.path)(e.error))
    }
}
