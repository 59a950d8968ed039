//! Ranks of pairs at the teacher's thresholds: evaluation-oriented distillation (EKD, Huang et al., CVPR 2022).

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::distance::{add, dot, through_unit_rows, unit_rows};

const NAME: &str = "rank loss";

/// False match rates at which the teacher's thresholds are taken: 1e-1 to 1e-6.
pub const NUM_THRESHOLDS: usize = 6;
/// Width of the step from one rank to the next, in units of the cosine.
const TEMPERATURE: f64 = 0.01;
/// Most impostor pairs of a batch, those with the highest cosines of the student.
const MAX_IMPOSTORS: usize = 2000;
/// Share of the thresholds that a batch keeps.
const DECAY: f64 = 0.99;

/// The teacher's thresholds: moving averages over the batches of the cosine that a share of the impostor pairs exceeds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankThresholds {
    /// None before the first batch with impostor pairs.
    pub values: Option<[f64; NUM_THRESHOLDS]>,
}

impl RankThresholds {
    /// Takes the teacher's cosines of a batch's impostor pairs into account.
    fn update(&mut self, mut cosines: Vec<f64>) {
        if cosines.is_empty() || cosines.iter().any(|cosine| !cosine.is_finite()) {
            return;
        }
        cosines.sort_by(|a, b| b.total_cmp(a));
        let of_batch: [f64; NUM_THRESHOLDS] = std::array::from_fn(|k| {
            let num = (0.1f64.powi(k as i32 + 1) * cosines.len() as f64).ceil() as usize;
            cosines[num.clamp(1, cosines.len()) - 1]
        });
        let before = self.values.unwrap_or(of_batch);
        self.values = Some(std::array::from_fn(|k| DECAY * before[k] + (1.0 - DECAY) * of_batch[k]));
    }
}

/// Whom the rows of a batch show.
#[derive(Clone, Copy, Debug)]
pub struct RankRows<'a> {
    /// Class of each row, or -1 if it is not known.
    pub labels: &'a [i64],
    /// Number of images: row `i` is a view of image `i % num_images`.
    pub num_images: usize,
}

impl RankRows<'_> {
    /// Whether two rows show one person; none if that is not known.
    fn is_genuine(&self, i: usize, j: usize) -> Option<bool> {
        let (a, b) = (self.labels[i], self.labels[j]);
        if i % self.num_images == j % self.num_images {
            return Some(true);
        }
        (a >= 0 && b >= 0).then_some(a == b)
    }
}

/// A pair of rows with the student's and the teacher's cosine.
struct Pair {
    rows: [usize; 2],
    student: f64,
    teacher: f64,
}

/// Returns the rank loss, and `weight` times its gradient with respect to the student's embeddings; updates the
/// thresholds.
///
/// The smooth rank of a pair with cosine `c` is the number of thresholds that it exceeds, each with a sigmoid of width
/// 0.01. The loss is the mean squared difference of the student's and the teacher's ranks over the genuine pairs, plus
/// the same over the impostor pairs, of which the 2,000 with the student's highest cosines count: pairs that no
/// threshold tells apart are free. 0 where there are no pairs.
///
/// The paper's formulas are followed as far as they are known to us: the squared difference, the decay of 0.99 and the
/// equal weights of both kinds of pairs are this crate's.
///
/// - `student`, `teacher`: `(n, d)`, row-major, normalised here
///
/// # Errors
/// When the lengths do not match.
pub fn rank_loss_with_gradient(
    student: &[f32],
    teacher: &[f32],
    rows: RankRows,
    thresholds: &mut RankThresholds,
    weight: f64,
) -> Result<(f64, Vec<f32>)> {
    let n = rows.labels.len();
    let d = student.len() / n.max(1);
    if n == 0 || d == 0 || rows.num_images == 0 || [student.len(), teacher.len()] != [n * d; 2] {
        bail!("{NAME}: student {}, teacher {} elements in {n} rows", student.len(), teacher.len());
    }
    let ((s, norms), (t, _)) = (unit_rows(student, d), unit_rows(teacher, d));
    let of_row = |i: usize| {
        let pair = |j: usize| {
            let cosine = |x: &[f64]| dot(&x[i * d..][..d], &x[j * d..][..d]);
            let is_genuine = rows.is_genuine(i, j)?;
            Some((is_genuine, Pair { rows: [i, j], student: cosine(&s), teacher: cosine(&t) }))
        };
        (i + 1..n).filter_map(pair).collect::<Vec<_>>()
    };
    let all: Vec<Vec<(bool, Pair)>> = (0..n).into_par_iter().map(of_row).collect();
    let (genuine, impostor): (Vec<_>, Vec<_>) = all.into_iter().flatten().partition(|(is_genuine, _)| *is_genuine);
    let [genuine, mut impostor] =
        [genuine, impostor].map(|kind| kind.into_iter().map(|(_, pair)| pair).collect::<Vec<_>>());
    thresholds.update(impostor.iter().map(|pair| pair.teacher).collect());
    let Some(values) = thresholds.values else { return Ok((0.0, vec![0.0; n * d])) };
    if impostor.len() > MAX_IMPOSTORS {
        impostor.sort_by(|a, b| b.student.total_cmp(&a.student));
        impostor.truncate(MAX_IMPOSTORS);
    }
    let (mut loss, mut gradient) = (0.0, vec![0.0; n * d]);
    for pairs in [&genuine, &impostor] {
        for pair in pairs {
            let ((of_student, slope), (of_teacher, _)) = (rank(pair.student, &values), rank(pair.teacher, &values));
            let difference = of_student - of_teacher;
            loss += difference * difference / pairs.len() as f64;
            let factor = 2.0 * difference * slope / pairs.len() as f64;
            let [i, j] = pair.rows;
            add(&mut gradient[i * d..][..d], &s[j * d..][..d], factor);
            add(&mut gradient[j * d..][..d], &s[i * d..][..d], factor);
        }
    }
    through_unit_rows(&mut gradient, &s, &norms, weight);
    Ok((loss, gradient.into_iter().map(|g| g as f32).collect()))
}

