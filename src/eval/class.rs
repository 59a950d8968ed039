//! Scores of one class, genuine or impostor, with or without integer weights.

use std::cmp::Ordering;
use std::iter::Peekable;

use rayon::slice::ParallelSliceMut;

use crate::error::{Error, Result};

/// Weighted scores of one class, in order; a weight counts as that many equal scores.
pub(super) trait Class {
    /// Number of scores.
    fn num(&self) -> u64;

    /// Scores with their weights, ascending; equal scores may come separately.
    fn ascending(&self) -> impl Iterator<Item = (f64, u64)>;

    /// The same, descending.
    fn descending(&self) -> impl Iterator<Item = (f64, u64)>;

    /// Number of scores below `threshold`.
    fn num_below(&self, threshold: f64) -> u64;
}

/// Ascending scores of weight one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sorted(Vec<f64>);

impl Sorted {
    /// Checks and sorts `scores`; `class` names them in errors.
    pub fn new(class: &str, mut scores: Vec<f64>) -> Result<Self> {
        if scores.is_empty() {
            return Err(Error::Evaluation(format!("expected at least one {class} score, found none")));
        }
        if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
            return Err(Error::Evaluation(format!("{class} score {i}: expected a finite number, found {}", scores[i])));
        }
        scores.par_sort_unstable_by(f64::total_cmp);
        Ok(Self(scores))
    }

    /// The scores, ascending.
    pub fn scores(&self) -> &[f64] {
        &self.0
    }
}

impl Class for Sorted {
    fn num(&self) -> u64 {
        self.0.len() as u64
    }

    fn ascending(&self) -> impl Iterator<Item = (f64, u64)> {
        self.0.iter().map(|&score| (score, 1))
    }

    fn descending(&self) -> impl Iterator<Item = (f64, u64)> {
        self.0.iter().rev().map(|&score| (score, 1))
    }

    fn num_below(&self, threshold: f64) -> u64 {
        self.0.partition_point(|&s| s < threshold) as u64
    }
}

/// Ascending scores with integer weights.
#[derive(Clone, Debug)]
pub(super) struct Weighted {
    /// Scores with their weights; those of weight 0 are left out.
    pairs: Vec<(f64, u64)>,
    num: u64,
}

impl Weighted {
    /// Keeps the ascending scores whose weight is not 0; `None` if there are none.
    pub fn new(pairs: impl Iterator<Item = (f64, u64)>) -> Option<Self> {
        let mut kept = Vec::with_capacity(pairs.size_hint().0);
        let mut num = 0;
        for (score, weight) in pairs {
            if weight > 0 {
                kept.push((score, weight));
                num += weight;
            }
        }
        (num > 0).then_some(Self { pairs: kept, num })
    }
}

impl Class for Weighted {
    fn num(&self) -> u64 {
        self.num
    }

    fn ascending(&self) -> impl Iterator<Item = (f64, u64)> {
        self.pairs.iter().copied()
    }

    fn descending(&self) -> impl Iterator<Item = (f64, u64)> {
        self.pairs.iter().rev().copied()
    }

    fn num_below(&self, threshold: f64) -> u64 {
        let below = self.pairs.partition_point(|(score, _)| *score < threshold);
        self.pairs[..below].iter().map(|(_, weight)| weight).sum()
    }
}

/// Iterator over distinct scores with their total weights.
pub(super) struct Distinct<I: Iterator<Item = (f64, u64)>>(Peekable<I>);

impl<I: Iterator<Item = (f64, u64)>> Distinct<I> {
    /// Merges equal scores of an ordered iterator.
    pub fn new(scores: I) -> Self {
        Self(scores.peekable())
    }

    /// Next score, without consuming it.
    pub fn peek(&mut self) -> Option<f64> {
        self.0.peek().map(|(score, _)| *score)
    }

    /// Consumes the next score if it equals `score`, and returns its total weight; otherwise returns 0.
    pub fn take_score(&mut self, score: f64) -> u64 {
        let mut num = 0;
        while let Some((_, weight)) = self.0.next_if(|(next, _)| next.partial_cmp(&score) == Some(Ordering::Equal)) {
            num += weight;
        }
        num
    }
}

impl<I: Iterator<Item = (f64, u64)>> Iterator for Distinct<I> {
    type Item = (f64, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let score = self.peek()?;
        Some((score, self.take_score(score)))
    }
}
