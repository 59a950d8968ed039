//! Distances of the student's embeddings from the teacher's: `kernels/distill.cu`.

use candle_core::{Result, bail};

use super::margin::{through_unit_rows, unit_rows_of};
use super::{Arg, Array, Element, Launch, Product};

/// Threads of a block.
const BLOCK: usize = 256;

/// What is squared and summed up, of both batches normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Squares {
    /// The differences of embeddings.
    OfEmbeddings,
    /// The differences of the cosines of all pairs of a batch.
    OfCosines,
}

/// `scale` times the sum of squares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Distance {
    pub squares: Squares,
    pub scale: f32,
    /// Its weight in the objective.
    pub lambda: f32,
}

/// A distance of a batch, and what comes of it, one f32 each.
pub(crate) struct Distilled {
    /// The distance before its weight.
    pub distance: Array,
    /// The objective: `lambda * distance`, plus the margin loss with its weight.
    pub total: Array,
    /// The gradient of `lambda * distance` by the student's embeddings, `(n, d)`, f32.
    pub gradient: Array,
}

impl Distance {
    /// Returns the distance of two batches `(n, d)`, f32, and its gradient; `margin` is the margin loss, one f32, and its weight.
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
                // Each embedding is in two cosines of a pair.
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
