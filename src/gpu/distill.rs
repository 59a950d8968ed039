//! Distances between the student's and the teacher's embeddings: `kernels/distill.cu`.

use candle_core::{Result, bail};

use super::margin::{through_unit_rows, unit_rows_of};
use super::{Arg, Array, Element, Launch, Product};

/// Threads per block.
const BLOCK: usize = 256;

/// Differences whose squares are summed; both batches are normalised first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Squares {
    /// Differences of embeddings.
    OfEmbeddings,
    /// Differences of the cosines of all pairs within a batch.
    OfCosines,
}

/// A distance between batches: `scale` times the sum of squares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Distance {
    pub squares: Squares,
    pub scale: f32,
    /// Weight in the objective.
    pub lambda: f32,
}

/// Distance, objective and gradient of a batch.
pub(crate) struct Distilled {
    /// Unweighted distance, one f32.
    pub distance: Array,
    /// Objective, one f32: `lambda * distance` plus the weighted margin loss.
    pub total: Array,
    /// Gradient of `lambda * distance` with respect to the student's embeddings, `(n, d)`, f32.
    pub gradient: Array,
}

impl Distance {
    /// Returns the distance between two batches `(n, d)`, f32, with its gradient; `margin` is the margin loss, one f32,
    /// and its weight.
    pub fn with_gradient(
        &self,
        student: &Array,
        teacher: &Array,
        n: usize,
        margin: Option<(&Array, f32)>,
    ) -> Result<Distilled> {
        let (device, d) = (student.device(), student.len() / n.max(1));
        if n == 0 || !d.is_multiple_of(8) || n * d != student.len() || teacher.len() != student.len() {
            bail!("distillation: student {}, teacher {} elements in {n} rows", student.len(), teacher.len());
        }
        let (s, inv_norms) = unit_rows_of(student, n)?;
        let (t, _) = unit_rows_of(teacher, n)?;
        let (gradient, squares) = (device.array(Element::F32, n * d)?, device.array(Element::F32, n)?);
        let warps = Launch { grid: [(n * 32).div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 };
        match self.squares {
            Squares::OfEmbeddings => {
                let factor = 2.0 * self.scale * self.lambda;
                let sizes = [Arg::I64(n as i64), Arg::I32(d as i32), Arg::F32(factor)];
                let args = [&[s.arg(), t.arg()][..], &sizes, &[gradient.arg(), squares.arg()]].concat();
                device.launch("distill_difference", warps, &args)?;
            }
            Squares::OfCosines => {
                let pairs = device.array(Element::F32, n * n)?;
                for (x, alpha, beta) in [(&s, 1.0, 0.0), (&t, -1.0, 1.0)] {
                    let (a, b) = (x.matrix(d), x.matrix(d).transposed());
                    device.gpu().multiply(&Product { m: n, n, k: d, a, b, c: pairs.matrix(n), alpha, beta })?;
                }
                let args = [pairs.arg(), Arg::I64(n as i64), Arg::I32(n as i32), squares.arg()];
                device.launch("distill_squares", warps, &args)?;
                // The matrix of cosines is symmetric: each pair is in it twice.
                let (alpha, beta) = (4.0 * self.scale * self.lambda, 0.0);
                let (a, b, c) = (pairs.matrix(n), s.matrix(d), gradient.matrix(d));
                device.gpu().multiply(&Product { m: n, n: d, k: n, a, b, c, alpha, beta })?;
            }
        }
        through_unit_rows(student, Arg::Pointer(0), &inv_norms, None, &gradient)?;
        let (distance, total) = (device.array(Element::F32, 1)?, device.array(Element::F32, 1)?);
        let args = [
            squares.arg(),
            Arg::I32(n as i32),
            Arg::F32(self.scale),
            Arg::F32(self.lambda),
            margin.map(|(margin, _)| margin).into(),
            Arg::F32(margin.map_or(0.0, |(_, weight)| weight)),
            distance.arg(),
            total.arg(),
        ];
        let launch = Launch { grid: [1, 1], block: BLOCK as u32, shared_bytes: (BLOCK / 32 * 4) as u32 };
        device.launch("distill_finish", launch, &args)?;
        Ok(Distilled { distance, total, gradient })
    }
}
