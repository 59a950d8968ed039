//! Random draws and value noise that give the same numbers on every platform.
//!
//! The whole renderer uses only `+ - * /`, square roots and comparisons, which IEEE 754 rounds exactly. It avoids
//! `sin`, `exp` and `powf`, whose last bits depend on the platform's maths library. A face therefore has the same bytes
//! everywhere.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Purpose of a stream of draws; the streams of one image never overlap.
#[derive(Clone, Copy)]
pub(super) enum Purpose {
    /// The face itself; the same for all images of a person.
    Identity = 0,
    /// Pose, expression, light and everything else of one image.
    Nuisance = 1,
    /// The noise of the sensor.
    Sensor = 2,
}

/// A stream of random numbers.
pub(super) struct Draw(ChaCha8Rng);

impl Draw {
    /// Returns the stream of `(seed, identity, image, purpose)`; different tuples never share a key.
    pub(super) fn new(seed: u64, identity: u64, image: u64, purpose: Purpose) -> Self {
        let mut key = [0; 32];
        for (bytes, word) in key.chunks_exact_mut(8).zip([seed, identity, image, purpose as u64]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    /// Uniform in `[0, 1)`.
    #[inline]
    pub(super) fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1 << 24) as f32
    }

    /// Uniform in `[low, high)`.
    #[inline]
    pub(super) fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    /// Bell-shaped around `mean` with the standard deviation `sd`, never further than `3 sd` away.
    pub(super) fn bell(&mut self, mean: f32, sd: f32) -> f32 {
        mean + 2.0 * sd * (self.unit() + self.unit() + self.unit() - 1.5)
    }

    /// `true` with the given probability.
    #[inline]
    pub(super) fn chance(&mut self, probability: f32) -> bool {
        self.unit() < probability
    }

    /// An index into `weights`, drawn in proportion to them.
    pub(super) fn pick(&mut self, weights: &[f32]) -> usize {
        let mut rest = self.unit() * weights.iter().sum::<f32>();
        for (i, w) in weights.iter().enumerate() {
            rest -= w;
            if rest < 0.0 {
                return i;
            }
        }
        weights.len().saturating_sub(1)
    }

    /// 32 random bits.
    #[inline]
    pub(super) fn bits(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// Fills `bytes` with random bytes.
    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill_bytes(bytes);
    }
}

/// Smooth value noise in `[-1, 1]` on the unit lattice at `(x, y)`; `salt` picks one of many independent fields.
#[inline]
pub(super) fn noise(x: f32, y: f32, salt: u32) -> f32 {
    let (xi, yi) = (floor(x), floor(y));
    let (fx, fy) = (x - xi as f32, y - yi as f32);
    let (sx, sy) = (fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy));
    let at = |i: i32, j: i32| lattice(xi.wrapping_add(i), yi.wrapping_add(j), salt);
    let top = at(0, 0) + (at(1, 0) - at(0, 0)) * sx;
    let bottom = at(0, 1) + (at(1, 1) - at(0, 1)) * sx;
    top + (bottom - top) * sy
}

/// The random value of one lattice point, in `[-1, 1)`.
#[inline]
fn lattice(x: i32, y: i32, salt: u32) -> f32 {
    let mut h = (x as u32).wrapping_mul(0x85eb_ca6b) ^ (y as u32).wrapping_mul(0xc2b2_ae35) ^ salt;
    h = (h ^ (h >> 15)).wrapping_mul(0x2c1b_3c6d);
    h = (h ^ (h >> 12)).wrapping_mul(0x297a_2d39);
    h ^= h >> 15;
    (h >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// `floor` without a call into the maths library.
#[inline]
fn floor(x: f32) -> i32 {
    let i = x as i32;
    i - i32::from(x < i as f32)
}
