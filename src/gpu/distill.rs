//! Distances between the student's and the teacher's embeddings: `kernels/distill.cu`.

use candle_core::{Result, bail};

use super::margin::{through_unit_rows, unit_rows_of};
use super::{Arg, Array, Element, Launch, Product, fits};
use crate::ops::distance::DistillKind;

/// Threads per block.
const BLOCK: usize = 256;

/// Returns the distance between two batches `(n, d)`, f32, which are normalised here, and `weight` times its gradient
/// with respect to the student's embeddings.
pub(super) fn distance(
    student: &Array,
    teacher: &Array,
    n: usize,
    kind: DistillKind,
    weight: f32,
) -> Result<(Array, Array)> {
    let (device, d) = (student.device(), student.len() / n.max(1));
    if n == 0 || !d.is_multiple_of(8) || n * d != student.len() || teacher.len() != student.len() {
        bail!("distillation: student {}, teacher {} elements in {n} rows", student.len(), teacher.len());
    }
    fits("distillation", Element::F32, &[(Some(student), n * d), (Some(teacher), n * d)])?;
    let (s, inv_norms) = unit_rows_of(student, n)?;
    let (t, _) = unit_rows_of(teacher, n)?;
    let (gradient, squares) = (device.array(Element::F32, n * d)?, device.array(Element::F32, n)?);
    let warps = Launch { grid: [(n * 32).div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 };
    // Factor of the sum of squares.
    let scale = match kind {
        DistillKind::Mse => 1.0 / (n * d) as f32,
        // |s - t|^2 = 2 - 2 cos for unit vectors; the part of the gradient along s does not pass the normalisation.
        DistillKind::Cosine => 0.5 / n as f32,
        DistillKind::Relational => 1.0 / (n * n) as f32,
    };
    match kind {
        DistillKind::Mse | DistillKind::Cosine => {
            let sizes = [Arg::I64(n as i64), Arg::I32(d as i32), Arg::F32(2.0 * scale * weight)];
            let args = [&[s.arg(), t.arg()][..], &sizes, &[gradient.arg(), squares.arg()]].concat();
            // SAFETY: all have n rows of d, and the squares n elements.
            unsafe { device.launch("distill_difference", warps, &args)? };
        }
        DistillKind::Relational => {
            let pairs = device.array(Element::F32, n * n)?;
            for (x, alpha, beta) in [(&s, 1.0, 0.0), (&t, -1.0, 1.0)] {
                let (a, b) = (x.matrix(d), x.matrix(d).transposed());
                device.multiply(&Product { m: n, n, k: d, a, b, c: pairs.matrix(n), alpha, beta })?;
            }
            let args = [pairs.arg(), Arg::I64(n as i64), Arg::I32(n as i32), squares.arg()];
            // SAFETY: there are n rows of n cosines, and n squares.
            unsafe { device.launch("distill_squares", warps, &args)? };
            // The matrix of cosines is symmetric: each pair is in it twice.
            let (alpha, beta) = (4.0 * scale * weight, 0.0);
            let (a, b, c) = (pairs.matrix(n), s.matrix(d), gradient.matrix(d));
            device.multiply(&Product { m: n, n: d, k: n, a, b, c, alpha, beta })?;
        }
    }
    through_unit_rows(student, None, &inv_norms, None, &gradient)?;
    let distance = device.array(Element::F32, 1)?;
    let launch = Launch { grid: [1, 1], block: BLOCK as u32, shared_bytes: (BLOCK / 32 * 4) as u32 };
    let args = [squares.arg(), Arg::I32(n as i32), Arg::F32(scale), distance.arg()];
    // SAFETY: there are n squares and one distance.
    unsafe { device.launch("distill_finish", launch, &args)? };
    Ok((distance, gradient))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tests::{close, device, numbers};
    use crate::ops::backend::Backend;
    use crate::ops::cpu::Cpu;

    #[test]
    fn distances_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (n, d) in [(1, 8), (5, 24), (40, 136)] {
            let [s, t] = ["s", "t"].map(|name| numbers(name, n * d, [-2.0, 2.0]));
            let (on_s, on_t) = (device.upload::<f32>(&s)?, device.upload::<f32>(&t)?);
            for kind in [DistillKind::Mse, DistillKind::Cosine, DistillKind::Relational] {
                let (expected, of_s) = Cpu.distance(&s, &t, n, kind, 30.0)?;
                let (found, gradient) = distance(&on_s, &on_t, n, kind, 30.0)?;
                // The one pair of one image has a cosine of 1 in both batches.
                if (n, kind) != (1, DistillKind::Relational) {
                    close("distance", &found, &[expected as f32], 1e-5)?;
                    close("gradient", &gradient, &of_s, 1e-4)?;
                }
            }
        }
        Ok(())
    }
}
