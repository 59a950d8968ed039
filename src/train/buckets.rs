//! Gradients that are added over all ranks while the backward pass goes on.

use std::ops::Range;

use crate::dist::Ranks;
use crate::error::Result;
use crate::ops::backend::Backend;

/// Gradients on their way, in buckets: a bucket is sent once it is full, and the backward pass goes on meanwhile. All
/// ranks must add the same ranges in the same order.
pub(super) struct Buckets<'a, B: Backend> {
    backend: &'a B,
    ranks: &'a Ranks,
    /// Ranges of the next bucket, and their length.
    ranges: Vec<Range<usize>>,
    len: usize,
    sent: Vec<B::Bucket>,
}

impl<'a, B: Backend> Buckets<'a, B> {
    pub fn new(backend: &'a B, ranks: &'a Ranks) -> Self {
        Self { backend, ranks, ranges: Vec::new(), len: 0, sent: Vec::new() }
    }

    /// Adds a range of the gradients, which is final on this rank.
    ///
    /// # Errors
    /// When it cannot be sent.
    pub fn add(&mut self, grads: &B::Array, range: Range<usize>) -> Result<()> {
        self.len += range.len();
        self.ranges.push(range);
        if self.len * size_of::<f32>() >= self.ranks.bucket_bytes() { self.send(grads) } else { Ok(()) }
    }

    fn send(&mut self, grads: &B::Array) -> Result<()> {
        self.len = 0;
        if !self.ranges.is_empty() {
            self.sent.push(self.backend.send(grads, std::mem::take(&mut self.ranges), self.ranks)?);
        }
        Ok(())
    }

    /// Sends the last bucket and writes all sums to the ranges they belong to.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn finish(mut self, grads: &mut B::Array) -> Result<()> {
        self.send(grads)?;
        self.sent.into_iter().try_for_each(|bucket| self.backend.receive(bucket, grads))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::RanksConfig;
    use crate::dist::threads::on_ranks;
    use crate::ops::cpu::Cpu;

    #[test]
    fn every_range_gets_its_sum_whatever_the_size_of_the_buckets() -> Result<()> {
        for bucket_kib in [1, 4, 25 * 1024] {
            let found = on_ranks(3, |ranks| -> Result<Vec<f32>> {
                let ranks = ranks.configured(&RanksConfig { bucket_kib, ..RanksConfig::default() });
                let mut grads: Vec<f32> = (0..2000).map(|i| (i * (ranks.rank() + 1)) as f32).collect();
                let mut buckets = Buckets::new(&Cpu, &ranks);
                [1900..2000, 0..300, 300..301, 301..1800]
                    .into_iter()
                    .try_for_each(|range| buckets.add(&grads, range))?;
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
