//! How classes and rows are divided among ranks.

use std::ops::Range;

use candle_core::Tensor;

use super::Ranks;
use crate::error::{Error, Result};

/// Label of a row whose class is none of this rank's: unlike -1, the row has a class.
pub const ELSEWHERE: i64 = i64::MAX;

/// The classes whose centres a rank has.
#[derive(Clone, Debug)]
pub struct ClassShard {
    /// The ranks.
    pub ranks: Ranks,
    /// This rank's classes.
    pub classes: Range<usize>,
    /// Number of classes of all ranks.
    pub total: usize,
}

impl ClassShard {
    /// Returns this rank's shard of `total` classes.
    ///
    /// # Errors
    /// When there are fewer classes than ranks.
    pub fn new(ranks: &Ranks, total: usize) -> Result<Self> {
        let (rank, size) = (ranks.rank(), ranks.size());
        if total < size {
            return Err(Error::Config(format!("{size} ranks: expected at least as many classes, found {total}")));
        }
        Ok(Self { ranks: ranks.clone(), classes: part(rank, size, total), total })
    }

    /// Joins the class centres `(d, K)`, or other values of them, of which each rank has those of its classes.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn join(&self, own: &Tensor) -> Result<Tensor> {
        let (d, _) = own.dims2()?;
        let by_class = self.ranks.join_f32(&own.t()?.flatten_all()?.to_vec1()?)?;
        Ok(Tensor::from_vec(by_class, (self.total, d), own.device())?.t()?.contiguous()?)
    }

    /// Returns the labels among this rank's classes: -1 for none, [`ELSEWHERE`] for those of other ranks.
    ///
    /// # Errors
    /// When a label is below -1, or no rank has its class.
    pub fn own(&self, labels: &[i64]) -> Result<Vec<i64>> {
        let total = self.total as i64;
        if let Some(row) = labels.iter().position(|label| !(-1..total).contains(label)) {
            let what = format!("row {row}: expected a label below {total} or -1, found {}", labels[row]);
            return Err(Error::Training(what));
        }
        let own = |label: &i64| {
            let Ok(class) = usize::try_from(*label) else { return -1 };
            if self.classes.contains(&class) { (class - self.classes.start) as i64 } else { ELSEWHERE }
        };
        Ok(labels.iter().map(own).collect())
    }
}

/// Returns part `i` of `num` of `0..total`.
pub(crate) fn part(i: usize, num: usize, total: usize) -> Range<usize> {
    i * total / num..(i + 1) * total / num
}

/// Rows of a batch on several ranks. One rank would have all images of the first view, then all of the second; each of
/// several ranks has its images in this order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowOrder {
    rank: usize,
    size: usize,
    num_views: usize,
    /// Images on each rank.
    num_images: usize,
}

impl RowOrder {
    /// Returns the order of rows if this rank has `num_rows` of `num_views` views.
    pub fn new(ranks: &Ranks, num_rows: usize, num_views: usize) -> Self {
        Self { rank: ranks.rank(), size: ranks.size(), num_views, num_images: num_rows / num_views.max(1) }
    }

    /// Number of rows on all ranks.
    pub fn num_rows(&self) -> usize {
        self.size * self.num_views * self.num_images
    }

    /// Place in the rows of all ranks of a view on a rank.
    fn place(&self, view: usize, rank: usize) -> Range<usize> {
        let start = (view * self.size + rank) * self.num_images;
        start..start + self.num_images
    }

    /// Whether one rank would have the rows rank by rank.
    pub fn is_by_rank(&self) -> bool {
        self.num_views == 1
    }

    /// Ranges of rows that bring rows of `width` elements, given rank by rank, into the order in which one rank would
    /// have them.
    pub fn ranges_to_whole(&self, width: usize) -> impl Iterator<Item = Range<usize>> {
        let (order, len) = (*self, self.num_images * width);
        let of_view = move |view: usize| (0..order.size).map(move |rank| (rank * order.num_views + view) * len);
        (0..order.num_views).flat_map(of_view).map(move |start| start..start + len)
    }

