//! What training does to a crop: the clean view for the teacher, the masked view for the student.

use image::RgbImage;
use image::imageops::flip_horizontal;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::mask::reference::REFERENCE_LANDMARKS;
use super::mask::{MaskConfig, MaskProtocol, Masker};
use super::{Batch, Landmarks, Sample, conditions};
use crate::error::{Error, Result};

/// How often crops are flipped, masked and otherwise changed; the defaults are the paper's.
///
/// All but flips are for the student only: the teacher sees the face as it is, so that the student learns not to mind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AugmentConfig {
    /// Probability of a horizontal flip.
    pub flip: f64,
    /// Probability that the student sees a mask.
    pub mask: f64,
    /// Probability that the face is turned, scaled and shifted a little.
    pub misalign: f64,
    /// Probability of a tight frame, black outside, as crops have that were cut before they were aligned.
    pub frame: f64,
    /// Probability of a resolution of 20 to 70 %.
    pub low_resolution: f64,
    /// Probability of another brightness, contrast and tint.
    pub light: f64,
    /// Probability that a part of 60 to 100 % of the area, of sides 3:4 to 4:3, is scaled up to the whole.
    pub crop: f64,
    /// Probability that a rectangle of 2 to 20 % of the area, of sides 1:3 to 3:1, is noise (Zhong et al., Random Erasing, AAAI
    /// 2020).
    pub erase: f64,
}

impl Default for AugmentConfig {
    fn default() -> Self {
        Self { flip: 0.5, mask: 0.5, misalign: 0.0, frame: 0.0, low_resolution: 0.0, light: 0.0, crop: 0.0, erase: 0.0 }
    }
}

impl AugmentConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let probabilities = [
            ("flip", self.flip),
            ("mask", self.mask),
            ("misalign", self.misalign),
            ("frame", self.frame),
            ("low_resolution", self.low_resolution),
            ("light", self.light),
            ("crop", self.crop),
            ("erase", self.erase),
        ];
        for (name, p) in probabilities {
            if !(0.0..=1.0).contains(&p) {
                return Err(Error::Config(format!("augment.{name}: expected a probability, found {p}")));
            }
        }
        Ok(())
    }
}

/// Two views of one face.
#[derive(Clone, Debug, PartialEq)]
pub struct Views {
    /// What the teacher sees.
    pub teacher: RgbImage,
    /// What the student sees.
    pub student: RgbImage,
    /// Whether a mask was put on.
    pub is_masked: bool,
}

/// Makes the two views of a sample.
#[derive(Debug)]
pub struct Transform {
    augment: AugmentConfig,
    masker: Masker,
    protocol: MaskProtocol,
}

impl Transform {
    /// Returns the transform.
    ///
    /// # Errors
    /// When a setting is out of range or the template of the reference protocol cannot be read.
    pub fn new(augment: &AugmentConfig, mask: &MaskConfig) -> Result<Self> {
        augment.validate()?;
        Ok(Self { augment: augment.clone(), masker: Masker::new(mask)?, protocol: mask.protocol })
    }

    /// Returns the views of `sample`, decided by `rng` alone.
    ///
    /// Corrected protocol: only the student's view is masked, and both views are flipped alike. Reference protocol, as
    /// the published code does: the mask is drawn into the crop that both see, at the landmarks of the 96-pixel
    /// template, and the flips are independent.
    ///
    /// # Errors
    /// When the landmarks cannot carry a mask.
    pub fn views(&self, sample: &Sample, rng: &mut ChaCha8Rng) -> Result<Views> {
        let flipped = |image: &RgbImage, flip| if flip { flip_horizontal(image) } else { image.clone() };
        let (mut image, mut teacher) = (sample.image.clone(), None);
        let mut seen = |image: &RgbImage, flip: bool| teacher = Some(flipped(image, flip));
        let (is_masked, flip) = self.change(&mut image, &sample.landmarks, rng, &mut seen)?;
        let teacher = teacher.expect("every protocol shows the teacher a view");
        Ok(Views { teacher, student: flipped(&image, flip), is_masked })
    }

    /// Appends the views of `sample` to a batch, as [`Self::views`] makes them.
    ///
    /// # Errors
    /// As [`Self::views`].
    pub(super) fn push_views(&self, sample: Sample, rng: &mut ChaCha8Rng, batch: &mut Batch) -> Result<()> {
        let Sample { mut image, landmarks, .. } = sample;
        let mut teacher = |image: &RgbImage, flip: bool| batch.teacher.push_flipped(image, flip);
        let (_, flip) = self.change(&mut image, &landmarks, rng, &mut teacher)?;
        batch.student.push_flipped(&image, flip);
        Ok(())
    }

    /// Makes of a crop what the student sees, but for the flip that is returned after whether there is a mask; gives the crop to
    /// `teacher` when it is what the teacher sees, with the flip of that.
    fn change(
        &self,
        image: &mut RgbImage,
        landmarks: &Landmarks,
        rng: &mut ChaCha8Rng,
        teacher: &mut dyn FnMut(&RgbImage, bool),
    ) -> Result<(bool, bool)> {
        let is_masked = rng.random_bool(self.augment.mask);
        let flips: [bool; 2] = std::array::from_fn(|_| rng.random_bool(self.augment.flip));
        if self.protocol == MaskProtocol::Corrected {
            teacher(image, flips[0]);
        }
        if is_masked {
            self.masker.apply(image, &mask_landmarks(self.protocol, landmarks), rng)?;
        }
        if self.protocol == MaskProtocol::Reference {
            teacher(image, flips[1]);
        }
        conditions::apply(image, &self.augment, rng);
        Ok((is_masked, flips[0]))
    }
}

/// Returns where a mask goes: at the image's own landmarks, or where the published code puts it, 8 px to the left.
pub fn mask_landmarks(protocol: MaskProtocol, landmarks: &Landmarks) -> Landmarks {
    match protocol {
        MaskProtocol::Corrected => *landmarks,
        MaskProtocol::Reference => REFERENCE_LANDMARKS,
    }
}
