//! Whether a face wears a mask, from a backbone's own features.

use serde::{Deserialize, Serialize};

use super::{ComputedWith, Model, ModelConfig};
use crate::error::{Error, Result};
use crate::nn::{Graph, NodeId, Op};
use crate::ops::search::dot;
use crate::parallel;

/// Factor between the sides of the images and of the features.
const FACTOR: usize = 16;
/// Most steps of the solver, which converges in fewer.
const MAX_STEPS: usize = 500;
/// Relative size of the residual at which the solver stops.
const PRECISION: f64 = 1e-5;
/// Columns that are summed together.
const BLOCK: usize = 64;
/// Weight of the penalty, relative to the features' mean variance.
const RIDGE: f64 = 0.02;
/// Number of parts of the faces: each is judged by a head that is fitted on the others.
const PARTS: usize = 5;
/// Least share of faces that must be right.
const LEAST_ACCURACY: f32 = 0.8;

/// Says whether a face wears a mask: a linear function of a backbone's features in its last stage, averaged over the
/// columns of the image, so that it sees what is how high in the face. Its score is the least-squares estimate of the
/// probability, 0 to 1; from 0.5 on a mask is worn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskHead {
    /// Weight of each channel in each row, `(rows, channels)`, row-major.
    weights: Vec<f32>,
    /// Score where all features are 0.
    bias: f32,
    /// Number of rows of the features.
    rows: usize,
    /// What it was fitted on, for people.
    pub fitted_on: String,
    /// Share of the faces, without a mask and with a drawn one, that are right with a head fitted on four fifths of the
    /// others; none in files that were written before this was measured.
    #[serde(default)]
    pub accuracy: Option<f32>,
    /// The network that it was fitted to; its precision does not matter.
    fitted_with: ComputedWith,
}

/// Features of one image, averaged over the columns: `(rows, channels)`, row-major.
pub(super) type Profile = Vec<f32>;

/// Returns the means over the columns of features `(h, w, c)`, of whose channels the first `channels` count.
pub(super) fn profile(features: &[f32], [h, w, c]: [usize; 3], channels: usize) -> Profile {
    let mut means = vec![0.0; h * channels];
    for (row, means) in features.chunks_exact(w * c).zip(means.chunks_exact_mut(channels)) {
        for pixel in row.chunks_exact(c) {
            means.iter_mut().zip(pixel).for_each(|(mean, value)| *mean += value / w as f32);
        }
    }
    means
}

/// Returns the node of the features: the first sum in the last stage of a residual network.
pub(super) fn features_of(graph: &Graph) -> Option<NodeId> {
    let mut factors: Vec<usize> = Vec::new();
    for (id, node) in graph.nodes().iter().enumerate() {
        let of_input = node.inputs.first().map_or(1, |input| factors[*input]);
        let factor = if let Op::Conv2d(config) = &node.op { of_input * config.stride } else { of_input };
        if node.op == Op::Add && factor == FACTOR {
            return Some(id);
        }
        factors.push(factor);
    }
    None
}

/// Number of rows of a network's features.
pub(super) fn num_rows(config: &ModelConfig) -> usize {
    config.input_size / FACTOR
}

/// Number of channels of a network's features; none if it shows none.
fn num_channels(model: &Model) -> Option<usize> {
    let nodes = model.graph().nodes();
    let mut node = &nodes[features_of(model.graph())?];
    while !matches!(node.op, Op::Conv2d(_)) {
        node = &nodes[*node.inputs.first()?];
    }
    model.params().shapes().get(&node.param("weight"))?.first().copied()
}

impl MaskHead {
    /// Score from which a mask is worn.
    pub const WORN: f32 = 0.5;

    /// Fits a head to the features of faces, each without a mask and with one, and judges it by five-fold
    /// cross-validation over the faces.
    ///
    /// # Errors
    /// When there are fewer faces than folds, features differ in length, or too few faces of other folds are right for
    /// the head to be of use.
    pub(super) fn validated<'p>(
        [without, with]: [&'p [Profile]; 2],
        rows: usize,
        fitted_on: &str,
        fitted_with: &ComputedWith,
    ) -> Result<Self> {
        let fit = |is_used: &dyn Fn(usize) -> bool| {
            let used = |profiles: &'p [Profile]| -> Vec<&'p Profile> {
                profiles.iter().enumerate().filter(|(k, _)| is_used(*k)).map(|(_, profile)| profile).collect()
            };
            Self::fit(&used(without), &used(with), rows, fitted_on, fitted_with)
        };
        let mut num_right = 0;
        for part in 0..PARTS {
            let head = fit(&|k| k % PARTS != part)?;
            let of_part = |profiles: &[Profile], is_masked: bool| {
                let is_right = |profile: &&Profile| (head.score(profile) >= Self::WORN) == is_masked;
                profiles.iter().skip(part).step_by(PARTS).filter(is_right).count()
            };
            num_right += of_part(without, false) + of_part(with, true);
        }
        let accuracy = num_right as f32 / (without.len() + with.len()) as f32;
        if accuracy < LEAST_ACCURACY {
            return Err(Error::Training(format!(
                "mask head: is right for {:.0} % of the faces that it was not fitted on, expected {:.0} % or more",
                100.0 * accuracy,
                100.0 * LEAST_ACCURACY
            )));
        }
        Ok(Self { accuracy: Some(accuracy), ..fit(&|_| true)? })
    }

