//! Dropout with a generator of its own.

use std::sync::{Arc, Mutex, PoisonError};

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Generator of dropout (Srivastava et al., JMLR 2014), scaled so that the mean is unchanged.
///
/// candle's dropout uses a generator that cannot be seeded on the CPU; this one is seeded by the model's.
#[derive(Clone, Debug)]
pub struct Dropout {
    probability: f64,
    rng: Arc<Mutex<ChaCha8Rng>>,
}

impl Dropout {
    pub(super) fn new(probability: f64, rng: ChaCha8Rng) -> Self {
        Self { probability, rng: Arc::new(Mutex::new(rng)) }
    }

    /// Number of words drawn from the generator so far: a resumed training continues from there.
    pub fn num_words(&self) -> u64 {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).get_word_pos() as u64
    }

    /// Moves the generator to where `num_words` words have been drawn.
    pub fn skip_to(&self, num_words: u64) {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).set_word_pos(num_words.into());
    }

    /// Returns the factors of the next `len` elements in training; `None` if nothing is dropped.
    pub(super) fn mask(&self, len: usize) -> Option<Vec<f32>> {
        if self.probability == 0.0 {
            return None;
        }
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = (1.0 / (1.0 - self.probability)) as f32;
        Some((0..len).map(|_| if rng.random_bool(self.probability) { 0.0 } else { kept }).collect())
    }
}
