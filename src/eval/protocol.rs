//! Verification of clean and masked faces: U-U, U-M, M-U and M-M on the same pairs.

use std::collections::BTreeMap;
use std::path::PathBuf;

use image::RgbImage;
use serde::{Deserialize, Serialize};

use super::comparisons::Comparisons;
use super::config::{EvalConfig, Setting};
use super::embed::{Embeddings, embed};
use super::figures::{Figures, SettingResult};
use super::masked_faces::{MaskedFaces, colours_of};
use crate::data::TestSet;
use crate::error::Result;
use crate::models::Model;
use crate::ops::search::dot;

/// Metrics of a model in all settings.
///
/// ```no_run
/// use std::path::Path;
///
/// use maskinv::data::DataConfig;
/// use maskinv::eval::{EvalConfig, Setting, evaluate};
/// use maskinv::models::load_model;
///
/// # fn main() -> maskinv::Result<()> {
/// let model = load_model(Path::new("runs/demo/hg"), None)?.model;
/// let test = DataConfig::default().open_test()?;
/// let evaluation = evaluate(&model, &test, &EvalConfig::default(), |_, _| {})?;
/// let masked = evaluation.get(Setting::UM).map(|result| result.metrics.eer);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Evaluation {
    /// Results by setting.
    pub settings: BTreeMap<Setting, SettingResult>,
}

impl Evaluation {
    /// Computes the metrics of the settings that [`figures`] prepared. Thresholds of U-U, if it is there, are applied
    /// to all settings.
    ///
    /// # Errors
    /// When there are more folds than comparisons.
    pub fn of(prepared: &BTreeMap<Setting, Figures>) -> Result<Self> {
        let unmasked = prepared.get(&Setting::UU);
        let result = |(&setting, figures): (&Setting, &Figures)| Ok((setting, figures.compute(unmasked)?));
        Ok(Self { settings: prepared.iter().map(result).collect::<Result<_>>()? })
    }

    /// Returns the metrics of `setting`; none if it was not measured, because the protocol has no pairs for it.
    pub fn get(&self, setting: Setting) -> Option<&SettingResult> {
        self.settings.get(&setting)
    }
}

/// Scores of a model in all settings, for the same pairs in the same order.
pub type SettingScores = BTreeMap<Setting, Comparisons>;

/// Evaluates `model` on the pairs of `test`; `progress(done, total)` counts embedded images.
///
/// # Errors
/// When an image cannot be read or masked, the network fails, or there are too few pairs for the metrics.
pub fn evaluate(
    model: &Model,
    test: &TestSet,
    config: &EvalConfig,
    progress: impl FnMut(usize, usize),
) -> Result<Evaluation> {
    let scores = compare(model, test, config, progress)?;
    Evaluation::of(&figures(scores.iter().map(|(s, c)| (*s, c)), test.num_folds, config)?)
}

/// Prepares the metrics of all settings. Their comparisons fall into `num_folds` folds of equal size; below two there
/// are no folds.
///
/// # Errors
/// When a bootstrap setting is out of range, or a setting has no genuine or no impostor pairs.
pub fn figures<'a>(
    scores: impl IntoIterator<Item = (Setting, &'a Comparisons)>,
    num_folds: usize,
    config: &'a EvalConfig,
) -> Result<BTreeMap<Setting, Figures<'a>>> {
    let prepare = |(setting, comparisons)| Ok((setting, Figures::new(comparisons, num_folds, &config.bootstrap)?));
    scores.into_iter().map(prepare).collect()
}

/// Compares the pairs of `test` by the cosine of their embeddings in every setting; `progress(done, total)` counts
/// embedded images.
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
    // A list of pairs may name only a few of the images.
    let used = test.used_images();
    let masked_faces = MaskedFaces::new(test.images.as_ref(), config)?;
    let total = 2 * used.len();
    let clean_image = |row: usize| -> Result<RgbImage> { Ok(test.images.get(used[row])?.image) };
    let masked_image = |row: usize| masked_faces.get(used[row]);
    let clean = embed(model, used.len(), clean_image, config.embedding(), |n| progress(n, total))?;
    let masked = embed(model, used.len(), masked_image, config.embedding(), |n| progress(used.len() + n, total))?;
    let coloured = |setting: Setting, list: &Option<PathBuf>| -> Result<Option<Embeddings>> {
        let Some(list) = list else { return Ok(None) };
        let colours = colours_of(list, setting, test, config)?;
        let image = |row: usize| {
            colours[row].map_or_else(
                || Ok(test.images.get(image_at(test, row))?.image),
                |colour| masked_faces.coloured(image_at(test, row), colour),
            )
        };
        embed(model, colours.len(), image, config.embedding(), |_| ()).map(Some)
    };
    let um = coloured(Setting::UM, &config.reference_colours_um)?;
    let mm = coloured(Setting::MM, &config.reference_colours_mm)?;
    let row_of = rows(&used);
    let scores = |setting: Setting| {
        let of_list = match setting {
            Setting::UU | Setting::MU => None,
            Setting::UM => um.as_ref(),
            Setting::MM => mm.as_ref(),
        };
        let scores = cosines(test, |i, side| match of_list {
            Some(listed) => (listed, 2 * i + side),
            None => {
                let is_masked = setting.masked(config.mask.protocol, i, test.pairs.len())[side];
                (if is_masked { &masked } else { &clean }, row_of[&image_at(test, 2 * i + side)])
            }
        });
        Ok((setting, scores?))
    };
    Setting::ALL.into_iter().map(scores).collect()
}

/// Image at position `place` of a verification file, which has two positions per pair.
fn image_at(test: &TestSet, place: usize) -> usize {
    let pair = &test.pairs[place / 2];
    [pair.a, pair.b][place % 2]
}

/// Evaluates `model` on the pairs of `test` without drawing masks, for example on photos with real masks.
/// `progress(done, total)` counts embedded images.
///
/// # Errors
/// When an image cannot be read, the network fails, or there are too few pairs for the metrics.
pub fn evaluate_as_is(
    model: &Model,
    test: &TestSet,
    config: &EvalConfig,
    progress: impl FnMut(usize, usize),
) -> Result<SettingResult> {
    let comparisons = compare_as_is(model, test, config, progress)?;
    Figures::new(&comparisons, test.num_folds, &config.bootstrap)?.compute(None)
}

/// Compares the pairs of `test` by the cosine of their embeddings, without drawing masks.
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
    let embeddings = embed(model, used.len(), image, config.embedding(), |n| progress(n, used.len()))?;
    let row_of = rows(&used);
    cosines(test, |i, side| (&embeddings, row_of[&image_at(test, 2 * i + side)]))
}

/// Row of each image in the embeddings of the `used` images.
fn rows(used: &[usize]) -> BTreeMap<usize, usize> {
    used.iter().enumerate().map(|(row, &image)| (image, row)).collect()
}

/// Returns the cosine of every pair; `side(i, s)` returns the embeddings and the row of image `s` of pair `i`.
fn cosines<'a>(test: &TestSet, side: impl Fn(usize, usize) -> (&'a Embeddings, usize)) -> Result<Comparisons> {
    let scores = (0..test.pairs.len()).map(|i| {
        let ((a, row_a), (b, row_b)) = (side(i, 0), side(i, 1));
        dot(&a[row_a], &b[row_b])
    });
    Comparisons::new(scores.collect(), test.pairs.iter().map(|p| p.is_same).collect(), test.people())
}
