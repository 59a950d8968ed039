//! A data set of photos as one of aligned crops.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use super::crops::{Crop, Cropper, as_it_is};
use super::search::Face;
use crate::data::{ALIGNED_LANDMARKS, Dataset, Sample, decode_image, of_inner};
use crate::error::{Error, Result};
use crate::parallel;

/// A data set whose images are crops or photos, as crops. Each photo is searched once.
pub struct Photos {
    inner: Arc<dyn Dataset>,
    cropper: Arc<Cropper>,
    /// The face of each image that was asked for, with the number of faces; nothing for a crop.
    found: Vec<OnceLock<Option<(Face, usize)>>>,
}

impl Photos {
    /// Returns the images of `inner` through `cropper`.
    pub fn new(inner: Arc<dyn Dataset>, cropper: Arc<Cropper>) -> Self {
        let found = (0..inner.len()).map(|_| OnceLock::new()).collect();
        Self { inner, cropper, found }
    }

    /// Searches the images `used`, in parallel, and returns the numbers of those that cannot be used, with the reason:
    /// they cannot be read, or lack the face that is meant. `progress` receives the number of images done.
    ///
    /// # Errors
    /// When the detector cannot be opened.
    pub fn search(&self, used: &[usize], progress: impl FnMut(usize) + Send) -> Result<Vec<(usize, Error)>> {
        // Images that are stored decoded are crops.
        let Some(&first) = used.first() else { return Ok(Vec::new()) };
        if matches!(self.inner.encoded(first), Ok(None)) {
            return Ok(Vec::new());
        }
        let failure = |i: usize| match self.get(used[i]) {
            Err(error) if error.is_of_image() => Ok(Some((used[i], error))),
            other => other.map(|_| None),
        };
        let failures = parallel::try_map(used.len(), parallel::counted(failure, progress))?;
        Ok(failures.into_iter().flatten().collect())
    }
}

impl Dataset for Photos {
    of_inner!();

    /// Decodes image `index` and crops the face that is meant; the landmarks are the template's, as those of any
    /// aligned crop. Images that the set stores decoded are crops.
    fn get(&self, index: usize) -> Result<Sample> {
        let Some(bytes) = self.inner.encoded(index)? else { return self.inner.get(index) };
        let (name, label) = (self.inner.name(index), self.inner.label(index));
        let path = Path::new(&name);
        let image = decode_image(&bytes, || path.to_owned())?;
        let Crop { image, .. } = match self.found[index].get() {
            Some(None) => as_it_is(image),
            Some(Some((face, num_faces))) => self.cropper.of_face(&image, face, *num_faces)?,
            None => {
                let crop = self.cropper.crop(image, path)?;
                self.found[index].get_or_init(|| crop.face.clone().map(|face| (face, crop.num_faces)));
                crop
            }
        };
        Ok(Sample { image, label, landmarks: ALIGNED_LANDMARKS })
    }
}
