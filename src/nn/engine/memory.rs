//! The block of memory that holds the buffers of a training pass.

use std::sync::{Mutex, PoisonError};

use super::tape::{BufferId, Tape};

/// A block that is reused from step to step: touching fresh pages costs as much as a pass over old ones.
#[derive(Debug, Default)]
pub(super) struct Store(Mutex<Vec<f32>>);

impl Store {
    /// Returns at least `len` elements of unspecified value.
    pub fn take(&self, len: usize) -> Vec<f32> {
        let block = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if block.len() >= len {
            return block;
        }
        // Free the smaller block first, so that both never exist at the same time.
        drop(block);
        vec![0.0; len]
    }

    /// Takes a block back; the larger of two is kept.
    pub fn give(&self, block: Vec<f32>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if block.len() > kept.len() {
            *kept = block;
        }
    }
}

/// Buffers of a pass.
#[derive(Debug)]
pub(super) struct Memory<'a> {
    tape: &'a Tape,
    store: &'a Store,
    /// Number of images.
    n: usize,
    block: Vec<f32>,
}

impl<'a> Memory<'a> {
    /// Returns the buffers for `n` images, of unspecified value.
    pub fn new(tape: &'a Tape, store: &'a Store, n: usize) -> Self {
        Self { tape, store, n, block: store.take(tape.len(n)) }
    }

    pub fn get(&self, buffer: BufferId) -> &[f32] {
        &self.block[self.tape.place(buffer, self.n)]
    }

    pub fn get_mut(&mut self, buffer: BufferId) -> &mut [f32] {
        &mut self.block[self.tape.place(buffer, self.n)]
    }

    /// Returns a buffer to write to, and the rest of the block to read from.
    pub fn split(&mut self, buffer: BufferId) -> (&mut [f32], Others<'_>) {
        let place = self.tape.place(buffer, self.n);
        let (before, rest) = self.block.split_at_mut(place.start);
        let (found, after) = rest.split_at_mut(place.len());
        (found, Others { tape: self.tape, n: self.n, before, after, gap: place.end })
    }
}

impl Drop for Memory<'_> {
    fn drop(&mut self) {
        self.store.give(std::mem::take(&mut self.block));
    }
}

/// The block without one buffer.
pub(super) struct Others<'a> {
    tape: &'a Tape,
    n: usize,
    before: &'a [f32],
    after: &'a [f32],
    /// Start of `after` in the block.
    gap: usize,
}

impl<'a> Others<'a> {
    /// Returns a buffer that is alive at the same time as the written one.
    pub fn get(&self, buffer: BufferId) -> &'a [f32] {
        let place = self.tape.place(buffer, self.n);
        match place.start.checked_sub(self.gap) {
            Some(start) => &self.after[start..][..place.len()],
            None => &self.before[place],
        }
    }
}
