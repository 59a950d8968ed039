//! Fits a mask head to a network, on faces with drawn masks.

use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::arm::Arm;
use super::config::Config;
use super::outcome::Event;
use crate::data::mask::MaskConfig;
use crate::data::{AugmentConfig, Dataset, Pixels, Transform};
use crate::error::{Error, Result};
use crate::models::{MaskHead, Model};
use crate::parallel;

/// Faces whose features are computed together.
const BATCH: usize = 32;
/// Least number of faces.
const LEAST: usize = 10;

/// Settings of [`fit_mask_head`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MaskHeadConfig {
    /// Number of faces that are drawn from the data set; each is seen without a mask and with one. 0 fits no head.
    pub num_faces: usize,
    /// Seed of the choice, the masks and what a camera does to the images.
    pub seed: u64,
}

impl Default for MaskHeadConfig {
    fn default() -> Self {
        Self { num_faces: 2000, seed: 0 }
    }
}

/// What a camera does to a face, so that the head does not go by the sharpness of drawn masks.
fn augment(mask: f64) -> AugmentConfig {
    AugmentConfig {
        mask,
        misalign: 0.35,
        low_resolution: 0.35,
        light: 0.4,
        blur: 0.2,
        noise: 0.2,
        jpeg: 0.5,
        ..AugmentConfig::default()
    }
}

/// Fits a head that says whether a mask is worn to a network's features, on faces without masks, onto which masks are
/// drawn. Needs no labels. `progress` is told how many of the faces are done.
///
/// # Errors
/// When there are too few faces, one cannot be read, or the network shows no features.
pub fn fit_mask_head(
    model: &Model,
    faces: &dyn Dataset,
    mask: &MaskConfig,
    config: &MaskHeadConfig,
    description: &str,
    mut progress: impl FnMut(usize, usize),
) -> Result<MaskHead> {
    let num = config.num_faces.min(faces.len());
    if num < LEAST {
        return Err(Error::Training(format!("mask head: expected at least {LEAST} faces, found {num}")));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    let chosen = index::sample(&mut rng, faces.len(), num).into_vec();
    let views = [Transform::new(&augment(0.0), mask)?, Transform::new(&augment(1.0), mask)?];
    let batches: Vec<&[usize]> = chosen.chunks(BATCH).collect();
    let of_batch = |i: usize, is_masked: bool| {
        let view = |k: usize| {
            let face = batches[i][k];
            let mut rng = ChaCha8Rng::seed_from_u64(config.seed ^ (2 * face as u64 + u64::from(is_masked)));
            Ok::<_, Error>(views[usize::from(is_masked)].views(&faces.get(face)?, &mut rng)?.student)
        };
        let images = parallel::try_map(batches[i].len(), view)?;
        let mut pixels = Pixels::new(model.config().input_size);
        images.iter().for_each(|image| pixels.push(image));
        progress((i * BATCH).min(num), num);
        Ok(pixels)
    };
    let head = model.fit_mask_head(batches.len(), &format!("{num} faces of {description}"), of_batch)?;
    progress(num, num);
    Ok(head)
}

/// Fits a mask head to a trained network. That there is none is no reason to lose what was trained.
pub(super) fn head_of_arm(
    arm: Arm,
    backbone: &Model,
    train: &dyn Dataset,
    config: &Config,
    on: &mut dyn FnMut(Event),
) -> Option<MaskHead> {
    let of_faces = MaskHeadConfig { num_faces: config.train.mask_head, seed: config.train.seed };
    if of_faces.num_faces == 0 {
        return None;
    }
    let progress = |done, total| on(Event::Embedded { done, total });
    let fitted = fit_mask_head(backbone, train, &config.mask, &of_faces, "the training set", progress);
    fitted.map_err(|error| on(Event::Notice(format!("{}: without a mask head: {error}", arm.title())))).ok()
}
