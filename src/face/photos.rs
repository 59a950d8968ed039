//! A data set of photos as one of aligned crops.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::crops::{Crop, Cropper, Found};
use crate::data::{ALIGNED_LANDMARKS, Dataset, Sample, decode_image};
use crate::error::{Error, Result};
use crate::parallel;

/// Most photos that an error names.
const NAMED: usize = 5;

/// A data set whose images are crops or photos, as crops. Each photo is searched once.
pub struct Photos {
    inner: Arc<dyn Dataset>,
    found: Found,
}

impl Photos {
    /// Returns the images of `inner` through `cropper`.
    pub fn new(inner: Arc<dyn Dataset>, cropper: Arc<Cropper>) -> Self {
        Self { found: Found::new(cropper, inner.len()), inner }
    }

    /// Searches the images `used`, in parallel, so that it is known that each has a face; `progress` receives the number
    /// of images done.
    ///
    /// # Errors
    /// [`Error::Face`] that counts and names those without a face; the error of the first image that cannot be read.
    pub fn search(&self, used: &[usize], progress: impl FnMut(usize) + Send) -> Result<()> {
        // Images that are stored decoded are crops.
        let Some(&first) = used.first() else { return Ok(()) };
        if self.inner.encoded(first)?.is_none() {
            return Ok(());
        }
        let failure = |i: usize| match self.get(used[i]) {
            Err(error @ Error::Face { .. }) => Ok(Some(error)),
            other => other.map(|_| None),
        };
        let failures = parallel::try_map(used.len(), parallel::counted(failure, progress))?;
        let mut failures: Vec<Error> = failures.into_iter().flatten().collect();
        match failures.len() {
            0 => Ok(()),
            1 => Err(failures.remove(0)),
            num => {
                let named: Vec<String> = failures.iter().take(NAMED).map(Error::to_string).collect();
                let more = if num > NAMED { ", ..." } else { "" };
                let what = format!("{num} of {} images cannot be used: {}{more}", used.len(), named.join(", "));
                Err(Error::Face { path: PathBuf::from("photos"), what })
            }
        }
    }
}

impl Dataset for Photos {
    fn len(&self) -> usize {
        self.inner.len()
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

    /// Decodes image `index` and crops the face that is meant; the landmarks are the template's, as those of any aligned
    /// crop. Images that the set stores decoded are crops.
    fn get(&self, index: usize) -> Result<Sample> {
        let Some(bytes) = self.inner.encoded(index)? else { return self.inner.get(index) };
        let (name, label) = (self.inner.name(index), self.inner.label(index));
        let path = Path::new(&name);
        let image = decode_image(&bytes, || path.to_owned())?;
        let Crop { image, .. } = self.found.crop(index, image, path)?;
        Ok(Sample { image, label, landmarks: ALIGNED_LANDMARKS })
    }
}
