//! A noise tile that repeats in both directions.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Side of the tile: a power of two.
const SIDE: usize = 64;

/// A tile of random values in `[-1, 1]`, always the same one; callers vary it by an offset.
#[derive(Clone, Debug)]
pub(super) struct Noise(Box<[f32; SIDE * SIDE]>);

impl Noise {
    pub fn new() -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        Self(Box::new(std::array::from_fn(|_| rng.random_range(-1.0..=1.0))))
    }

    /// Returns the value of cell `(x, y)`.
    #[inline(always)]
    pub fn cell(&self, x: i32, y: i32) -> f32 {
        self.0[(y as usize % SIDE) * SIDE + x as usize % SIDE]
    }

    /// Returns the value at `(x, y)`, interpolated between cells.
    #[inline(always)]
    pub fn smooth(&self, x: f32, y: f32) -> f32 {
        let ((left, fx), (top, fy)) = (split(x), split(y));
        let row = |y| {
            let from = self.cell(left, y);
            from + fx * (self.cell(left.wrapping_add(1), y) - from)
        };
        let from = row(top);
        from + fy * (row(top.wrapping_add(1)) - from)
    }
}

/// Fractional part `x - floor(x)`, `[0, 1]`.
#[inline(always)]
pub(super) fn fraction(x: f32) -> f32 {
    split(x).1
}

/// Returns the floor and the fractional part. Without SSE 4.1 `floor` is a slow call; this is not.
#[inline(always)]
fn split(x: f32) -> (i32, f32) {
    let toward_zero = x as i32;
    let below = toward_zero.saturating_sub(i32::from((toward_zero as f32) > x));
    (below, x - below as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tile_repeats_without_a_seam_on_both_sides_of_zero() {
        let noise = Noise::new();
        assert_eq!(noise.cell(-1, -1), noise.cell(63, 63));
        assert!((noise.smooth(-0.5, 3.25) - noise.smooth(63.5, 67.25)).abs() < 1e-6);
        assert_eq!((split(-0.25), split(2.5), split(-3.0)), ((-1, 0.75), (2, 0.5), (-3, 0.0)));
    }
}
