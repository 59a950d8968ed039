//! Distances between the embeddings of a student and a teacher.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, WithDType, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::normalize::EPS;
use super::slice::{self, for_float};

const NAME: &str = "distillation";

/// Distance between the student's and the teacher's embeddings, both normalised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DistillKind {
    /// Mean of the squared differences over all `N * d` elements, as in MaskInv.
    #[default]
    Mse,
    /// Mean over the rows of `1 - cos`; `d / 2` times the mean squared error.
    Cosine,
    /// Mean over the rows of the squared angle, in radians: the squared distance on the sphere. Near zero it is twice
    /// [`Self::Cosine`]; far from the teacher it pulls harder.
    Angular,
    /// Mean over all `N * N` pairs of the squared difference of their cosines in the two batches (relational
    /// distillation, Park et al., CVPR 2019, on cosines): the student may rotate the embedding space.
    Relational,
}

impl DistillKind {
    /// Returns a row's distance and its derivative, given the squared length `q` of the difference of the two unit
    /// vectors of length `d`. Not for relations, which are not of rows.
    fn of_row(self, q: f64, d: usize) -> (f64, f64) {
        match self {
            Self::Mse => (q / d as f64, 1.0 / d as f64),
            Self::Cosine => (q / 2.0, 0.5),
            Self::Angular => {
                // |s - t| = 2 sin(theta / 2), which keeps small angles exact; at opposite directions the slope is
                // bounded like that of the margin loss.
                let half = (q.sqrt() / 2.0).min(1.0);
                let theta = 2.0 * half.asin();
                let slope = if half > 1e-8 { theta / (2.0 * half * (1.0 - half * half).sqrt().max(1e-3)) } else { 1.0 };
                (theta * theta, slope)
            }
            Self::Relational => (q, 1.0),
        }
    }
}

/// Returns the scalar distance between two batches of embeddings `(N, d)`, f32 or f64, which are normalised here; the
/// weight of the loss is not applied. The student's receive a gradient, the teacher's are constants.
///
/// # Errors
/// When the shapes or dtypes differ, or the tensors are not on the CPU.
pub fn distillation_loss(student: &Tensor, teacher: &Tensor, kind: DistillKind) -> Result<Tensor> {
    if student.dims() != teacher.dims() || student.rank() != 2 || student.dtype() != teacher.dtype() {
        bail!(
            "{NAME}: expected both (N, d) of one dtype, found student {:?}, teacher {:?}",
            student.shape(),
            teacher.shape()
        );
    }
    let op = Distance { teacher: teacher.detach().contiguous()?, kind, gradient: OnceLock::new() };
    student.contiguous()?.apply_op1(op)
}

/// Returns the distance of [`distillation_loss`] and `weight` times its gradient with respect to the student's
/// embeddings.
///
/// - `student`, `teacher`: `(n, d)`, row-major
/// - `row_weights`: a factor for each row's distance; none for 1. Not for [`DistillKind::Relational`].
///
/// # Errors
/// When the lengths do not match, or relations are weighted by rows.
pub fn distance_with_gradient<T: WithDType>(
    student: &[T],
    teacher: &[T],
    n: usize,
    kind: DistillKind,
    weight: f64,
    row_weights: Option<&[f32]>,
) -> Result<(f64, Vec<T>)> {
    let d = student.len() / n.max(1);
    if n == 0 || d == 0 || n * d != student.len() || teacher.len() != student.len() {
        bail!("{NAME}: student {}, teacher {} elements in {n} rows", student.len(), teacher.len());
    }
    check_row_weights(kind, row_weights, n)?;
    let ((s, norms), (t, _)) = (unit_rows(student, d), unit_rows(teacher, d));
    let mut gradient = vec![0.0; n * d];
    let distances: Vec<f64> = match kind {
        DistillKind::Relational => {
            let row = |(i, gradient): (usize, &mut [f64])| {
                let (own, of_teacher) = (&s[i * d..][..d], &t[i * d..][..d]);
                let mut sum = 0.0;
                for j in 0..n {
                    let other = &s[j * d..][..d];
                    let difference = dot(own, other) - dot(of_teacher, &t[j * d..][..d]);
                    sum += difference * difference;
                    // The matrix of cosines is symmetric: each pair is in it twice.
                    add(gradient, other, 4.0 * difference / (n * n) as f64);
                }
                sum / (n * n) as f64
            };
            gradient.par_chunks_mut(d).enumerate().map(row).collect()
        }
        _ => {
            let row = |(i, gradient): (usize, &mut [f64])| {
                let difference = s[i * d..][..d].iter().zip(&t[i * d..][..d]).map(|(s, t)| s - t);
                gradient.iter_mut().zip(difference).for_each(|(g, difference)| *g = difference);
                let (value, slope) = kind.of_row(dot(gradient, gradient), d);
                let share = row_weights.map_or(1.0, |weights| f64::from(weights[i])) / n as f64;
                gradient.iter_mut().for_each(|g| *g *= 2.0 * slope * share);
                value * share
            };
            gradient.par_chunks_mut(d).enumerate().map(row).collect()
        }
    };
    through_unit_rows(&mut gradient, &s, &norms, weight);
    Ok((distances.iter().sum(), gradient.into_iter().map(T::from_f64).collect()))
}

