//! Memory for activations that goes round from step to step: fresh pages cost as much as a pass over old ones.

use std::sync::{Mutex, PoisonError};

/// Free memory.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<f32>>>,
}

impl Pool {
    /// Returns `len` elements of any value.
    pub fn take(&self, len: usize) -> Vec<f32> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // Of this very size, as it comes round in each step; else the least that will do, if it isn't far too large.
        let fits = |memory: &Vec<f32>| memory.capacity() >= len && memory.capacity() / 2 <= len;
        let size = |memory: &Vec<f32>| (memory.len() != len, memory.capacity());
        let best = (0..free.len()).filter(|&i| fits(&free[i])).min_by_key(|&i| size(&free[i]));
        let mut memory = best.map(|i| free.swap_remove(i)).unwrap_or_default();
        drop(free);
        memory.resize(len, 0.0);
        memory
    }

    /// Returns at least `len` elements of any value: the least memory that will do, however large. For what is soon given
    /// back, since nothing else can have the rest.
    pub fn take_at_least(&self, len: usize) -> Vec<f32> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let best = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
        best.map(|i| free.swap_remove(i)).unwrap_or_else(|| vec![0.0; len])
    }

    /// Takes memory back.
    pub fn give(&self, memory: Vec<f32>) {
        if memory.capacity() > 0 {
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
    }
}
