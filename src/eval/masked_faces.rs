//! Synthetic masks on test images.

use std::path::Path;

use image::RgbImage;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::config::{EvalConfig, Setting};
use crate::data::mask::reference::ReferenceDraw;
use crate::data::mask::{MaskConfig, Masker, TemplateShift, read_colours};
use crate::data::{Dataset, TestSet, mask_landmarks};
use crate::error::{Error, Result};

/// Images of a data set with their synthetic test masks.
pub struct MaskedFaces<'a> {
    images: &'a dyn Dataset,
    masker: Masker,
    config: &'a EvalConfig,
}

impl<'a> MaskedFaces<'a> {
    /// Prepares the masks of `config`.
    ///
    /// # Errors
    /// When a setting is invalid or the mask template cannot be read.
    pub fn new(images: &'a dyn Dataset, config: &'a EvalConfig) -> Result<Self> {
        // The published evaluation does not shift its template.
        let masker = Masker::new(&MaskConfig { template_shift: TemplateShift::None, ..config.mask.clone() })?;
        Ok(Self { images, masker, config })
    }

    /// Returns image `index` with its mask, the same one on every call.
    ///
    /// # Errors
    /// When the image cannot be read or masked.
    pub fn get(&self, index: usize) -> Result<RgbImage> {
        let mut sample = self.images.get(index)?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.config.seed);
        rng.set_stream(index as u64);
        let landmarks = mask_landmarks(self.config.mask.protocol, &sample.landmarks);
        self.masker.apply(&mut sample.image, &landmarks, &mut rng)?;
        Ok(sample.image)
    }

    /// Returns image `index` with the mask template of the `reference` protocol in the given colour.
    ///
    /// # Errors
    /// When the image cannot be read or masked.
    pub fn coloured(&self, index: usize, colour: [u8; 3]) -> Result<RgbImage> {
        let mut sample = self.images.get(index)?;
        let landmarks = mask_landmarks(self.config.mask.protocol, &sample.landmarks);
        self.masker.apply_template(&mut sample.image, &landmarks, ReferenceDraw { shift: [0, 0], colour })?;
        Ok(sample.image)
    }
}

/// Mask colour of every position of a verification file, from a list; `None` where the image is unmasked.
pub(super) fn colours_of(
    list: &Path,
    setting: Setting,
    test: &TestSet,
    config: &EvalConfig,
) -> Result<Vec<Option<[u8; 3]>>> {
    let colours = read_colours(list)?;
    let num_pairs = test.pairs.len();
    let colour = |place: usize| {
        if !setting.masked(config.mask.protocol, place / 2, num_pairs)[place % 2] {
            return Ok(None);
        }
        let missing = || Error::Data {
            path: list.to_owned(),
            what: format!("expected a colour for image {place} of {}, found none", 2 * num_pairs),
        };
        colours.get(&place).copied().map(Some).ok_or_else(missing)
    };
    (0..2 * num_pairs).map(colour).collect()
}
