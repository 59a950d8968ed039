//! What a data set holds: aligned face images with a label and five landmarks.

use std::path::PathBuf;

use image::RgbImage;

use super::decode::decode_face;
use crate::error::{Error, Result};

/// Side of an aligned face crop, in pixels.
pub const FACE_SIZE: u32 = 112;

/// Five landmarks `[x, y]` in pixels, in the order: eye, eye, nose tip, mouth corner, mouth corner; of each pair
/// first the one on the image's left (the person's right).
pub type Landmarks = [[f32; 2]; 5];

/// Where the landmarks of a 112x112 crop are after alignment (Deng et al., ArcFace; insightface's template).
pub const ALIGNED_LANDMARKS: Landmarks =
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]];

/// One face image.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The aligned crop, RGB, 8 bits, [`FACE_SIZE`] square.
    pub image: RgbImage,
    /// Whose face it is: `0 .. num_identities`.
    pub label: u32,
    /// Landmarks in pixels of `image`.
    pub landmarks: Landmarks,
}

/// A set of labelled face images with random access.
pub trait Dataset: Send + Sync {
    /// Number of images.
    fn len(&self) -> usize;

    /// Number of identities; every label is below it.
    fn num_identities(&self) -> usize;

    /// The label of image `index`, without decoding it.
    fn label(&self, index: usize) -> u32;

    /// A name for people to find image `index` by, such as its path.
    fn name(&self, index: usize) -> String;

    /// What the set calls an identity: the name of a folder, or a number.
    fn identity_name(&self, label: u32) -> String {
        label.to_string()
    }

    /// What the set calls image `index` among those of its identity, a file name without folders, if it names images.
    fn file_name(&self, _index: usize) -> Option<String> {
        None
    }

    /// Image `index` as it is stored, a JPEG, PNG or another encoded image; `None` if the set has none that are encoded.
    ///
    /// # Errors
    /// When it cannot be read.
    fn encoded(&self, _index: usize) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Decodes image `index`. The same index gives the same sample, on every thread. Of an image that is stored encoded, unless
    /// the set says otherwise, with [`ALIGNED_LANDMARKS`].
    ///
    /// # Errors
    /// When the image cannot be read or decoded or is not [`FACE_SIZE`] square.
    fn get(&self, index: usize) -> Result<Sample> {
        let name = || PathBuf::from(self.name(index));
        let missing = || Error::Image { path: name(), what: "expected an image, found none".to_owned() };
        let image = decode_face(&self.encoded(index)?.ok_or_else(missing)?, name)?;
        Ok(Sample { image, label: self.label(index), landmarks: ALIGNED_LANDMARKS })
    }

    /// `PERSON/IMAGE`, as lists name image `index`, if the set names images.
    fn person_and_file(&self, index: usize) -> Option<String> {
        let file = self.file_name(index)?;
        Some(format!("{}/{file}", self.identity_name(self.label(index))))
    }

    /// What the set calls its identities, by label.
    fn identity_names(&self) -> Vec<String> {
        (0..self.num_identities() as u32).map(|label| self.identity_name(label)).collect()
    }

    /// How many images each identity has, by label.
    fn images_per_identity(&self) -> Vec<usize> {
        let mut counts = vec![0; self.num_identities()];
        (0..self.len()).for_each(|index| counts[self.label(index) as usize] += 1);
        counts
    }

    /// Number of identities that were left out for having too few images.
    fn num_skipped_identities(&self) -> usize {
        0
    }

    /// Whether the set holds no image.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
