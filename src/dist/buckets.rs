//! Gradients that are added over all ranks while the backward pass goes on.

use std::ops::Range;

use super::{Pending, Ranks};
use crate::error::Result;

/// Gradients on their way, in buckets: a bucket is sent once it is full, and the backward pass goes on meanwhile. All
/// ranks must add the same ranges in the same order.
pub(crate) struct Buckets {
    ranks: Ranks,
    /// Elements from which on a bucket is full.
    full: usize,
    ranges: Vec<Range<usize>>,
    values: Vec<f32>,
    sent: Vec<Sent>,
}

/// A bucket on its way.
struct Sent {
    ranges: Vec<Range<usize>>,
    sums: Pending<Vec<f32>>,
}

impl Buckets {
    pub fn new(ranks: &Ranks) -> Self {
        let full = (ranks.config.bucket_kib * 1024 / size_of::<f32>()).max(1);
        Self { ranks: ranks.clone(), full, ranges: Vec::new(), values: Vec::new(), sent: Vec::new() }
    }

    /// Adds a range of the gradients, which is final on this rank.
    pub fn add(&mut self, grads: &[f32], range: Range<usize>) {
        self.values.extend_from_slice(&grads[range.clone()]);
        self.ranges.push(range);
        if self.values.len() >= self.full {
            self.send();
        }
    }

    fn send(&mut self) {
        if !self.ranges.is_empty() {
            let sums = self.ranks.sum(std::mem::take(&mut self.values));
            self.sent.push(Sent { ranges: std::mem::take(&mut self.ranges), sums });
        }
    }

    /// Waits for the sums and writes them to the ranges they belong to.
    ///
    /// # Errors
    /// Same as [`Pending::wait`].
    pub fn finish(mut self, grads: &mut [f32]) -> Result<()> {
        self.send();
        for Sent { ranges, sums } in self.sent {
            let sums = sums.wait()?;
            let mut next = 0;
            for range in ranges {
                let len = range.len();
                grads[range].copy_from_slice(&sums[next..next + len]);
                next += len;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::RanksConfig;
    use crate::dist::threads::on_ranks;

    #[test]
    fn every_range_gets_its_sum_whatever_the_size_of_the_buckets() -> Result<()> {
        for bucket_kib in [1, 4, 25 * 1024] {
            let found = on_ranks(3, |ranks| -> Result<Vec<f32>> {
                let ranks = ranks.configured(&RanksConfig { bucket_kib, ..RanksConfig::default() });
                let mut grads: Vec<f32> = (0..2000).map(|i| (i * (ranks.rank() + 1)) as f32).collect();
                let mut buckets = Buckets::new(&ranks);
                for range in [1900..2000, 0..300, 300..301, 301..1800] {
                    buckets.add(&grads, range);
                }
                buckets.finish(&mut grads)?;
                Ok(grads)
            });
            for (rank, grads) in found.into_iter().enumerate() {
                for (i, found) in grads?.into_iter().enumerate() {
                    // The range that was left out keeps this rank's own.
                    let factor = if (1800..1900).contains(&i) { rank + 1 } else { 6 };
                    assert_eq!(found, (i * factor) as f32, "{i}");
                }
            }
        }
        Ok(())
    }
}
