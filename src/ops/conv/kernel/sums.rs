//! Partial sums that worker threads add to independently.

use rayon::prelude::*;

use crate::ops::scratch::with_scratch;
use crate::parallel::Each;

/// Number of partial sums, where each is as large as the result. It decides the order of additions, so it does not
/// depend on the number of threads.
pub(in crate::ops::conv) const NUM_SUMS: usize = 8;

/// Elements that a worker thread fills or joins at a time.
const PIECE: usize = 1 << 14;

/// Calls `f` with a scratch buffer of `len` zeros.
pub(in crate::ops::conv) fn with_zeros(len: usize, f: impl FnOnce(&mut [f32])) {
    with_scratch(len, |sums| {
        sums.par_chunks_mut(PIECE).each(&|sums| sums.fill(0.0));
        f(sums);
    });
}

/// Adds all consecutive sums of `len` elements in `sums` to the first one, in order, and returns that one.
pub(in crate::ops::conv) fn join(sums: &mut [f32], len: usize) -> &[f32] {
    let (total, others) = sums.split_at_mut(len);
    total.par_chunks_mut(PIECE).enumerate().each(&|(i, total)| {
        for other in others.chunks_exact(len) {
            total.iter_mut().zip(&other[i * PIECE..]).for_each(|(total, sum)| *total += *sum);
        }
    });
    total
}
