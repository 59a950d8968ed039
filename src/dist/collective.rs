//! Collective operations on equally many numbers of all ranks.

use std::ops::Range;

use super::{Pending, Ranks};
use crate::error::{Error, Result};

/// An operation on numbers, of which all ranks have as many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// The sum over all ranks.
    Sum,
    /// This rank's part of the sum. The parts are equal and in the order of the ranks.
    SumPart,
    /// The numbers of all ranks, one rank after the other.
    Gather,
    /// The first rank's numbers.
    OfFirst,
}

impl Collective {
    #[cfg(test)]
    pub const ALL: [Self; 4] = [Self::Sum, Self::SumPart, Self::Gather, Self::OfFirst];

    /// Returns how many numbers `len` of each of `size` ranks give.
    ///
    /// # Errors
    /// When they have no equal parts and need some.
    pub fn len(self, len: usize, size: usize) -> Result<usize> {
        match self {
            Self::Sum | Self::OfFirst => Ok(len),
            Self::Gather => Ok(size * len),
            Self::SumPart if len.is_multiple_of(size) => Ok(len / size),
            Self::SumPart => Err(Error::Ranks(format!("{len} values have no {size} equal parts"))),
        }
    }
}

/// Ranges of gradients in the host's memory on their way to a sum over all ranks.
pub struct HostBucket {
    ranges: Vec<Range<usize>>,
    sums: Pending<Vec<f32>>,
}

impl HostBucket {
    /// Sends ranges of the gradients.
    pub fn send(grads: &[f32], ranges: Vec<Range<usize>>, ranks: &Ranks) -> Self {
        let mut values = Vec::with_capacity(ranges.iter().map(Range::len).sum());
        ranges.iter().for_each(|range| values.extend_from_slice(&grads[range.clone()]));
        Self { ranges, sums: ranks.sum(values) }
    }

    /// Waits for the sums and writes them to the ranges they belong to.
    ///
    /// # Errors
    /// When the transport failed, or another rank did not take part in time.
    pub fn receive(self, grads: &mut [f32]) -> Result<()> {
        let (sums, mut next) = (self.sums.wait()?, 0);
        for range in self.ranges {
            let len = range.len();
            grads[range].copy_from_slice(&sums[next..next + len]);
            next += len;
        }
        Ok(())
    }
}
