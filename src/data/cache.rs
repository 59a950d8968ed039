//! A data set kept decoded in memory.

use rayon::prelude::*;

use super::{Dataset, Sample};
use crate::error::{Error, Result};

/// All samples of a data set, decoded: 37 kB a face.
pub struct Cached<D> {
    inner: D,
    samples: Vec<Sample>,
}

impl<D: Dataset> Cached<D> {
    /// Decodes every image of `inner`, in parallel.
    ///
    /// # Errors
    /// When an image cannot be decoded.
    pub fn new(inner: D) -> Result<Self> {
        let samples = (0..inner.len()).into_par_iter().map(|i| inner.get(i)).collect::<Result<_>>()?;
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
        self.samples[index].label
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(index)
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let found = self.samples.get(index).cloned();
        found.ok_or_else(|| Error::Config(format!("image {index} of {}", self.samples.len())))
    }
}
