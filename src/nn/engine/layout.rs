//! Places of buffers in one block of memory.

use std::ops::Range;

/// Memory that is needed for part of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    /// Number of elements.
    pub size: usize,
    /// Lifetime: from the moment it is first used until just after the moment it is last used.
    pub alive: Range<usize>,
}

impl Buffer {
    fn is_beside(&self, other: &Self) -> bool {
        self.alive.start < other.alive.end && other.alive.start < self.alive.end
    }
}

/// Returns the start of each buffer and the length of the block, such that no two buffers overlap that are alive at the
/// same time. Places the largest first, each in the first gap that is large enough ("Greedy by Size for Offset
/// Calculation", Pisarchyk and Lee, 2020, "Efficient Memory Management for Deep Neural Net Inference").
pub(super) fn lay_out(buffers: &[Buffer]) -> (Vec<usize>, usize) {
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
pub(super) fn least(buffers: &[Buffer]) -> usize {
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
                    Buffer { size: 1 + draw(50), alive: start..start + 1 + draw(10) }
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
        }
    }

    #[test]
    fn small_buffers_lie_where_a_large_one_was() {
        let buffer = |size, alive| Buffer { size, alive };
        let buffers = [buffer(100, 0..2), buffer(10, 1..5), buffer(40, 2..4), buffer(60, 2..4), buffer(100, 4..5)];
        assert_eq!((lay_out(&buffers).1, least(&buffers)), (110, 110));
        assert_eq!(lay_out(&[]), (vec![], 0));
    }
}
