//! Sums that several workers add to, each to its own.

use rayon::prelude::*;

use crate::ops::scratch::with_scratch;

/// Sums that workers share out where each can have a whole one: their number decides on the bits, so it does not follow that
/// of the threads.
pub(in crate::ops::conv) const NUM_SUMS: usize = 8;

/// Elements that a worker fills or joins at once.
const PIECE: usize = 1 << 14;

/// Calls `f` with `len` zeros.
pub(in crate::ops::conv) fn with_zeros(len: usize, f: impl FnOnce(&mut [f32])) {
    with_scratch(len, |sums| {
        sums.par_chunks_mut(PIECE).for_each(|sums| sums.fill(0.0));
        f(sums);
    });
}

/// Adds all sums of `len` elements, one after the other in `sums`, to the first in their order, and returns that.
pub(in crate::ops::conv) fn join(sums: &mut [f32], len: usize) -> &[f32] {
    let (total, others) = sums.split_at_mut(len);
    total.par_chunks_mut(PIECE).enumerate().for_each(|(i, total)| {
        for other in others.chunks_exact(len) {
            total.iter_mut().zip(&other[i * PIECE..]).for_each(|(total, sum)| *total += *sum);
        }
    });
    total
}
