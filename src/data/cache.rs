//! A data set kept decoded in memory.

use super::{Dataset, OnBroken, Sample};
use crate::error::Result;
use crate::parallel;

/// All samples of a data set, decoded: 37 kB per face.
pub struct Cached<D> {
    inner: D,
    /// `None` where an image is broken.
    samples: Vec<Option<Sample>>,
}

impl<D: Dataset> Cached<D> {
    /// Decodes every image of `inner`, in parallel.
    ///
    /// # Errors
    /// When an image cannot be decoded and broken ones are not skipped.
    pub fn new(inner: D, on_broken: OnBroken) -> Result<Self> {
        let sample = |i| match (inner.get(i), on_broken) {
            (Err(error), OnBroken::Fail) => Err(error),
            (result, _) => Ok(result.ok()),
        };
        let samples = parallel::try_map(inner.len(), sample)?;
        Ok(Self { inner, samples })
    }
}

impl<D: Dataset> Dataset for Cached<D> {
    fn len(&self) -> usize {
        self.samples.len()
    }

    fn num_identities(&self) -> usize {
        self.inner.num_identities()
    }

    fn num_skipped_identities(&self) -> usize {
        self.inner.num_skipped_identities()
    }

    fn label(&self, index: usize) -> u32 {
        self.inner.label(index)
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(index)
    }

    fn identity_name(&self, label: u32) -> String {
        self.inner.identity_name(label)
    }

    fn file_name(&self, index: usize) -> Option<String> {
        self.inner.file_name(index)
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        self.inner.encoded(index)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.inner.encoded_len(index)
    }

    fn get(&self, index: usize) -> Result<Sample> {
        match self.samples.get(index) {
            Some(Some(sample)) => Ok(sample.clone()),
            // A broken image fails again with its error.
            _ => self.inner.get(index),
        }
    }
}