/// Returns the smooth rank of a cosine and its derivative.
fn rank(cosine: f64, thresholds: &[f64; NUM_THRESHOLDS]) -> (f64, f64) {
    let of_one = |threshold: &f64| {
        let passed = 1.0 / (1.0 + (-(cosine - threshold) / TEMPERATURE).exp());
        (passed, passed * (1.0 - passed) / TEMPERATURE)
    };
    thresholds.iter().map(of_one).fold((0.0, 0.0), |sum, of_one| (sum.0 + of_one.0, sum.1 + of_one.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(seed: f64, len: usize) -> Vec<f32> {
        (0..len).map(|i| (((i as f64 + seed) * 0.618_034).fract() - 0.5) as f32).collect()
    }

    #[test]
    fn the_gradient_is_the_losss() {
        // Views of five images of three people, one of whom is not known.
        let labels = [0, 1, 0, 2, -1, 0, 1, 0, 2, -1];
        let (n, d) = (labels.len(), 6);
        let rows = RankRows { labels: &labels, num_images: 5 };
        let (student, teacher) = (numbers(0.3, n * d), numbers(7.7, n * d));
        let mut thresholds = RankThresholds::default();
        let (loss, gradient) = rank_loss_with_gradient(&student, &teacher, rows, &mut thresholds, 3.0).unwrap();
        assert!(loss > 0.1, "{loss}");
        let at = |student: &[f32]| {
            // The thresholds of the same batch stay as they are.
            rank_loss_with_gradient(student, &teacher, rows, &mut thresholds.clone(), 1.0).unwrap().0
        };
        let step = 1e-4f32;
        let mut seen = 0.0f64;
        for i in 0..n * d {
            let moved = |by: f32| {
                let mut moved = student.clone();
                moved[i] += by;
                at(&moved)
            };
            let expected = 3.0 * (moved(step) - moved(-step)) / f64::from(2.0 * step);
            let found = f64::from(gradient[i]);
            assert!((found - expected).abs() <= 0.02 * expected.abs() + 0.01, "{i}: {found}, expected {expected}");
            seen = seen.max(expected.abs());
        }
        assert!(seen > 1.0, "{seen}");
    }

    #[test]
    fn ranks_that_agree_are_no_loss_and_thresholds_follow_the_teacher() {
        let labels: Vec<i64> = (0..40).collect();
        let rows = RankRows { labels: &labels, num_images: 40 };
        let teacher = numbers(1.1, 40 * 16);
        let mut thresholds = RankThresholds::default();
        let (loss, gradient) = rank_loss_with_gradient(&teacher, &teacher, rows, &mut thresholds, 1.0).unwrap();
        assert!(loss == 0.0 && gradient.iter().all(|g| *g == 0.0));
        let values = thresholds.values.unwrap();
        assert!(values.windows(2).all(|pair| pair[0] <= pair[1]), "{values:?}");
        // A tenth of the 780 impostor pairs has a cosine of the first threshold or more.
        let (t, _) = unit_rows(&teacher, 16);
        let cosine = |i: usize, j: usize| dot(&t[i * 16..][..16], &t[j * 16..][..16]);
        let pairs = (0..40).flat_map(|i| (i + 1..40).map(move |j| (i, j)));
        assert_eq!(pairs.filter(|&(i, j)| cosine(i, j) >= values[0]).count(), 78);
        // A diverged student or teacher leaves them.
        let before = thresholds.clone();
        let broken = vec![f32::NAN; 40 * 16];
        rank_loss_with_gradient(&teacher, &broken, rows, &mut thresholds, 1.0).unwrap();
        assert_eq!(thresholds, before);
        assert!(rank_loss_with_gradient(&teacher[1..], &teacher, rows, &mut thresholds, 1.0).is_err());
        // Nobody is known, and each image is there once: no pairs.
        let unknown = RankRows { labels: &[-1; 40], num_images: 40 };
        let (loss, _) =
            rank_loss_with_gradient(&teacher, &teacher, unknown, &mut RankThresholds::default(), 1.0).unwrap();
        assert_eq!(loss, 0.0);
    }
}
