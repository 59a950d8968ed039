//! Rows of a mini-batch that the ranks share.

use std::borrow::Cow;
use std::ops::Range;

use crate::dist::{Collective, Ranks, RowOrder};
use crate::error::{Error, Result};
use crate::ops::backend::Backend;

/// Rows of a mini-batch, of which each rank has as many. On a rank of its own, nothing is moved.
pub(super) struct SharedRows<'a, B: Backend> {
    backend: &'a B,
    ranks: &'a Ranks,
    order: RowOrder,
    /// Rows on this rank.
    num_rows: usize,
}

impl<'a, B: Backend> SharedRows<'a, B> {
    /// Returns the rows of `num_rows` embeddings of `num_views` views on this rank.
    pub fn new(backend: &'a B, ranks: &'a Ranks, num_rows: usize, num_views: usize) -> Self {
        Self { backend, ranks, order: RowOrder::new(ranks, num_rows, num_views), num_rows }
    }

    /// Returns the labels of the rows of all ranks, in the order that one rank would have.
    ///
    /// # Errors
    /// When another rank has another number of rows, or the ranks cannot exchange them.
    pub fn labels(&self, own: Vec<i64>) -> Result<Vec<i64>> {
        if self.ranks.is_single() {
            return Ok(own);
        }
        let numbers: Vec<f64> = own.iter().map(|label| *label as f64).collect();
        let by_rank = self.ranks.gather_f64(&numbers)?;
        if let Some((rank, rows)) = by_rank.iter().enumerate().find(|(_, rows)| rows.len() != self.num_rows) {
            let (mine, me) = (self.num_rows, self.ranks.rank());
            return Err(Error::Ranks(format!("rank {rank} has a batch of {} rows, rank {me} of {mine}", rows.len())));
        }
        Ok(self.order.whole(&by_rank.concat(), 1).into_iter().map(|label| label as i64).collect())
    }

    /// Returns the rows of all ranks, of `width` elements; none if this rank has all.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn all(&self, own: &B::Array, width: usize) -> Result<Option<B::Array>> {
        if self.ranks.is_single() {
            return Ok(None);
        }
        let by_rank = self.backend.collect(own, Collective::Gather, self.ranks)?;
        Ok(Some(self.in_order(by_rank, self.order.ranges_to_whole(width))?))
    }

    /// Returns this rank's rows, of `width` elements, of the sum of what all ranks have for the rows of all.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn own_of_sum(&self, all: B::Array, width: usize) -> Result<B::Array> {
        if self.ranks.is_single() {
            return Ok(all);
        }
        let by_rank = self.in_order(all, self.order.ranges_by_rank(width))?;
        self.backend.collect(&by_rank, Collective::SumPart, self.ranks)
    }

    /// Returns ranges of the elements one after the other.
    fn in_order(&self, x: B::Array, ranges: impl Iterator<Item = Range<usize>>) -> Result<B::Array> {
        if self.order.is_by_rank() {
            return Ok(x);
        }
        let parts = ranges.map(|range| Ok(self.backend.part(&x, range)?)).collect::<Result<Vec<_>>>()?;
        Ok(self.backend.join(&parts.iter().collect::<Vec<_>>())?)
    }

    /// Returns this rank's rows.
    pub fn own(&self, all: Vec<f32>) -> Vec<f32> {
        match self.ranks.is_single() {
            true => all,
            false => self.order.own(&all, all.len() / self.order.num_rows().max(1)),
        }
    }

    /// Returns the values of the rows of all ranks, for a loss that the CPU computes.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn all_values<'b>(&self, own: &'b B::Array) -> Result<Cow<'b, [f32]>> {
        let own = self.backend.read(own)?;
        match self.ranks.is_single() {
            true => Ok(own),
            false => Ok(self.order.whole(&self.ranks.join_f32(&own)?, own.len() / self.num_rows.max(1)).into()),
        }
    }
}
