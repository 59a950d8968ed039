//! Splits rows of channels into blocks. A block's size depends on the number of channels only, and the results of
//! blocks are joined in order, so no result depends on the number of threads.

use candle_core::WithDType;

/// Elements that a worker thread takes at a time: few enough that a block can be read twice from the cache.
const BLOCK_ELEMENTS: usize = 16 * 1024;

/// Number of elements of a block, a multiple of `channels`.
pub(super) fn block_len(channels: usize) -> usize {
    (BLOCK_ELEMENTS / channels).max(1) * channels
}

/// Returns the sum over the blocks, element by element, in f64.
pub(super) fn join<T: WithDType>(blocks: &[Vec<T>], len: usize) -> Vec<f64> {
    let mut total = vec![0.0; len];
    for sums in blocks {
        total.iter_mut().zip(sums).for_each(|(a, b)| *a += b.to_f64());
    }
    total
}