    /// Fits a head to the features of faces without a mask and with one: ridge regression on 0 and 1, by conjugate
    /// gradients.
    ///
    /// # Errors
    /// When there are none of either, or they differ in length.
    fn fit(
        without: &[&Profile],
        with: &[&Profile],
        rows: usize,
        fitted_on: &str,
        fitted_with: &ComputedWith,
    ) -> Result<Self> {
        let wrong = |what: &str| Err(Error::Training(format!("mask head: {what}")));
        let all: Vec<&Profile> = without.iter().chain(with).copied().collect();
        if without.is_empty() || with.is_empty() {
            return wrong("expected faces without a mask and with one");
        }
        let len = all[0].len();
        if all.iter().any(|profile| profile.len() != len || profile.iter().any(|value| !value.is_finite())) {
            return wrong("expected finite features of one length");
        }
        let n = all.len() as f64;
        let mean = |i: usize| all.iter().map(|profile| f64::from(profile[i])).sum::<f64>() / n;
        let means: Vec<f64> = parallel::map(len, mean);
        let centred = |k: usize| all[k].iter().zip(&means).map(|(v, mean)| (f64::from(*v) - mean) as f32).collect();
        let centred: Vec<Vec<f32>> = parallel::map(all.len(), centred);
        let variance = centred.iter().flatten().map(|v| f64::from(*v).powi(2)).sum::<f64>() / (n * len as f64);
        if variance == 0.0 {
            return wrong("the network gives all faces the same features");
        }
        let share = with.len() as f64 / n;
        let target = |k: usize| if k < without.len() { -share } else { 1.0 - share };
        // (Z' Z / n + RIDGE * variance) w = Z' y / n
        let transposed = |values: &[f64]| -> Vec<f64> {
            let block = |i: usize| {
                let columns = i * BLOCK..((i + 1) * BLOCK).min(len);
                let mut sums = vec![0.0; columns.len()];
                for (row, value) in centred.iter().zip(values) {
                    sums.iter_mut().zip(&row[columns.clone()]).for_each(|(sum, v)| *sum += f64::from(*v) * value / n);
                }
                sums
            };
            parallel::map(len.div_ceil(BLOCK), block).concat()
        };
        let times = |w: &[f64]| -> Vec<f64> {
            let dot = |k: usize| centred[k].iter().zip(w).map(|(v, w)| f64::from(*v) * w).sum::<f64>();
            let mut product = transposed(&parallel::map(all.len(), dot));
            product.iter_mut().zip(w).for_each(|(product, w)| *product += RIDGE * variance * w);
            product
        };
        let right = transposed(&(0..all.len()).map(target).collect::<Vec<_>>());
        let weights = solve(times, right);
        let bias = share - weights.iter().zip(&means).map(|(w, mean)| w * mean).sum::<f64>();
        let weights = weights.into_iter().map(|w| w as f32).collect();
        let (fitted_on, fitted_with) = (fitted_on.to_owned(), fitted_with.clone());
        Ok(Self { weights, bias: bias as f32, rows, fitted_on, accuracy: None, fitted_with })
    }

    /// Whether it was fitted to the weights and the preprocessing that a network has now.
    pub(super) fn is_for(&self, now: &ComputedWith) -> bool {
        (&self.fitted_with.weights, &self.fitted_with.preprocessing) == (&now.weights, &now.preprocessing)
    }

    /// Returns the score of an image's profile.
    pub(super) fn score(&self, profile: &Profile) -> f32 {
        (dot(&self.weights, profile) as f32 + self.bias).clamp(0.0, 1.0)
    }

    /// Checks that the head fits a network.
    ///
    /// # Errors
    /// Says what does not.
    pub(super) fn check(&self, model: &Model) -> Result<()> {
        let shape = num_channels(model).map(|channels| [num_rows(model.config()), channels]);
        let is_finite = self.bias.is_finite() && self.weights.iter().all(|weight| weight.is_finite());
        let fits = |[rows, channels]: [usize; 2]| self.rows == rows && self.weights.len() == rows * channels;
        if is_finite && shape.is_some_and(fits) {
            return Ok(());
        }
        let expected = shape.map_or("no head for this network".to_owned(), |[rows, channels]| {
            format!("finite weights of {rows} rows and {channels} channels")
        });
        let (found, rows) = (self.weights.len(), self.rows);
        Err(Error::Config(format!("mask head: expected {expected}, found {found} weights of {rows} rows")))
    }
}

impl std::fmt::Display for MaskHead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { fitted_on, accuracy, .. } = self;
        write!(f, "fitted on {fitted_on}")?;
        accuracy
            .map_or(Ok(()), |share| write!(f, ", right for {:.1} % of faces that it was not fitted on", 100.0 * share))
    }
}

