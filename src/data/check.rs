//! Checks a data set for broken images, duplicates and misaligned faces.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use serde::Serialize;

use super::Dataset;
use super::alignment_check::{MeanFace, MeanFaceAlignment};
use super::decode::jpeg_damage;

/// Results of checking a data set.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// Number of images checked.
    pub num_images: usize,
    /// Names of images that cannot be used, with the reason, in the set's order.
    pub broken: Vec<(String, String)>,
    /// Names of JPEGs whose data has invalid codes but decodes, with what is wrong, in the set's order. Damage that
    /// happens to be valid is not found.
    pub damaged: Vec<(String, String)>,
    /// Groups of images with the same pixels, in the set's order.
    pub duplicates: Vec<Duplicates>,
    /// Position of the mean face; `None` for too few faces.
    pub mean_face: Option<MeanFaceAlignment>,
}

/// Images with the same pixels.
#[derive(Clone, Debug, Serialize)]
pub struct Duplicates {
    /// Names of the images.
    pub images: Vec<String>,
    /// Whether they are labelled as different people.
    pub is_across_people: bool,
}

/// Decodes every image of a data set in parallel and reports what is wrong; `progress` receives the number of images
/// done.
///
/// Memory is 16 bytes per image.
pub fn check(images: &dyn Dataset, progress: impl FnMut(usize) + Send) -> Findings {
    let done = AtomicUsize::new(0);
    let progress = Mutex::new(progress);
    let look = |mut state: State, index: usize| {
        match images.get(index) {
            Ok(sample) => {
                let mut hasher = DefaultHasher::new();
                sample.image.as_raw().hash(&mut hasher);
                state.hashes.push((hasher.finish(), index as u32));
                state.mean.add(&sample.image);
                let encoded = images.encoded(index).ok().flatten();
                state.damaged.extend(encoded.and_then(|bytes| jpeg_damage(&bytes)).map(|what| (index, what)));
            }
            Err(error) => state.broken.push((index, error.to_string())),
        }
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        if done.is_multiple_of(64) || done == images.len() {
            progress.lock().unwrap_or_else(PoisonError::into_inner)(done);
        }
        state
    };
    let state = (0..images.len()).into_par_iter().fold(State::default, look).reduce(State::default, State::merge);
    let State { broken, damaged, hashes, mean } = state;
    let named = |mut found: Vec<(usize, String)>| {
        found.sort_unstable_by_key(|(index, _)| *index);
        found.into_iter().map(|(index, what)| (images.name(index), what)).collect()
    };
    Findings {
        num_images: images.len(),
        broken: named(broken),
        damaged: named(damaged),
        duplicates: duplicates(images, hashes),
        mean_face: mean.alignment(),
    }
}

#[derive(Default)]
struct State {
    broken: Vec<(usize, String)>,
    damaged: Vec<(usize, String)>,
    hashes: Vec<(u64, u32)>,
    mean: MeanFace,
}

impl State {
    fn merge(mut self, mut other: Self) -> Self {
        self.broken.append(&mut other.broken);
        self.damaged.append(&mut other.damaged);
        self.hashes.append(&mut other.hashes);
        self.mean.merge(&other.mean);
        self
    }
}

/// Groups images with the same hash and the same pixels.
fn duplicates(images: &dyn Dataset, mut hashes: Vec<(u64, u32)>) -> Vec<Duplicates> {
    hashes.sort_unstable();
    let mut found: Vec<Vec<u32>> = Vec::new();
    for group in hashes.chunk_by(|a, b| a.0 == b.0).filter(|group| group.len() > 1) {
        let mut by_pixels: HashMap<Vec<u8>, Vec<u32>> = HashMap::new();
        for &(_, index) in group {
            // The image could be decoded before; if it cannot now, it does not count as a duplicate.
            if let Ok(sample) = images.get(index as usize) {
                by_pixels.entry(sample.image.into_raw()).or_default().push(index);
            }
        }
        found.extend(by_pixels.into_values().filter(|same| same.len() > 1));
    }
    found.sort_unstable();
    let describe = |same: Vec<u32>| {
        let label = |&index: &u32| images.label(index as usize);
        let is_across_people = same.iter().any(|index| label(index) != label(&same[0]));
        Duplicates { images: same.iter().map(|&index| images.name(index as usize)).collect(), is_across_people }
    };
    found.into_iter().map(describe).collect()
}

impl Findings {
    /// Returns the number of images that are copies of an earlier one.
    pub fn num_duplicates(&self) -> usize {
        self.duplicates.iter().map(|group| group.images.len() - 1).sum()
    }

    /// Returns a warning per problem; empty if there are none.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.broken.is_empty() {
            let share = 100.0 * self.broken.len() as f64 / self.num_images as f64;
            let num = self.broken.len();
            warnings.push(format!(
                "{num} images ({share:.1} %) cannot be used: training stops at the first, unless data.on_broken = \"skip\""
            ));
        }
        if !self.damaged.is_empty() {
            let num = self.damaged.len();
            warnings.push(format!(
                "{num} images have damaged data and decode to something else than they were: copy them again"
            ));
        }
        let across = self.duplicates.iter().filter(|group| group.is_across_people).count();
        if across > 0 {
            warnings.push(format!(
                "{across} images appear under several people: one of the labels is wrong, and pairs of them count \
                 as impostors with a perfect score"
            ));
        }
        let within = self.num_duplicates();
        if within > 0 && self.duplicates.len() > across {
            warnings.push(format!(
                "{within} images are copies of another: in a test set they form genuine pairs that any system recognises"
            ));
        }
        warnings.extend(self.mean_face.as_ref().and_then(MeanFaceAlignment::warning));
        warnings
    }
}
