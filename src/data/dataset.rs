//! Data sets: labelled face images with random access.

use std::path::PathBuf;

use super::decode::decode_face;
use super::sample::{ALIGNED_LANDMARKS, Sample};
use crate::error::{Error, Result};

/// A set of labelled face images with random access.
pub trait Dataset: Send + Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// Number of identities; every label is below it.
    fn num_identities(&self) -> usize;

    /// Label of image `index`, without decoding it.
    fn label(&self, index: usize) -> u32;

    /// Number of classes of the margin loss: the identities, without those whom nobody has named.
    fn num_classes(&self) -> usize {
        self.num_identities()
    }

    /// Class of image `index` in the margin loss, its label; none for an image without a label.
    fn class(&self, index: usize) -> Option<u32> {
        Some(self.label(index))
    }

    /// Name by which a user finds image `index`, such as its path.
    fn name(&self, index: usize) -> String;

    /// Name of an identity in the data set: a folder name or a number.
    fn identity_name(&self, label: u32) -> String {
        label.to_string()
    }

    /// File name of image `index` within its identity, without folders; `None` if the data set has no file names.
    fn file_name(&self, _index: usize) -> Option<String> {
        None
    }

    /// Encoded bytes of image `index` as stored (JPEG, PNG or another format); `None` if the data set stores no encoded
    /// images.
    ///
    /// # Errors
    /// When it cannot be read.
    fn encoded(&self, _index: usize) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Size in bytes of what [`Self::encoded`] returns, without reading it; `None` if it is not known.
    fn encoded_len(&self, _index: usize) -> Option<u64> {
        None
    }

    /// Decodes image `index`. The same index returns the same sample on every thread. By default, the image is decoded
    /// from [`Self::encoded`] and its landmarks are [`ALIGNED_LANDMARKS`].
    ///
    /// # Errors
    /// When the image cannot be read or decoded or is not [`FACE_SIZE`](super::FACE_SIZE) square.
    fn get(&self, index: usize) -> Result<Sample> {
        let name = || PathBuf::from(self.name(index));
        let missing = || Error::Image { path: name(), what: "expected an image, found none".to_owned() };
        let image = decode_face(&self.encoded(index)?.ok_or_else(missing)?, name)?;
        Ok(Sample { image, label: self.label(index), landmarks: ALIGNED_LANDMARKS })
    }

    /// `PERSON/IMAGE`, the name of image `index` in lists; `None` if the data set has no file names.
    fn person_and_file(&self, index: usize) -> Option<String> {
        let file = self.file_name(index)?;
        Some(format!("{}/{file}", self.identity_name(self.label(index))))
    }

    /// Names of the identities, by label.
    fn identity_names(&self) -> Vec<String> {
        (0..self.num_identities() as u32).map(|label| self.identity_name(label)).collect()
    }

    /// Names of the identities that are classes, by label.
    fn class_names(&self) -> Vec<String> {
        (0..self.num_classes() as u32).map(|label| self.identity_name(label)).collect()
    }

    /// Number of images of each identity, by label.
    fn images_per_identity(&self) -> Vec<usize> {
        let mut counts = vec![0; self.num_identities()];
        (0..self.len()).for_each(|index| counts[self.label(index) as usize] += 1);
        counts
    }

    /// Number of identities left out for having too few images.
    fn num_skipped_identities(&self) -> usize {
        0
    }

    /// Whether the set holds no image.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The methods of a [`Dataset`] that has the images of another one, its field `inner`, and changes only
/// [`Dataset::get`].
macro_rules! of_inner {
    () => {
        fn len(&self) -> usize {
            self.inner.len()
        }

        fn num_identities(&self) -> usize {
            self.inner.num_identities()
        }

        fn num_classes(&self) -> usize {
            self.inner.num_classes()
        }

        fn num_skipped_identities(&self) -> usize {
            self.inner.num_skipped_identities()
        }

        fn label(&self, index: usize) -> u32 {
            self.inner.label(index)
        }

        fn class(&self, index: usize) -> Option<u32> {
            self.inner.class(index)
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

        fn encoded(&self, index: usize) -> $crate::error::Result<Option<Vec<u8>>> {
            self.inner.encoded(index)
        }

        fn encoded_len(&self, index: usize) -> Option<u64> {
            self.inner.encoded_len(index)
        }
    };
}
pub(crate) use of_inner;