    /// Ranges that do the inverse of [`Self::ranges_to_whole`].
    pub fn ranges_by_rank(&self, width: usize) -> impl Iterator<Item = Range<usize>> {
        let order = *self;
        (0..order.size).flat_map(move |rank| order.ranges_of(rank, width))
    }

    /// Ranges of a rank's rows in the order in which one rank would have all.
    fn ranges_of(self, rank: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
        (0..self.num_views).map(move |view| {
            let Range { start, end } = self.place(view, rank);
            start * width..end * width
        })
    }

    /// Brings rows of `width` elements, given rank by rank, into the order in which one rank would have them.
    pub fn whole<T: Copy>(&self, by_rank: &[T], width: usize) -> Vec<T> {
        self.ranges_to_whole(width).flat_map(|range| &by_rank[range]).copied().collect()
    }

    /// Returns this rank's rows of all.
    pub fn own<T: Copy>(&self, whole: &[T], width: usize) -> Vec<T> {
        self.ranges_of(self.rank, width).flat_map(|range| &whole[range]).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::threads::on_ranks;

    #[test]
    fn classes_are_divided_without_gaps() -> Result<()> {
        for (size, total) in [(1, 1), (2, 3), (3, 3), (4, 11)] {
            let shards = on_ranks(size, |ranks| ClassShard::new(&ranks, total));
            let mut next = 0;
            for shard in shards {
                let shard = shard?;
                assert!(shard.classes.start == next && !shard.classes.is_empty());
                next = shard.classes.end;
                let beyond = shard.own(&[0, total as i64]).map_err(|e| e.to_string());
                let expected = format!("row 1: expected a label below {total} or -1, found {total}");
                assert!(beyond.is_err_and(|e| e.contains(&expected)));
                let labels: Vec<i64> = (-1..total as i64).collect();
                for (label, own) in labels.iter().zip(shard.own(&labels)?) {
                    let is_own = shard.classes.contains(&(*label as usize)) && *label >= 0;
                    let other = if *label < 0 { -1 } else { ELSEWHERE };
                    assert_eq!(own, if is_own { label - shard.classes.start as i64 } else { other });
                }
            }
            assert_eq!(next, total);
        }
        let refused = on_ranks(3, |ranks| ClassShard::new(&ranks, 2).map_err(|e| e.to_string()));
        assert!(refused.into_iter().all(|found| found.is_err_and(|e| e.contains("3 ranks: expected at least"))));
        Ok(())
    }

    #[test]
    fn rows_keep_the_order_of_one_rank() -> Result<()> {
        for (size, num_views) in [(1, 1), (1, 2), (2, 1), (3, 2)] {
            let (num_images, width) = (2, 3);
            let all: Vec<usize> = (0..size * num_views * num_images * width).collect();
            let found = on_ranks(size, |ranks| {
                let order = RowOrder::new(&ranks, num_views * num_images, num_views);
                let by_rank: Vec<usize> = order.ranges_by_rank(width).flat_map(|range| all[range].to_vec()).collect();
                assert!(!order.is_by_rank() || by_rank == all);
                (order.own(&all, width), by_rank.clone(), order.whole(&by_rank, width))
            });
            let owned: Vec<usize> = found.iter().flat_map(|(own, _, _)| own.clone()).collect();
            for (own, by_rank, whole) in &found {
                assert!(whole == &all && by_rank == &owned && own.len() == num_views * num_images * width);
            }
            // The first rank has the first images of each view.
            let of_view = |view: usize| view * size * num_images * width;
            let firsts: Vec<usize> = found[0].0.chunks(num_images * width).map(|rows| rows[0]).collect();
            assert_eq!(firsts, (0..num_views).map(of_view).collect::<Vec<_>>());
        }
        Ok(())
    }
}
