//! Memory for activations that goes round from step to step: fresh pages cost as much as a pass over old ones.

use std::sync::{Mutex, PoisonError};

/// Free memory.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
    /// Whether free memory of no use now is given up rather than kept for later: the pool never holds more than was in use at once.
    is_lean: bool,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Vec<f32>>,
    /// Elements that are given out, and the most that ever were.
    in_use: usize,
    most_in_use: usize,
}

impl Pool {
    /// Returns a pool that holds no more than was in use at once: less memory, and more of it fresh.
    pub fn lean() -> Self {
        Self { is_lean: true, ..Self::default() }
    }

    /// Returns `len` elements of any value.
    pub fn take(&self, len: usize) -> Vec<f32> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let free = &state.free;
        // Of this very size, as it comes round in each step; else the least that will do, if it isn't far too large.
        let fits = |memory: &Vec<f32>| memory.capacity() >= len && memory.capacity() / 2 <= len;
        let size = |memory: &Vec<f32>| (memory.len() != len, memory.capacity());
        let best = (0..free.len()).filter(|&i| fits(&free[i])).min_by_key(|&i| size(&free[i]));
        let mut memory = best.map(|i| state.free.swap_remove(i)).unwrap_or_default();
        state.count(memory.capacity().max(len));
        if self.is_lean && memory.capacity() == 0 {
            state.give_up();
        }
        drop(state);
        memory.resize(len, 0.0);
        memory
    }

    /// Returns at least `len` elements of any value: the least memory that will do, however large. For what is soon given
    /// back, since nothing else can have the rest.
    pub fn take_at_least(&self, len: usize) -> Vec<f32> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let free = &state.free;
        let best = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
        let memory = best.map(|i| state.free.swap_remove(i));
        state.count(memory.as_ref().map_or(len, Vec::capacity));
        memory.unwrap_or_else(|| vec![0.0; len])
    }

    /// Takes memory back.
    pub fn give(&self, memory: Vec<f32>) {
        if memory.capacity() > 0 {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.in_use = state.in_use.saturating_sub(memory.capacity());
            state.free.push(memory);
        }
    }
}

impl State {
    fn count(&mut self, capacity: usize) {
        self.in_use += capacity;
        self.most_in_use = self.most_in_use.max(self.in_use);
    }

    /// Frees what is beyond the most that was in use, the largest first.
    fn give_up(&mut self) {
        self.free.sort_unstable_by_key(Vec::capacity);
        let mut held = self.in_use + self.free.iter().map(Vec::capacity).sum::<usize>();
        while held > self.most_in_use
            && let Some(memory) = self.free.pop()
        {
            held -= memory.capacity();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(pool: &Pool) -> usize {
        let state = pool.state.lock().unwrap();
        state.in_use + state.free.iter().map(Vec::capacity).sum::<usize>()
    }

    #[test]
    fn memory_of_a_size_comes_round_and_a_lean_pool_holds_what_was_in_use() {
        for (pool, most) in [(Pool::default(), 1000 + 400 + 100), (Pool::lean(), 1100)] {
            for _ in 0..3 {
                let (large, small) = (pool.take(1000), pool.take(100));
                pool.give(large);
                // Far smaller than what is free, so new.
                let middle = pool.take(400);
                assert_eq!((middle.len(), small.len()), (400, 100));
                pool.give(middle);
                pool.give(small);
            }
            assert!(held(&pool) <= most, "{}", held(&pool));
        }
    }
}
