//! Rows of channels taken in blocks. A block's size depends on the channels only, and what blocks give is joined in
//! their order, so no result depends on the number of threads.

use candle_core::WithDType;

/// Elements a worker takes at a time: small enough for a block to be read twice from the cache.
const BLOCK_ELEMENTS: usize = 16 * 1024;

/// Elements of a block: whole rows.
pub(super) fn block_len(channels: usize) -> usize {
    (BLOCK_ELEMENTS / channels).max(1) * channels
}

/// The sum over the blocks, element by element, in f64.
pub(super) fn join<T: WithDType>(blocks: &[Vec<T>], len: usize) -> Vec<f64> {
    let mut total = vec![0.0; len];
    for sums in blocks {
        total.iter_mut().zip(sums).for_each(|(a, b)| *a += b.to_f64());
    }
    total
}
