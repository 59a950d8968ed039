//! Pairs of images to compare.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Dataset, Pair};
use crate::error::{Error, Result};
use crate::parallel;

/// Number of folds for shuffled pairs.
pub(super) const DRAWN_PAIRS_FOLDS: usize = 10;

/// Images and the pairs of them to compare.
pub struct TestSet {
    /// The images.
    pub images: Arc<dyn Dataset>,
    /// The pairs, in the protocol's order; indices into `images`.
    pub pairs: Vec<Pair>,
    /// Number of folds of equal size that the pairs fall into, in their order, for LFW's accuracy.
    pub num_folds: usize,
    /// Description of the test set, for the user.
    pub description: String,
}

impl TestSet {
    /// Returns a test set; it must have pairs of both kinds and gets at most as many folds as pairs.
    ///
    /// # Errors
    /// When there is no genuine or no impostor pair.
    pub fn new(images: Arc<dyn Dataset>, pairs: Vec<Pair>, num_folds: usize, description: String) -> Result<Self> {
        let num_genuine = pairs.iter().filter(|p| p.is_same).count();
        if num_genuine == 0 || num_genuine == pairs.len() {
            return Err(Error::Evaluation(format!(
                "{description}: expected genuine and impostor pairs, found {num_genuine} and {}",
                pairs.len() - num_genuine
            )));
        }
        let num_folds = num_folds.min(pairs.len());
        Ok(Self { images, pairs, num_folds, description })
    }

    /// Returns the pairs of other images than those that are `unusable` (in ascending order), which the description
    /// counts. The folds are of equal size again, so that a pair may fall into the fold beside its own.
    ///
    /// # Errors
    /// When there is no genuine or no impostor pair left.
    pub fn without(self, unusable: &[usize]) -> Result<Self> {
        if unusable.is_empty() {
            return Ok(self);
        }
        let Self { images, pairs, num_folds, description } = self;
        let num_pairs = pairs.len();
        let is_usable = |image: usize| unusable.binary_search(&image).is_err();
        let pairs: Vec<Pair> = pairs.into_iter().filter(|pair| is_usable(pair.a) && is_usable(pair.b)).collect();
        let (num, num_left_out) = (unusable.len(), num_pairs - pairs.len());
        let description = format!("{description}, less {num_left_out} pairs with {num} images that cannot be used");
        Self::new(images, pairs, num_folds, description)
    }

    /// Returns the indices of the images that occur in pairs, each once, ascending.
    pub fn used_images(&self) -> Vec<usize> {
        let mut used: Vec<usize> = self.pairs.iter().flat_map(|p| [p.a, p.b]).collect();
        used.sort_unstable();
        used.dedup();
        used
    }

    /// Returns the labels of the two images of each pair, or `None` if labels and pairs contradict each other, as in a
    /// verification file, which does not know its people.
    pub fn people(&self) -> Option<Vec<[u32; 2]>> {
        let people = |p: &Pair| [p.a, p.b].map(|image| self.images.label(image));
        let is_known = self.pairs.iter().all(|p| (people(p)[0] == people(p)[1]) == p.is_same);
        is_known.then(|| self.pairs.iter().map(people).collect())
    }

    /// Returns the positions of pairs that repeat an earlier pair, in either order. Such pairs are counted again in
    /// every figure.
    pub fn repeated_pairs(&self) -> Vec<usize> {
        let mut seen = HashSet::new();
        (0..self.pairs.len())
            .filter(|&i| {
                let Pair { a, b, .. } = self.pairs[i];
                !seen.insert((a.min(b), a.max(b)))
            })
            .collect()
    }

    /// Decodes every image that occurs in a pair, to find a broken one before training rather than after it.
    ///
    /// # Errors
    /// When an image cannot be decoded.
    pub fn check_images(&self) -> Result<()> {
        let used = self.used_images();
        parallel::try_map(used.len(), |i| self.images.get(used[i]).map(drop)).map(drop)
    }
}
