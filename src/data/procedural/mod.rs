//! Procedural faces: a data set drawn by code, so that training, evaluation and tests run without any image file.
//!
//! A person is some eighty numbers drawn from `(seed, identity)`: skull, skin, eyes, brows, nose, mouth, ears, hair,
//! beard and marks (`identity.rs`). An image adds what differs between photographs, drawn from `(seed, identity,
//! image)`: pose with parallax, expression, light, surroundings, glasses, sensor (`nuisance.rs`). `render.rs` paints
//! the head as a relief with a reflectance, lights it, and develops the picture.

mod camera;
mod canvas;
mod draw;
mod eyes;
mod hair;
mod head;
mod identity;
mod light;
mod marks;
mod mouth;
mod nose;
mod nuisance;
mod relief;
mod render;
mod sensor;
mod shape;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use self::draw::{Draw, Purpose};
use self::identity::Identity;
use self::nuisance::Nuisance;
use super::{Dataset, Sample};
use crate::error::{Error, Result};

/// Settings of the procedural data set; the defaults make a small training set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProceduralConfig {
    /// Seed of the world: different seeds have different people.
    pub seed: u64,
    /// Number of people, at least 1.
    pub num_identities: usize,
    /// Images per person, at least 1.
    pub images_per_identity: usize,
    /// Number of the first person, who has label 0. Ranges of people that do not overlap are disjoint sets of one
    /// world.
    pub first_identity: u64,
    /// Strength of the differences between images of one person: 0 for even, frontal, neutral pictures, 1 for the full
    /// range, at most 1.5.
    pub nuisance: f32,
}

impl Default for ProceduralConfig {
    fn default() -> Self {
        Self { seed: 0, num_identities: 200, images_per_identity: 20, first_identity: 0, nuisance: 1.0 }
    }
}

impl ProceduralConfig {
    /// Checks that the data set can be drawn.
    ///
    /// # Errors
    /// When a count is 0 or overflows, or `nuisance` is not in `[0, 1.5]`.
    pub fn validate(&self) -> Result<()> {
        let fail = |what: String| Err(Error::Config(format!("procedural: {what}")));
        if self.num_identities == 0 {
            return fail("num_identities is 0, expected at least 1".into());
        }
        if self.images_per_identity == 0 {
            return fail("images_per_identity is 0, expected at least 1".into());
        }
        if u32::try_from(self.num_identities).is_err() {
            return fail(format!("num_identities is {}, expected at most {}", self.num_identities, u32::MAX));
        }
        if self.num_identities.checked_mul(self.images_per_identity).is_none() {
            return fail(format!(
                "{} identities of {} images are more than can be counted",
                self.num_identities, self.images_per_identity
            ));
        }
        if self.first_identity.checked_add(self.num_identities as u64).is_none() {
            return fail(format!("first_identity is {}, too large for this number of identities", self.first_identity));
        }
        // The negation also rejects NaN.
        if !(0.0..=1.5).contains(&self.nuisance) {
            return fail(format!("nuisance is {}, expected 0 to 1.5", self.nuisance));
        }
        Ok(())
    }
}

/// Faces drawn on demand: image `i` shows person `i / images_per_identity`.
///
/// The same config yields the same bytes on every thread and platform: the renderer uses only operations that IEEE 754
/// rounds exactly.
pub struct ProceduralFaces {
    config: ProceduralConfig,
}

impl ProceduralFaces {
    /// Returns the data set of `config`; nothing is drawn yet.
    ///
    /// # Errors
    /// When [`ProceduralConfig::validate`] fails.
    pub fn new(config: ProceduralConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// Returns the number of the person in the world and the number of the image, for image `index`.
    fn place(&self, index: usize) -> (u64, u64) {
        let per = self.config.images_per_identity;
        (self.config.first_identity + (index / per) as u64, (index % per) as u64)
    }
}

impl Dataset for ProceduralFaces {
    fn len(&self) -> usize {
        self.config.num_identities * self.config.images_per_identity
    }

    fn num_identities(&self) -> usize {
        self.config.num_identities
    }

    fn label(&self, index: usize) -> u32 {
        (index / self.config.images_per_identity) as u32
    }

    /// Names an image by the number of its person in the world and its own number: `id0012/0003`.
    fn name(&self, index: usize) -> String {
        let (identity, image) = self.place(index);
        format!("id{identity:04}/{image:04}")
    }

    fn get(&self, index: usize) -> Result<Sample> {
        if index >= self.len() {
            let what = format!("image {index} is out of range, there are {}", self.len());
            return Err(Error::Data { path: PathBuf::from("procedural"), what });
        }
        let ProceduralConfig { seed, nuisance, .. } = self.config;
        let (identity, image) = self.place(index);
        let noise = &mut Draw::new(seed, identity, image, Purpose::Sensor);
        let (image, landmarks) =
            render::render(&Identity::new(seed, identity), &Nuisance::new(seed, identity, image, nuisance), noise);
        Ok(Sample { image, label: self.label(index), landmarks })
    }
}

#[cfg(test)]
mod tests;
