//! The softmax over a row of cosines, block by block.

use super::kernel::{BLOCK, Real};
use crate::dist::Ranks;

/// Number of independent partial sums, enough for the vectors of any machine.
const LANES: usize = 16;

/// Running softmax sum of a row's logits, without the target's.
#[derive(Clone)]
pub(super) struct RowSum<T> {
    /// Largest logit so far.
    pub max: f64,
    /// Sum of `exp(logit - max)`; a NaN anywhere makes it NaN.
    pub sum: f64,
    /// Cosine of the target, not clamped, once its block was added.
    pub target: Option<T>,
}

impl<T> Default for RowSum<T> {
    fn default() -> Self {
        Self { max: f64::NEG_INFINITY, sum: 0.0, target: None }
    }
}

impl<T: Real> RowSum<T> {
    /// Adds the first `valid` cosines of a block; `target` is the target's index in the block.
    #[inline(always)]
    pub fn add(&mut self, cosine: &[T; BLOCK], valid: usize, target: Option<usize>, scale: T) {
        let nothing = T::from_f64(f64::NEG_INFINITY);
        let mut logits = [nothing; BLOCK];
        for j in 0..BLOCK {
            logits[j] = clamp(cosine[j]) * scale;
        }
        logits[valid..].fill(nothing);
        if let Some(target) = target {
            logits[target] = nothing;
            self.target = Some(cosine[target]);
        }
        let mut maxima = [nothing; LANES];
        for logits in logits.as_chunks::<LANES>().0 {
            for j in 0..LANES {
                maxima[j] = if logits[j] > maxima[j] { logits[j] } else { maxima[j] };
            }
        }
        let max = maxima.iter().fold(nothing, |max, &lane| if lane > max { lane } else { max });
        // Only NaN, or no logits at all: the sum tells which.
        let base = if max == nothing { T::zero() } else { max };
        let mut sums = [T::zero(); LANES];
        for logits in logits.as_chunks::<LANES>().0 {
            for j in 0..LANES {
                sums[j] += T::exp(logits[j] - base);
            }
        }
        self.add_sum(max.to_f64(), sums.iter().map(|s| s.to_f64()).sum());
    }

    fn add_sum(&mut self, max: f64, sum: f64) {
        if max > self.max {
            self.sum *= (self.max - max).exp();
            self.max = max;
        }
        // exp(-inf - -inf) is NaN, but without any logit there is nothing to add.
        if sum != 0.0 {
            self.sum += sum * if max == self.max { 1.0 } else { (max - self.max).exp() };
        }
    }

    /// Adds the classes of `other`.
    pub fn join(&mut self, other: &Self) {
        self.add_sum(other.max, other.sum);
        if other.target.is_some() {
            self.target = other.target;
        }
    }

    /// Joins the sums of the same rows over the classes of each rank, in the order of the ranks.
    pub fn over_ranks(sums: &[Self], ranks: &Ranks) -> crate::Result<Vec<Self>> {
        /// Numbers of a row: largest logit, sum, whether the target is among the classes, its cosine.
        const NUM: usize = 4;
        let numbers = |row: &Self| [row.max, row.sum, f64::from(u8::from(row.target.is_some())), row.cosine()];
        let given: Vec<f64> = sums.iter().flat_map(numbers).collect();
        let mut joined = vec![Self::default(); sums.len()];
        for of_rank in ranks.gather_f64(&given)? {
            if of_rank.len() != given.len() {
                let what =
                    format!("{} rows of a margin loss on one rank, {} on another", of_rank.len() / NUM, sums.len());
                return Err(crate::Error::Ranks(what));
            }
            for (joined, [max, sum, has_target, cosine]) in joined.iter_mut().zip(of_rank.as_chunks::<NUM>().0) {
                let target = (*has_target == 1.0).then(|| T::from_f64(*cosine));
                joined.join(&Self { max: *max, sum: *sum, target });
            }
        }
        Ok(joined)
    }

    /// The target's cosine, not clamped; 0 without a target.
    fn cosine(&self) -> f64 {
        self.target.map_or(0.0, |target| target.to_f64())
    }

    /// Adds the logit of the target.
    pub fn add_logit(&mut self, logit: f64) {
        self.add_sum(logit, if logit.is_nan() { f64::NAN } else { 1.0 });
    }

    /// The target's cosine, clamped.
    pub fn target_cosine(&self) -> Option<f64> {
        self.target.map(|t| clamp(t).to_f64())
    }

    /// Whether the target's cosine was not clamped, so that it gets a gradient.
    pub fn is_target_inside(&self) -> bool {
        self.target.is_some_and(|t| t == clamp(t))
    }
}

/// Terms of the loss's gradient with respect to the cosines of a row.
pub(super) struct Gradient<T> {
    /// Whether the row has a label; one without gets no gradient.
    pub is_known: bool,
    /// Target class, if it is among the classes.
    pub label: Option<usize>,
    /// Gradient of the target's cosine.
    pub target: T,
    /// Largest logit.
    pub max: T,
    /// Factor of `exp(logit - max)`.
    pub factor: T,
    /// Factor from cosines to logits.
    pub scale: T,
}

impl<T: Real> Gradient<T> {
    /// Writes the gradient of the first `valid` cosines of the block that begins with class `first`, and zeros after
    /// them.
    #[inline(always)]
    pub fn of_cosines(&self, cosine: &[T; BLOCK], valid: usize, first: usize, g: &mut [T; BLOCK]) {
        if !self.is_known {
            return g.fill(T::zero());
        }
        for j in 0..BLOCK {
            let inside = clamp(cosine[j]);
            let p = T::exp(inside * self.scale - self.max) * self.factor;
            g[j] = if cosine[j] == inside { p } else { T::zero() };
        }
        if let Some(label) = self.label.filter(|label| (first..first + valid).contains(label)) {
            g[label - first] = self.target;
        }
        g[valid..].fill(T::zero());
    }
}

/// Clamps to `[-1, 1]`. NaN passes, so that a diverged network is noticed.
#[inline(always)]
pub(super) fn clamp<T: Real>(x: T) -> T {
    let (one, minus_one) = (T::one(), T::zero() - T::one());
    let x = if x > one { one } else { x };
    if x < minus_one { minus_one } else { x }
}
