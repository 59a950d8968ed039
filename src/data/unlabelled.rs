//! Images without labels, alone or beside those of a labelled data set.

use std::path::Path;
use std::sync::Arc;

use super::{Dataset, ImageFiles, OnBroken, Sample, open_source_with};
use crate::error::Result;

/// Name of those whom nobody has named.
const NOBODY: &str = "(no label)";

/// A data set in which some images have no label, after those that have one. They count as one more identity, which is
/// no class of the margin loss.
pub struct Unlabelled {
    labelled: Option<Arc<dyn Dataset>>,
    others: Arc<dyn Dataset>,
}

impl Unlabelled {
    /// Returns the images of `others`, whose labels are ignored.
    pub fn new(others: Arc<dyn Dataset>) -> Self {
        Self { labelled: None, others }
    }

    /// Returns the images of `labelled`, then those of `others`, whose labels are ignored.
    pub fn beside(labelled: Arc<dyn Dataset>, others: Arc<dyn Dataset>) -> Self {
        Self { labelled: Some(labelled), others }
    }

    /// Opens images to learn from without labels: a data set in any format, or a folder of image files in any
    /// sub-folders.
    ///
    /// # Errors
    /// When it cannot be read, or there is no image.
    pub fn open(path: &Path, on_broken: OnBroken) -> Result<Arc<dyn Dataset>> {
        let error = match open_source_with(path, on_broken) {
            Ok(source) => return Ok(source.images),
            Err(error) if path.is_dir() => error,
            Err(error) => return Err(error),
        };
        match ImageFiles::find(path)? {
            (files, _) if files.is_empty() => Err(error),
            (files, _) => Ok(Arc::new(ImageFiles::new(path, files))),
        }
    }

    fn num_labelled(&self) -> usize {
        self.labelled.as_ref().map_or(0, |labelled| labelled.len())
    }

    /// Returns the set that image `index` is in, and its index there.
    fn at(&self, index: usize) -> (&dyn Dataset, usize) {
        match &self.labelled {
            Some(labelled) if index < labelled.len() => (labelled.as_ref(), index),
            _ => (self.others.as_ref(), index - self.num_labelled()),
        }
    }
}

impl Dataset for Unlabelled {
    fn len(&self) -> usize {
        self.num_labelled() + self.others.len()
    }

    fn num_identities(&self) -> usize {
        self.num_classes() + 1
    }

    fn num_classes(&self) -> usize {
        self.labelled.as_ref().map_or(0, |labelled| labelled.num_classes())
    }

    fn num_skipped_identities(&self) -> usize {
        self.labelled.as_ref().map_or(0, |labelled| labelled.num_skipped_identities())
    }

    fn label(&self, index: usize) -> u32 {
        self.class(index).unwrap_or(self.num_classes() as u32)
    }

    fn class(&self, index: usize) -> Option<u32> {
        self.labelled.as_ref().filter(|labelled| index < labelled.len())?.class(index)
    }

    fn name(&self, index: usize) -> String {
        let (set, index) = self.at(index);
        set.name(index)
    }

    fn identity_name(&self, label: u32) -> String {
        match &self.labelled {
            Some(labelled) if (label as usize) < labelled.num_classes() => labelled.identity_name(label),
            _ => NOBODY.to_owned(),
        }
    }

    fn file_name(&self, index: usize) -> Option<String> {
        let (set, index) = self.at(index);
        set.file_name(index)
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        let (set, index) = self.at(index);
        set.encoded(index)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        let (set, index) = self.at(index);
        set.encoded_len(index)
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let (set, inside) = self.at(index);
        Ok(Sample { label: self.label(index), ..set.get(inside)? })
    }
}
