//! The memory of a pass.

use std::sync::{Arc, Mutex, PoisonError};

use super::Cpu;
use crate::ops::backend::{BufferId, MemoryLayout, Source};
use crate::ops::channels::{Normalised, Seen};

/// Blocks that are reused from pass to pass, one for each pass at the same time: touching fresh pages costs as much as
/// a pass over old ones.
#[derive(Clone, Debug, Default)]
pub struct Pool(Arc<Mutex<Vec<Vec<f32>>>>);

impl Pool {
    /// Returns at least `len` elements of unspecified value.
    fn take(&self, len: usize) -> Vec<f32> {
        let block = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        if block.len() >= len {
            return block;
        }
        // Free the smaller block first, so that both never exist at the same time.
        drop(block);
        vec![0.0; len]
    }

    /// Takes a block back.
    fn give(&self, block: Vec<f32>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(block);
    }
}

/// Buffers of a pass in one block.
#[derive(Debug)]
pub struct PassBlock {
    layout: Arc<MemoryLayout>,
    pool: Pool,
    n: usize,
    block: Vec<f32>,
}

impl Drop for PassBlock {
    fn drop(&mut self) {
        self.pool.give(std::mem::take(&mut self.block));
    }
}

/// The block without one buffer.
#[derive(Clone, Copy)]
pub(super) struct Others<'a> {
    layout: &'a MemoryLayout,
    n: usize,
    before: &'a [f32],
    after: &'a [f32],
    /// Start of `after` in the block.
    gap: usize,
}

impl<'a> Others<'a> {
    /// Returns a buffer that is alive at the same time as the written one.
    pub fn get(&self, buffer: BufferId) -> &'a [f32] {
        let place = self.layout.place(buffer, self.n);
        match place.start.checked_sub(self.gap) {
            Some(start) => &self.after[start..][..place.len()],
            None => &self.before[place],
        }
    }

    pub fn seen(&self, x: Source<'a, Cpu>) -> Seen<'a> {
        seen(self.get(x.buffer), x)
    }
}

impl PassBlock {
    /// Returns the buffers for `n` images, of unspecified value.
    pub fn new(layout: &Arc<MemoryLayout>, pool: &Pool, n: usize) -> Self {
        Self { layout: layout.clone(), pool: pool.clone(), n, block: pool.take(layout.len(n)) }
    }

    pub fn get(&self, buffer: BufferId) -> &[f32] {
        &self.block[self.layout.place(buffer, self.n)]
    }

    pub fn get_mut(&mut self, buffer: BufferId) -> &mut [f32] {
        &mut self.block[self.layout.place(buffer, self.n)]
    }

    /// Returns a buffer to write to, and the rest of the block to read from.
    pub(super) fn split(&mut self, buffer: BufferId) -> (&mut [f32], Others<'_>) {
        let place = self.layout.place(buffer, self.n);
        let (before, rest) = self.block.split_at_mut(place.start);
        let (found, after) = rest.split_at_mut(place.len());
        (found, Others { layout: &self.layout, n: self.n, before, after, gap: place.end })
    }
}

/// Returns a value with the map of its norm, which is applied when it is read.
pub(super) fn seen<'a>(x: &'a [f32], source: Source<'a, Cpu>) -> Seen<'a> {
    Seen { x, constants: source.norm.map(Normalised::constants) }
}
