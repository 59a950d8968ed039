//! A data set on its way into another format.

use std::io::Cursor;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use image::ImageFormat;
use tempfile::NamedTempFile;

use crate::data::Dataset;
use crate::data::decode::is_image;
use crate::error::{Error, Result};

/// The images of a data set in their order, encoded as they are stored where that is JPEG or PNG, else as PNG.
pub struct Export<'a> {
    dataset: &'a dyn Dataset,
    progress: &'a mut dyn FnMut(usize),
    stop: Option<&'a AtomicBool>,
}

/// An image on its way.
pub(super) struct ExportImage<'a> {
    /// Whose face it is.
    pub label: u32,
    /// What the set calls the person.
    pub identity: &'a str,
    /// A name with the extension of its format; of LFW's kind where the set names no images.
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
    /// Returns the images of `dataset`; `progress` receives how many are done.
    pub fn new(dataset: &'a dyn Dataset, progress: &'a mut dyn FnMut(usize)) -> Self {
        Self { dataset, progress, stop: None }
    }

    /// Returns the same images, which end with an error once `stop` is set: what was begun is taken back.
    pub fn stopped_by(self, stop: &'a AtomicBool) -> Self {
        Self { stop: Some(stop), ..self }
    }

    pub(super) fn len(&self) -> usize {
        self.dataset.len()
    }

    pub(super) fn num_identities(&self) -> usize {
        self.dataset.num_identities()
    }

    pub(super) fn identity_names(&self) -> Vec<String> {
        self.dataset.identity_names()
    }

    /// The images of each person, if they follow each other in the order of the labels.
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

    /// Gives each image to `take`.
    pub(super) fn for_each(&mut self, take: &mut dyn FnMut(ExportImage) -> Result<()>) -> Result<()> {
        let names = self.identity_names();
        let mut counts = vec![0; names.len()];
        for index in 0..self.len() {
            if self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
                return Err(Error::io(Path::new("conversion"))(std::io::ErrorKind::Interrupted.into()));
            }
            let label = self.dataset.label(index);
            let identity = names[label as usize].as_str();
            counts[label as usize] += 1;
            let number = counts[label as usize];
            let (bytes, format) = self.image(index)?;
            let extensions = format.extensions_str();
            let file_name = match self.dataset.file_name(index) {
                Some(name) if extensions.iter().any(|x| name.to_ascii_lowercase().ends_with(&format!(".{x}"))) => name,
                // Of another format than its name says, or than it was.
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
        let mut bytes = Vec::new();
        let written = self.dataset.get(index)?.image.write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png);
        written.map_err(|e| Error::Image { path: self.dataset.name(index).into(), what: e.to_string() })?;
        Ok((bytes, ImageFormat::Png))
    }
}

/// Makes a temporary file what it was begun for, unless something is there by now.
pub(super) fn finish(file: NamedTempFile, path: &Path) -> Result<()> {
    file.persist_noclobber(path).map(drop).map_err(|e| Error::io(path)(e.error))
}

/// Returns a file that becomes `path` once it is whole; makes its folder.
pub(super) fn temporary(path: &Path) -> Result<NamedTempFile> {
    if path.exists() {
        return Err(Error::Data { path: path.to_owned(), what: "exists already".to_owned() });
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    crate::files::temporary(path)
}
