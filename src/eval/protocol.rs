//! Verification of clean and masked faces: U-U, U-M and M-M on the same pairs.

use std::collections::BTreeMap;

use image::RgbImage;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::bootstrap::BootstrapConfig;
use super::comparisons::Comparisons;
use super::embed::{EmbedConfig, Embeddings, embed};
use super::figures::{Figures, SettingResult};
use crate::data::mask::{MaskConfig, MaskProtocol, Masker, TemplateShift};
use crate::data::{TestSet, mask_landmarks};
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
    /// How sure figures are.
    pub bootstrap: BootstrapConfig,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { mask: MaskConfig::default(), seed: 0, batch_size: 32, bootstrap: BootstrapConfig::default() }
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
        self.bootstrap.validate()?;
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

/// A model's scores in all settings, of the same pairs in the same order.
pub type SettingScores = BTreeMap<Setting, Comparisons>;

/// Evaluates `model` on the pairs of `test`; `progress(done, total)` counts embedded images.
///
/// # Errors
/// When an image cannot be read or masked, the network fails, or the pairs are too few for the figures.
pub fn evaluate(
    model: &Model,
    test: &TestSet,
    config: &EvalConfig,
    progress: impl FnMut(usize, usize),
) -> Result<Evaluation> {
    figures(&compare(model, test, config, progress)?, test, config)
}

/// Returns the figures of scores that [`compare`] returned.
///
/// # Errors
/// When a setting is out of range or the pairs are too few.
pub fn figures(scores: &SettingScores, test: &TestSet, config: &EvalConfig) -> Result<Evaluation> {
    let mut prepared = BTreeMap::new();
    for (&setting, comparisons) in scores {
        prepared.insert(setting, Figures::new(comparisons, test.num_folds, &config.bootstrap)?);
    }
    let unmasked = prepared.get(&Setting::UU);
    let result = |(&setting, figures): (&Setting, &Figures)| Ok((setting, figures.compute(unmasked)?));
    Ok(Evaluation { settings: prepared.iter().map(result).collect::<Result<_>>()? })
}

/// Compares the pairs of `test` by the cosine of their embeddings in every setting; `progress(done, total)` counts embedded images.
///
/// # Errors
/// When an image cannot be read or masked, or the network fails.
pub fn compare(
    model: &Model,
    test: &TestSet,
    config: &EvalConfig,
    mut progress: impl FnMut(usize, usize),
) -> Result<SettingScores> {
    config.validate()?;
    // A list may name few of many images.
    let used = test.used_images();
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
    let scores = |setting: Setting| {
        let side = |is_masked: bool| if is_masked { &masked } else { &clean };
        let scores = cosines(test, &used, |i| setting.masked(config.mask.protocol, i, test.pairs.len()).map(side));
        Ok((setting, scores?))
    };
    Setting::ALL.into_iter().map(scores).collect()
}

/// Evaluates `model` on the pairs of `test` as the images are, such as photos with real masks;
/// `progress(done, total)` counts embedded images.
///
/// # Errors
/// When an image cannot be read, the network fails, or the pairs are too few for the figures.
pub fn evaluate_as_is(
    model: &Model,
    test: &TestSet,
    config: &EvalConfig,
    progress: impl FnMut(usize, usize),
) -> Result<SettingResult> {
    let comparisons = compare_as_is(model, test, config, progress)?;
    Figures::new(&comparisons, test.num_folds, &config.bootstrap)?.compute(None)
}

/// Compares the pairs of `test` as the images are, by the cosine of their embeddings.
///
/// # Errors
/// When an image cannot be read or the network fails.
pub fn compare_as_is(
    model: &Model,
    test: &TestSet,
    config: &EvalConfig,
    mut progress: impl FnMut(usize, usize),
) -> Result<Comparisons> {
    let used = test.used_images();
    let image = |row: usize| -> Result<RgbImage> { Ok(test.images.get(used[row])?.image) };
    let embedding = EmbedConfig { batch_size: config.batch_size, flip: true };
    let embeddings = embed(model, used.len(), image, embedding, |n| progress(n, used.len()))?;
    cosines(test, &used, |_| [&embeddings; 2])
}

/// The cosine of every pair, of the embeddings that `sides` has for the two images of pair `i`, a row for each of `used`.
fn cosines<'a>(test: &TestSet, used: &[usize], sides: impl Fn(usize) -> [&'a Embeddings; 2]) -> Result<Comparisons> {
    let row_of: BTreeMap<usize, usize> = used.iter().enumerate().map(|(row, &image)| (image, row)).collect();
    let scores = test.pairs.iter().enumerate().map(|(i, pair)| {
        let [a, b] = sides(i);
        a.cosine(row_of[&pair.a], b, row_of[&pair.b])
    });
    Comparisons::new(scores.collect(), test.pairs.iter().map(|p| p.is_same).collect(), test.people())
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
