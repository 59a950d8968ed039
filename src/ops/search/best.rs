//! The best rows so far of a search.

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

/// The best rows so far, sorted.
#[derive(Clone, Debug)]
pub(super) struct Best {
    num: usize,
    hits: Vec<Hit>,
}

impl Best {
    /// Keeps the `num` best rows, at least 1.
    pub fn new(num: usize) -> Self {
        Self { num, hits: Vec::with_capacity(num) }
    }

    /// The score that a later row has to exceed.
    #[inline(always)]
    fn least(&self) -> f32 {
        if self.hits.len() < self.num { f32::NEG_INFINITY } else { self.hits[self.num - 1].score }
    }

    /// Takes the scores of rows into account, of which `first` is the index of the first.
    #[inline(always)]
    pub fn offer(&mut self, scores: &[f32], first: usize) {
        let mut groups = scores.chunks_exact(GROUP);
        for (i, group) in groups.by_ref().enumerate() {
            let least = self.least();
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
            if *score > self.least() {
                self.insert(Hit { row, score: *score });
            }
        }
    }

    fn insert(&mut self, hit: Hit) {
        let is_before = |other: &Hit| other.score > hit.score || (other.score == hit.score && other.row < hit.row);
        let at = self.hits.partition_point(is_before);
        if at < self.num {
            self.hits.truncate(self.num - 1);
            self.hits.insert(at, hit);
        }
    }

    /// Takes the best of other rows into account.
    pub fn merge(&mut self, other: Self) {
        other.hits.into_iter().for_each(|hit| self.insert(hit));
    }

    /// Returns the best, the highest score first.
    pub fn into_hits(self) -> Vec<Hit> {
        self.hits
    }
}
