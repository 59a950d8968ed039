//! A data set kept decoded in memory.

use std::sync::Arc;

use super::{Dataset, OnBroken, Sample, of_inner};
use crate::error::Result;
use crate::parallel;

/// All samples of a data set, decoded: 37 kB per face.
pub struct Cached {
    inner: Arc<dyn Dataset>,
    /// `None` where an image is broken.
    samples: Vec<Option<Sample>>,
}

impl Cached {
    /// Decodes every image of `inner`, in parallel.
    ///
    /// # Errors
    /// When an image cannot be decoded and broken ones are not skipped.
    pub fn new(inner: Arc<dyn Dataset>, on_broken: OnBroken) -> Result<Self> {
        let sample = |i| match (inner.get(i), on_broken) {
            (Err(error), OnBroken::Fail) => Err(error),
            (result, _) => Ok(result.ok()),
        };
        let samples = parallel::try_map(inner.len(), sample)?;
        Ok(Self { inner, samples })
    }
}

impl Dataset for Cached {
    of_inner!();

    fn get(&self, index: usize) -> Result<Sample> {
        match self.samples.get(index) {
            Some(Some(sample)) => Ok(sample.clone()),
            // A broken image fails again with its error.
            _ => self.inner.get(index),
        }
    }
}
