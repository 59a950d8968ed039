//! Turns a crop into two training views: a clean one for the teacher, a possibly masked one for the student.

use image::RgbImage;
use image::imageops::flip_horizontal;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::mask::reference::REFERENCE_LANDMARKS;
use super::mask::{MaskConfig, MaskProtocol, Masker};
use super::{Batch, Landmarks, Pixels, Sample, conditions};
use crate::error::{Error, Result};

/// Augmentation probabilities; the defaults are the paper's.
///
/// All but the flip apply to the student's view only: the teacher sees the face as it is, and the student learns to be
/// invariant. The reference protocol masks both views.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AugmentConfig {
    /// Probability of a horizontal flip.
    pub flip: f64,
    /// Probability of a mask on the student's view.
    pub mask: f64,
    /// Whether the student sees each image twice in a batch, without a mask and with one; `mask` is then of no effect.
    pub paired: bool,
    /// Probability of a small rotation, scaling and shift.
    pub misalign: f64,
    /// Probability of a tight frame, black outside, as in crops that were cut before they were aligned.
    pub frame: f64,
    /// Probability of scaling the image down to 20 to 70 % of its side and back up.
    pub low_resolution: f64,
    /// Probability of a random change of brightness, contrast and tint.
    pub light: f64,
    /// Probability of a blur, out of focus or by motion.
    pub blur: f64,
    /// Probability of sensor noise with a standard deviation of 2 to 12 grey levels.
    pub noise: f64,
    /// Probability of JPEG compression with a quality of 30 to 80.
    pub jpeg: f64,
    /// Probability of a random crop of 60 to 100 % of the area, with sides from 3:4 to 4:3, scaled up to the full size.
    pub crop: f64,
    /// Probability of replacing a rectangle of 2 to 20 % of the area, with sides from 1:3 to 3:1, by noise (Zhong et
    /// al., Random Erasing, AAAI 2020).
    pub erase: f64,
}

impl Default for AugmentConfig {
    fn default() -> Self {
        Self {
            flip: 0.5,
            mask: 0.5,
            paired: false,
            misalign: 0.0,
            frame: 0.0,
            low_resolution: 0.0,
            light: 0.0,
            blur: 0.0,
            noise: 0.0,
            jpeg: 0.0,
            crop: 0.0,
            erase: 0.0,
        }
    }
}

