//! Buffers of a pass, and their places in one block of memory.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Index of a buffer in its [`MemoryLayout`].
pub type BufferId = usize;

/// Memory that is needed for part of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Number of elements for one image.
    pub size: usize,
    /// Whether its elements are f32 also where products have a shorter type.
    pub is_wide: bool,
    /// Lifetime: from the moment it is first used until just after the moment it is last used.
    pub alive: Range<usize>,
}

impl Buffer {
    fn is_beside(&self, other: &Self) -> bool {
        self.alive.start < other.alive.end && other.alive.start < self.alive.end
    }
}

/// The buffers of a pass.
#[derive(Clone, Debug)]
pub struct MemoryLayout {
    /// The buffers.
    pub buffers: Vec<Buffer>,
    /// Start of each buffer in a block that holds all of them, for one image.
    begins: Vec<usize>,
    /// Distance of each buffer from there, whatever the number of images.
    skews: Vec<usize>,
    /// Length of the block for one image, in elements.
    len: usize,
}

/// Difference of the distances of neighbours, in elements: five cache lines. Sizes of activations are multiples of a
/// page, and a load waits for an earlier store to the same place of another page.
const SKEW: usize = 5 * 16;

impl MemoryLayout {
    /// Returns a layout in which no two buffers overlap that are alive at the same time.
    pub fn new(buffers: Vec<Buffer>) -> Self {
        let (begins, len) = lay_out(&buffers);
        // They rise with the starts, so that nothing comes to overlap.
        let different: BTreeSet<usize> = begins.iter().copied().collect();
        let ranks: BTreeMap<usize, usize> = different.into_iter().zip(0..).collect();
        let skews = begins.iter().map(|begin| SKEW * ranks[begin]).collect();
        Self { buffers, begins, skews, len }
    }

    /// Length of the block for `n` images, in elements.
    pub fn len(&self, n: usize) -> usize {
        self.len.saturating_mul(n).saturating_add(self.skews.iter().copied().max().unwrap_or(0))
    }

    /// Range of a buffer in the block, for `n` images.
    pub fn place(&self, buffer: BufferId, n: usize) -> Range<usize> {
        let (begin, size) = (self.begins[buffer] * n + self.skews[buffer], self.buffers[buffer].size * n);
        begin..begin + size
    }

    /// Returns the most elements that are alive at the same time: no block can be shorter.
    #[cfg(test)]
    pub fn least(&self) -> usize {
        least(&self.buffers)
    }
}

/// Returns the start of each buffer and the length of the block, such that no two buffers overlap that are alive at the
/// same time. Places the largest first, each in the first gap that is large enough ("Greedy by Size for Offset
/// Calculation", Pisarchyk and Lee, 2020, "Efficient Memory Management for Deep Neural Net Inference").
fn lay_out(buffers: &[Buffer]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    order.sort_by_key(|&i| (usize::MAX - buffers[i].size, buffers[i].alive.start));
    let mut begins = vec![0; buffers.len()];
    // Buffers already placed, in the order of their starts.
    let mut placed: Vec<usize> = Vec::new();
    for i in order {
        let mut begin = 0;
        for &other in placed.iter().filter(|other| buffers[**other].is_beside(&buffers[i])) {
            if begin + buffers[i].size <= begins[other] {
                break;
            }
            begin = begin.max(begins[other] + buffers[other].size);
        }
        begins[i] = begin;
        placed.insert(placed.partition_point(|&other| begins[other] <= begin), i);
    }
    let end = (0..buffers.len()).map(|i| begins[i] + buffers[i].size).max();
    (begins, end.unwrap_or(0))
}

/// Returns the most elements that are alive at the same time: no block can be shorter.
#[cfg(test)]
fn least(buffers: &[Buffer]) -> usize {
    let at = |moment: usize| buffers.iter().filter(|b| b.alive.contains(&moment)).map(|b| b.size).sum();
    buffers.iter().map(|b| at(b.alive.start)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn no_two_that_are_alive_at_once_overlap() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for num in (0..60).cycle().take(600) {
            let mut draw = |most: usize| rng.random_range(0..most);
            let buffers: Vec<Buffer> = (0..num)
                .map(|_| {
                    let start = draw(30);
                    Buffer { size: 1 + draw(50), is_wide: true, alive: start..start + 1 + draw(10) }
                })
                .collect();
            let (begins, len) = lay_out(&buffers);
            let place = |i: usize| begins[i]..begins[i] + buffers[i].size;
            for i in 0..num {
                assert!(place(i).end <= len);
                for j in (0..i).filter(|j| buffers[i].is_beside(&buffers[*j])) {
                    assert!(place(i).end <= place(j).start || place(j).end <= place(i).start, "{buffers:?}: {i}, {j}");
                }
            }
            assert!(len >= least(&buffers));
            let layout = MemoryLayout::new(buffers.clone());
            for n in [1, 3] {
                for i in 0..num {
                    let place = layout.place(i, n);
                    assert!(place.end <= layout.len(n) && place.len() == buffers[i].size * n);
                    for other in (0..i).filter(|j| buffers[i].is_beside(&buffers[*j])).map(|j| layout.place(j, n)) {
                        assert!(place.end <= other.start || other.end <= place.start, "{buffers:?}: {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn small_buffers_lie_where_a_large_one_was() {
        let buffer = |size, alive| Buffer { size, is_wide: false, alive };
        let buffers = [buffer(100, 0..2), buffer(10, 1..5), buffer(40, 2..4), buffer(60, 2..4), buffer(100, 4..5)];
        assert_eq!((lay_out(&buffers).1, least(&buffers)), (110, 110));
        assert_eq!(lay_out(&[]), (vec![], 0));
    }
}
