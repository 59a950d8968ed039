//! Scores of image pairs, with their labels and identities.

use crate::error::{Error, Result};

/// Scores closer together than this are one, up to rounding.
const CONSTANT: f64 = 1e-6;

/// One score per pair of images.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparisons {
    scores: Vec<f64>,
    is_same: Vec<bool>,
    people: Option<Vec<[u32; 2]>>,
}

impl Comparisons {
    /// Returns comparisons, in the order of the protocol.
    ///
    /// - `scores`: similarities, higher means more alike
    /// - `is_same`: whether each pair shows one person
    /// - `people`: the identities of the two images of each pair, as arbitrary numbers, if known
    ///
    /// # Errors
    /// [`Error::Evaluation`] when the lengths differ, a score is NaN or infinite, or a pair's people contradict
    /// `is_same`.
    pub fn new(scores: Vec<f64>, is_same: Vec<bool>, people: Option<Vec<[u32; 2]>>) -> Result<Self> {
        let num = scores.len();
        if is_same.len() != num {
            let what = format!("expected a label for each of {num} scores, found {} labels", is_same.len());
            return Err(Error::Evaluation(what));
        }
        if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
            return Err(Error::Evaluation(format!("score {i}: expected a finite number, found {}", scores[i])));
        }
        if let Some(people) = &people {
            if people.len() != num {
                let what = format!("expected two people for each of {num} scores, found {}", people.len());
                return Err(Error::Evaluation(what));
            }
            if let Some(i) = (0..num).find(|&i| (people[i][0] == people[i][1]) != is_same[i]) {
                let kind = if is_same[i] { "one person" } else { "two people" };
                let [a, b] = people[i];
                return Err(Error::Evaluation(format!("pair {i}: expected {kind}, found person {a} and person {b}")));
            }
        }
        Ok(Self { scores, is_same, people })
    }

    /// Whether all pairs have one score, as a network gives them whose embeddings are all the same.
    pub fn is_constant(&self) -> bool {
        self.scores.iter().all(|score| (score - self.scores[0]).abs() < CONSTANT)
    }

    /// The scores, in the order of the protocol.
    pub fn scores(&self) -> &[f64] {
        &self.scores
    }

    /// Whether each pair shows one person.
    pub fn is_same(&self) -> &[bool] {
        &self.is_same
    }

    /// Identities of the two images of each pair, if known.
    pub fn people(&self) -> Option<&[[u32; 2]]> {
        self.people.as_deref()
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.scores.len()
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.scores.is_empty()
    }
}
