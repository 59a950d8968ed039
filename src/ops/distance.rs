//! Distances between the embeddings of a student and a teacher.

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::normalize::l2_normalize;

/// Distance between the student's and the teacher's embeddings, both normalised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DistillKind {
    /// Mean of the squared differences over all `N * d` elements, as in MaskInv.
    #[default]
    Mse,
    /// Mean over the rows of `1 - cos`; `d / 2` times the mean squared error.
    Cosine,
    /// Mean over all `N * N` pairs of the squared difference of their cosines in the two batches (relational
    /// distillation, Park et al., CVPR 2019, on cosines): the student may rotate the embedding space.
    Relational,
}

/// Returns the scalar distance between two batches of embeddings `(N, d)`, which are normalised here; `lambda` is not
/// applied.
///
/// # Errors
/// When the shapes differ.
pub fn distillation_loss(student: &Tensor, teacher: &Tensor, kind: DistillKind) -> Result<Tensor> {
    if student.dims() != teacher.dims() || student.rank() != 2 {
        bail!("distillation: expected both (N, d), found student {:?}, teacher {:?}", student.shape(), teacher.shape());
    }
    let (s, t) = (l2_normalize(student, 1)?, l2_normalize(teacher, 1)?);
    match kind {
        DistillKind::Mse => (s - t)?.sqr()?.mean_all(),
        DistillKind::Cosine => 1.0 - (s * t)?.sum(1)?.mean_all()?,
        DistillKind::Relational => (s.matmul(&s.t()?)? - t.matmul(&t.t()?)?)?.sqr()?.mean_all(),
    }
}
