//! The best rows so far of a search.

use std::cmp::Ordering;

/// A row that a search found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Index of the row.
    pub row: usize,
    /// Dot product of the row and the query.
    pub score: f32,
}

/// Scores that are looked at together.
pub(super) const GROUP: usize = 16;

/// The best rows so far: up to twice as many as are wanted, of which the worse half is dropped from time to time.
#[derive(Clone, Debug)]
pub(super) struct Best {
    num: usize,
    hits: Vec<Hit>,
    /// The score that a later row has to exceed.
    least: f32,
}

impl Best {
    /// Keeps the `num` best rows, at least 1.
    pub fn new(num: usize) -> Self {
        Self { num, hits: Vec::new(), least: f32::NEG_INFINITY }
    }

    /// Takes the scores of rows into account, of which `first` is the index of the first.
    #[inline(always)]
    pub fn offer(&mut self, scores: &[f32], first: usize) {
        let mut groups = scores.chunks_exact(GROUP);
        for (i, group) in groups.by_ref().enumerate() {
            let least = self.least;
            // Hardly ever true; without a branch for each score the compiler makes it one comparison of vectors.
            if group.iter().fold(false, |any, score| any | (*score > least)) {
                self.offer_each(group, first + i * GROUP);
            }
        }
        let rest = groups.remainder();
        self.offer_each(rest, first + scores.len() - rest.len());
    }

    #[cold]
    #[inline(never)]
    fn offer_each(&mut self, scores: &[f32], first: usize) {
        for (row, score) in (first..).zip(scores) {
            if *score > self.least {
                self.hits.push(Hit { row, score: *score });
                if self.hits.len() >= 2 * self.num {
                    self.drop_worse();
                }
            }
        }
    }

    /// Keeps the best `num`.
    fn drop_worse(&mut self) {
        if self.hits.len() > self.num {
            let (_, last, _) = self.hits.select_nth_unstable_by(self.num - 1, order);
            self.least = last.score;
            self.hits.truncate(self.num);
        }
    }

    /// Takes the best of other rows into account.
    pub fn merge(&mut self, other: Self) {
        self.hits.extend(other.hits);
        self.drop_worse();
    }

    /// Returns the best, the highest score first.
    pub fn into_hits(mut self) -> Vec<Hit> {
        self.drop_worse();
        self.hits.sort_unstable_by(order);
        self.hits
    }
}

/// The higher score first, and of equal ones the row that comes first.
fn order(a: &Hit, b: &Hit) -> Ordering {
    b.score.total_cmp(&a.score).then(a.row.cmp(&b.row))
}