/// Checks the weights of `n` rows.
pub(crate) fn check_row_weights(kind: DistillKind, row_weights: Option<&[f32]>, n: usize) -> Result<()> {
    match row_weights {
        Some(_) if kind == DistillKind::Relational => bail!("{NAME}: relations have no weights of rows"),
        Some(weights) if weights.len() != n => bail!("{NAME}: expected {n} weights of rows, found {}", weights.len()),
        _ => Ok(()),
    }
}

/// Returns the rows of length `d` scaled to length 1, and their lengths.
pub(crate) fn unit_rows<T: WithDType>(x: &[T], d: usize) -> (Vec<f64>, Vec<f64>) {
    let mut unit: Vec<f64> = x.iter().map(|v| v.to_f64()).collect();
    let norm = |row: &mut [f64]| {
        let norm = (dot(row, row) + EPS).sqrt();
        row.iter_mut().for_each(|v| *v /= norm);
        norm
    };
    let norms = unit.chunks_exact_mut(d).map(norm).collect();
    (unit, norms)
}

/// Turns the gradient of [`unit_rows`] into `weight` times that of the rows, in place.
pub(crate) fn through_unit_rows(gradient: &mut [f64], unit: &[f64], norms: &[f64], weight: f64) {
    let d = unit.len() / norms.len().max(1);
    let through = |(i, gradient): (usize, &mut [f64])| {
        let unit = &unit[i * d..][..d];
        let along = dot(gradient, unit);
        add(gradient, unit, -along);
        gradient.iter_mut().for_each(|g| *g *= weight / norms[i]);
    };
    gradient.par_chunks_mut(d).enumerate().for_each(through);
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `y += factor * x`.
pub(crate) fn add(y: &mut [f64], x: &[f64], factor: f64) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

struct Distance {
    teacher: Tensor,
    kind: DistillKind,
    /// Gradient with respect to the student's, once the forward pass has run.
    gradient: OnceLock<Tensor>,
}

impl CustomOp1 for Distance {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, student: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (storage, teacher_layout) = self.teacher.storage_and_layout();
        let Storage::Cpu(teacher) = &*storage else { bail!("{NAME}: expected tensors on the CPU") };
        let (n, _) = layout.shape().dims2()?;
        for_float!(NAME, student, T => {
            let (s, t) = (slice::cpu::<T>(NAME, student, layout)?, slice::cpu::<T>(NAME, teacher, teacher_layout)?);
            let (distance, gradient) = distance_with_gradient(s, t, n, self.kind, 1.0, None)?;
            let gradient = Tensor::from_vec(gradient, layout.shape(), self.teacher.device())?;
            if self.gradient.set(gradient).is_err() {
                bail!("{NAME}: one forward pass per op");
            }
            let distance = <T as WithDType>::from_f64(distance);
            Ok((<T as WithDType>::to_cpu_storage_owned(vec![distance]), Shape::from(())))
        })
    }

    fn bwd(&self, _student: &Tensor, _distance: &Tensor, gy: &Tensor) -> Result<Option<Tensor>> {
        let Some(gradient) = self.gradient.get() else { bail!("{NAME}: backward without the forward pass") };
        Ok(Some((gradient * gy.to_dtype(DType::F64)?.to_scalar::<f64>()?)?))
    }
}
