//! Memory for activations that is reused from step to step: touching fresh pages costs as much as a pass over
//! old ones.

use std::sync::{Mutex, PoisonError};

/// A pool of free memory.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<f32>>>,
}

impl Pool {
    /// Returns at least `len` elements of unspecified value: the smallest memory that is large enough.
    pub fn take(&self, len: usize) -> Vec<f32> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let best = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
        best.map(|i| free.swap_remove(i)).unwrap_or_else(|| vec![0.0; len])
    }

    /// Returns memory to the pool.
    pub fn give(&self, memory: Vec<f32>) {
        if memory.capacity() > 0 {
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
    }
}