impl AugmentConfig {
    /// Checks that every setting is a probability.
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
            ("blur", self.blur),
            ("noise", self.noise),
            ("jpeg", self.jpeg),
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
    /// The teacher's view.
    pub teacher: RgbImage,
    /// The student's view.
    pub student: RgbImage,
    /// Whether a mask was applied.
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
        if augment.paired && mask.protocol == MaskProtocol::Reference {
            let what = "augment.paired: not with the reference protocol, whose teacher sees masks too".to_owned();
            return Err(Error::Config(what));
        }
        Ok(Self { augment: augment.clone(), masker: Masker::new(mask)?, protocol: mask.protocol })
    }

    /// Returns the two views of `sample`; all randomness comes from `rng`.
    ///
    /// With the corrected protocol only the student's view is masked, and both views are flipped alike. The reference
    /// protocol follows the published code: the mask is drawn into the crop that both see, at the landmarks of the
    /// 96-pixel template, and the flips are independent.
    ///
    /// # Errors
    /// When the landmarks cannot carry a mask.
    pub fn views(&self, sample: &Sample, rng: &mut ChaCha8Rng) -> Result<Views> {
        let flipped = |image: &RgbImage, flip| if flip { flip_horizontal(image) } else { image.clone() };
        let (mut image, mut teacher) = (sample.image.clone(), None);
        let mut seen = |view: View| match view {
            View::Teacher(image, flip) => teacher = Some(flipped(image, flip)),
            View::Clean(..) => {}
        };
        let change = self.change(&mut image, &sample.landmarks, rng, &mut seen)?;
        let teacher = teacher.expect("every protocol shows the teacher a view");
        Ok(Views { teacher, student: flipped(&image, change.flip), is_masked: change.is_masked })
    }

    /// Appends the views of `sample` to a batch, as [`Self::views`] makes them; with paired views, the student's with a
    /// mask to `masked`.
    ///
    /// # Errors
    /// Same as [`Self::views`].
    pub(super) fn push_views(
        &self,
        sample: Sample,
        rng: &mut ChaCha8Rng,
        batch: &mut Batch,
        masked: &mut MaskedViews,
    ) -> Result<()> {
        let Sample { mut image, landmarks, .. } = sample;
        let mut seen = |view: View| match view {
            View::Teacher(image, flip) => {
                batch.teacher.push_flipped(image, flip);
                // The masks that the reference protocol shows the teacher are drawn anew.
                batch.mirrored.push((self.protocol == MaskProtocol::Corrected).then_some(flip));
            }
            View::Clean(image, flip) => {
                batch.student.push_flipped(image, flip);
                batch.covered.push(0.0);
            }
        };
        let Change { flip, covered, .. } = self.change(&mut image, &landmarks, rng, &mut seen)?;
        let (pixels, shares) = match self.augment.paired {
            true => (&mut masked.pixels, &mut masked.covered),
            false => (&mut batch.student, &mut batch.covered),
        };
        pixels.push_flipped(&image, flip);
        shares.push(covered);
        Ok(())
    }

    /// Turns `image` into the student's view except for its flip, the one with a mask if views are paired. Calls `see`
    /// with the teacher's view and the other one of a pair.
    fn change(
        &self,
        image: &mut RgbImage,
        landmarks: &Landmarks,
        rng: &mut ChaCha8Rng,
        see: &mut dyn FnMut(View),
    ) -> Result<Change> {
        let is_masked = rng.random_bool(self.augment.mask) || self.augment.paired;
        let flips: [bool; 2] = std::array::from_fn(|_| rng.random_bool(self.augment.flip));
        if self.protocol == MaskProtocol::Corrected {
            see(View::Teacher(image, flips[0]));
        }
        if self.augment.paired {
            let mut clean = image.clone();
            conditions::apply(&mut clean, &self.augment, rng)?;
            see(View::Clean(&clean, flips[0]));
        }
        let mut covered = 0.0;
        if is_masked {
            let before = image.clone();
            self.masker.apply(image, &mask_landmarks(self.protocol, landmarks), rng)?;
            covered = share_changed(&before, image);
        }
        if self.protocol == MaskProtocol::Reference {
            see(View::Teacher(image, flips[1]));
        }
        conditions::apply(image, &self.augment, rng)?;
        Ok(Change { is_masked, flip: flips[0], covered })
    }
}

/// A view that is seen as it is, with its flip.
enum View<'a> {
    /// The teacher's.
    Teacher(&'a RgbImage, bool),
    /// The student's without a mask, of a pair.
    Clean(&'a RgbImage, bool),
}

/// How the student's view was made.
struct Change {
    is_masked: bool,
    flip: bool,
    /// Share of the crop that the mask covers.
    covered: f32,
}

/// The student's views with masks, of pairs.
pub(super) struct MaskedViews {
    pub pixels: Pixels,
    pub covered: Vec<f32>,
}

/// Share of the pixels that differ.
fn share_changed(before: &RgbImage, after: &RgbImage) -> f32 {
    let changed = before.pixels().zip(after.pixels()).filter(|(before, after)| before != after).count();
    changed as f32 / before.as_raw().len().max(1) as f32 * 3.0
}

/// Returns the landmarks to place a mask by: the image's own, or those of the published code, 8 px to the left.
pub fn mask_landmarks(protocol: MaskProtocol, landmarks: &Landmarks) -> Landmarks {
    match protocol {
        MaskProtocol::Corrected => *landmarks,
        MaskProtocol::Reference => REFERENCE_LANDMARKS,
    }
}
