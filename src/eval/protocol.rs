//! Verification of clean and masked faces: U-U, U-M and M-M on the same pairs.

use std::collections::BTreeMap;

use image::RgbImage;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::embed::{EmbedConfig, Embeddings, embed};
use super::lfw::{FoldAccuracy, FoldTar, fold_accuracy, fold_tar_at_far, squared_l2};
use super::metrics::{Metrics, Scores};
use crate::data::mask::{MaskConfig, MaskProtocol, Masker, TemplateShift};
use crate::data::{Pair, TestSet, mask_landmarks};
use crate::error::{Error, Result};
use crate::models::Model;

/// Evaluation settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// The masks that test images wear.
    pub mask: MaskConfig,
    /// Decides each image's mask.
    pub seed: u64,
    /// Images that go through the network together.
    pub batch_size: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { mask: MaskConfig::default(), seed: 0, batch_size: 32 }
    }
}

impl EvalConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(1..=4096).contains(&self.batch_size) {
            return Err(Error::Config(format!("eval.batch_size: expected 1 to 4096, found {}", self.batch_size)));
        }
        self.mask.validate()
    }
}

/// Who wears a mask: the first image of a pair is the reference, the second the probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Setting {
    /// Nobody.
    #[serde(rename = "U-U")]
    UU,
    /// The probe.
    #[serde(rename = "U-M")]
    UM,
    /// Both, each with a mask of its own.
    #[serde(rename = "M-M")]
    MM,
}

impl Setting {
    /// All settings, in the order of the papers' tables.
    pub const ALL: [Self; 3] = [Self::UU, Self::UM, Self::MM];

    /// Returns the papers' name.
    pub fn name(self) -> &'static str {
        match self {
            Self::UU => "U-U",
            Self::UM => "U-M",
            Self::MM => "M-M",
        }
    }

    /// Whether the two images of pair `index` of `num_pairs` are masked.
    ///
    /// The published code (reference protocol) masks, for U-M, the second half of the list of all images, so half of
    /// the pairs are U-U and half are M-M.
    fn masked(self, protocol: MaskProtocol, index: usize, num_pairs: usize) -> [bool; 2] {
        match (self, protocol) {
            (Self::UU, _) => [false, false],
            (Self::MM, _) => [true, true],
            (Self::UM, MaskProtocol::Corrected) => [false, true],
            (Self::UM, MaskProtocol::Reference) => [2 * index >= num_pairs, 2 * index + 1 >= num_pairs],
        }
    }
}

/// The figures of one setting.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SettingResult {
    /// Error rates and score statistics over all pairs.
    #[serde(flatten)]
    pub metrics: Metrics,
    /// LFW's k-fold accuracy.
    pub accuracy: FoldAccuracy,
    /// LFW's k-fold TAR at FAR 1e-3; absent where a fold has not both kinds of pairs.
    pub tar_at_far: Option<FoldTar>,
    /// FNMR at the threshold that gives an FMR of 1 % in U-U, as in NIST's mask reports; absent with fewer than 100
    /// impostor pairs and where there is no U-U.
    pub fnmr_at_unmasked_fmr100: Option<f64>,
    /// FMR at that threshold.
    pub fmr_at_unmasked_fmr100: Option<f64>,
}

/// A model's figures in all settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// By setting.
    pub settings: BTreeMap<Setting, SettingResult>,
}

impl Evaluation {
    /// Returns the figures of `setting`.
    pub fn get(&self, setting: Setting) -> &SettingResult {
        &self.settings[&setting]
    }
}