/// Solves `a x = b` for a symmetric positive definite `a` by conjugate gradients (Hestenes and Stiefel, 1952).
fn solve(times: impl Fn(&[f64]) -> Vec<f64>, b: Vec<f64>) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut x = vec![0.0; b.len()];
    let (mut residual, mut direction) = (b.clone(), b.clone());
    let mut square = dot(&residual, &residual);
    let enough = square * PRECISION * PRECISION;
    for _ in 0..MAX_STEPS {
        if square <= enough {
            break;
        }
        let product = times(&direction);
        let step = square / dot(&direction, &product);
        x.iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
        residual.iter_mut().zip(&product).for_each(|(r, p)| *r -= step * p);
        let next = dot(&residual, &residual);
        let share = next / square;
        direction.iter_mut().zip(&residual).for_each(|(d, r)| *d = r + share * *d);
        square = next;
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Arch;
    use crate::preprocessing::Preprocessing;

    #[test]
    fn features_are_the_first_sum_of_the_last_stage() {
        for arch in Arch::ALL {
            let config = ModelConfig { arch, width: 0.125, input_size: 32, ..ModelConfig::default() };
            let model = Model::outline(&config).unwrap();
            let node = features_of(model.graph()).unwrap();
            let before: Vec<&str> = model.graph().nodes()[..node].iter().map(|node| node.path.as_str()).collect();
            let stage = if arch.layers().is_some() { "layer4.0." } else { "layers.7." };
            assert!(before.iter().rev().find(|path| !path.is_empty()).unwrap().starts_with(stage), "{arch:?}");
            let channels = if arch.layers().is_some() { 64 } else { 32 };
            assert_eq!(num_channels(&model), Some(channels), "{arch:?}");
        }
        assert_eq!(features_of(&Graph::new()), None);
    }

    #[test]
    fn a_profile_is_the_mean_of_each_row() {
        let features: Vec<f32> = (0..12).map(|i| i as f32).collect();
        assert_eq!(profile(&features, [2, 3, 2], 2), [2.0, 3.0, 8.0, 9.0]);
        assert_eq!(profile(&features, [2, 3, 2], 1), [2.0, 8.0]);
    }

    #[test]
    fn a_fitted_head_tells_the_two_kinds_apart() {
        let face = |k: usize, mask: f32| -> Profile {
            (0..12).map(|i| ((k * 12 + i) as f32 * 1.7).sin() + if i >= 8 { mask } else { 0.0 }).collect()
        };
        let faces = |mask: f32, from: usize| (from..from + 40).map(|k| face(k, mask)).collect::<Vec<_>>();
        let fit = |without: &[Profile], with: &[Profile]| {
            let (preprocessing, precision) = (Preprocessing::default(), "f32".to_owned());
            let fitted_with = ComputedWith { preprocessing, weights: "a".to_owned(), precision };
            MaskHead::validated([without, with], 3, "sines", &fitted_with)
        };
        let head = fit(&faces(0.0, 0), &faces(3.0, 40)).unwrap();
        for k in 100..140 {
            assert!(head.score(&face(k, 0.0)) < 0.5 && head.score(&face(k, 3.0)) > 0.5, "{k}");
        }
        // The normal equations hold: a step along any weight does not lower the penalised error.
        let error = |head: &MaskHead| {
            let (a, b) = (faces(0.0, 0), faces(3.0, 40));
            let raw = |profile: &Profile| dot(&head.weights, profile) + f64::from(head.bias);
            let errors = a.iter().map(|p| raw(p).powi(2)).chain(b.iter().map(|p| (raw(p) - 1.0).powi(2)));
            let all: Vec<&Profile> = a.iter().chain(&b).collect();
            let mean = |i: usize| all.iter().map(|p| f64::from(p[i])).sum::<f64>() / 80.0;
            let of = |i: usize| all.iter().map(|p| (f64::from(p[i]) - mean(i)).powi(2)).sum::<f64>();
            let variance = (0..12).map(of).sum::<f64>() / (80.0 * 12.0);
            let size: f64 = head.weights.iter().map(|w| f64::from(*w).powi(2)).sum();
            errors.sum::<f64>() / 80.0 + RIDGE * variance * size
        };
        let least = error(&head);
        for i in 0..12 {
            for step in [-1e-3, 1e-3] {
                let mut moved = head.clone();
                moved.weights[i] += step;
                assert!(error(&moved) >= least - 1e-9, "{i}");
            }
        }
        assert!(head.accuracy.is_some_and(|share| (0.95..=1.0).contains(&share)), "{:?}", head.accuracy);
        let useless = fit(&faces(0.0, 0), &faces(0.0, 40)).unwrap_err().to_string();
        assert!(useless.contains("mask head: is right for"), "{useless}");
        let constant = vec![vec![1.0; 12]; 3];
        for wrong in [fit(&[], &faces(1.0, 0)), fit(&constant, &constant)] {
            assert!(wrong.unwrap_err().to_string().starts_with("training: mask head"));
        }
        let mut now = head.fitted_with.clone();
        now.precision = "bf16".to_owned();
        assert!(head.is_for(&now));
        now.weights = "b".to_owned();
        assert!(!head.is_for(&now));
    }
}
