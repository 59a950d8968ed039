//! Units that the bootstrap resamples: people, or pairs where the people are unknown.

use std::ops::Mul;

use super::comparisons::Comparisons;
use crate::error::{Error, Result};

/// Resampling units of one set of comparisons.
#[derive(Debug)]
pub(super) struct Units {
    /// The two people of each pair, numbered from 0; `None` if they are unknown and every pair is a unit.
    pairs: Option<Vec<[u32; 2]>>,
    num: usize,
}

impl Units {
    /// Numbers the people of `comparisons` from 0, in ascending order of identity.
    ///
    /// # Errors
    /// When there are 2^32 or more pairs.
    pub fn of(comparisons: &Comparisons) -> Result<Self> {
        let num_pairs = comparisons.len();
        u32::try_from(num_pairs)
            .map_err(|_| Error::Evaluation(format!("{num_pairs} pairs: expected less than 2^32")))?;
        let Some(people) = comparisons.people() else { return Ok(Self { pairs: None, num: num_pairs }) };
        let mut known: Vec<u32> = people.iter().flatten().copied().collect();
        known.sort_unstable();
        known.dedup();
        let number = |p: u32| known.partition_point(|&k| k < p) as u32;
        Ok(Self { pairs: Some(people.iter().map(|pair| pair.map(number)).collect()), num: known.len() })
    }

    /// Number of units.
    pub fn num(&self) -> usize {
        self.num
    }

    /// The two units of pair `i`.
    #[inline]
    pub fn of_pair(&self, i: usize) -> [u32; 2] {
        self.pairs.as_ref().map_or([i as u32; 2], |pairs| pairs[i])
    }
}

impl std::fmt::Display for Units {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pairs {
            Some(_) => write!(f, "{} people", self.num),
            None => write!(f, "{} pairs (people unknown)", self.num),
        }
    }
}

/// Weight of a pair of units when unit `u` was drawn `drawn[u]` times.
#[inline]
pub(super) fn weight<T: Copy + Mul<Output = T>>([a, b]: [u32; 2], drawn: &[T]) -> T {
    let times = drawn[a as usize];
    if a == b { times } else { times * drawn[b as usize] }
}