/// Evaluates `model` on the pairs of `test`; `progress(done, total)` counts embedded images.
///
/// # Errors
/// When an image cannot be read or masked, the network fails, or the pairs are too few for the figures.
pub fn evaluate(
    model: &Model,
    test: &TestSet,
    config: &EvalConfig,
    mut progress: impl FnMut(usize, usize),
) -> Result<Evaluation> {
    config.validate()?;
    // A list may name few of many images.
    let used = test.used_images();
    let row_of: BTreeMap<usize, usize> = used.iter().enumerate().map(|(row, &image)| (image, row)).collect();

    // The published evaluation does not shift its template.
    let masker = Masker::new(&MaskConfig { template_shift: TemplateShift::None, ..config.mask.clone() })?;
    let masked_image = |row: usize| -> Result<RgbImage> {
        let mut sample = test.images.get(used[row])?;
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        rng.set_stream(used[row] as u64);
        let landmarks = mask_landmarks(config.mask.protocol, &sample.landmarks);
        masker.apply(&mut sample.image, &landmarks, &mut rng)?;
        Ok(sample.image)
    };
    let total = 2 * used.len();
    let clean_image = |row: usize| -> Result<RgbImage> { Ok(test.images.get(used[row])?.image) };
    let embedding = EmbedConfig { batch_size: config.batch_size, flip: true };
    let clean = embed(model, used.len(), clean_image, embedding, |n| progress(n, total))?;
    let masked = embed(model, used.len(), masked_image, embedding, |n| progress(used.len() + n, total))?;

    let cosines = |setting: Setting| -> Vec<f64> {
        let score = |(i, pair): (usize, &Pair)| {
            let [a, b] = setting.masked(config.mask.protocol, i, test.pairs.len());
            let side = |is_masked: bool| -> &Embeddings { if is_masked { &masked } else { &clean } };
            side(a).cosine(row_of[&pair.a], side(b), row_of[&pair.b])
        };
        test.pairs.iter().enumerate().map(score).collect()
    };
    let is_same: Vec<bool> = test.pairs.iter().map(|p| p.is_same).collect();
    let unmasked = cosines(Setting::UU);
    let threshold = Scores::from_labelled(&unmasked, &is_same)?.threshold_at_fmr(0.01).ok();
    let settings = [(Setting::UU, unmasked), (Setting::UM, cosines(Setting::UM)), (Setting::MM, cosines(Setting::MM))];
    let result = |(setting, cosines): (Setting, Vec<f64>)| Ok((setting, result(&cosines, test, threshold)?));
    let settings = settings.into_iter().map(result).collect::<Result<_>>()?;
    Ok(Evaluation { settings })
}

/// Evaluates `model` on the pairs of `test` as the images are, such as photos with real masks;
/// `progress(done, total)` counts embedded images.
///
/// # Errors
/// When an image cannot be read, the network fails, or the pairs are too few for the figures.
pub fn evaluate_as_is(
    model: &Model,
    test: &TestSet,
    batch_size: usize,
    mut progress: impl FnMut(usize, usize),
) -> Result<SettingResult> {
    let used = test.used_images();
    let row_of: BTreeMap<usize, usize> = used.iter().enumerate().map(|(row, &image)| (image, row)).collect();
    let image = |row: usize| -> Result<RgbImage> { Ok(test.images.get(used[row])?.image) };
    let embeddings =
        embed(model, used.len(), image, EmbedConfig { batch_size, flip: true }, |n| progress(n, used.len()))?;
    let cosine = |p: &Pair| embeddings.cosine(row_of[&p.a], &embeddings, row_of[&p.b]);
    result(&test.pairs.iter().map(cosine).collect::<Vec<_>>(), test, None)
}

/// The figures of one cosine per pair of `test`, also at the threshold of another setting.
fn result(cosines: &[f64], test: &TestSet, threshold: Option<f64>) -> Result<SettingResult> {
    let is_same: Vec<bool> = test.pairs.iter().map(|p| p.is_same).collect();
    let distances: Vec<f64> = cosines.iter().map(|&c| squared_l2(c)).collect();
    let scores = Scores::from_labelled(cosines, &is_same)?;
    Ok(SettingResult {
        metrics: scores.metrics(),
        accuracy: fold_accuracy(&distances, &is_same, test.num_folds)?,
        tar_at_far: fold_tar_at_far(&distances, &is_same, test.num_folds, 1e-3).ok(),
        fnmr_at_unmasked_fmr100: threshold.map(|t| scores.fnmr_at_threshold(t)),
        fmr_at_unmasked_fmr100: threshold.map(|t| scores.fmr_at_threshold(t)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_protocol_masks_whole_pairs_of_the_second_half() {
        let masked = |i| Setting::UM.masked(MaskProtocol::Reference, i, 4);
        assert_eq!([masked(0), masked(1), masked(2), masked(3)], [[false; 2], [false; 2], [true; 2], [true; 2]]);
        let masked = |i| Setting::UM.masked(MaskProtocol::Corrected, i, 4);
        assert_eq!([masked(0), masked(3)], [[false, true]; 2]);
    }
}
