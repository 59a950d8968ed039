//! Distances between the student's and the teacher's embeddings, and class centres that the teacher's pull:
//! `kernels/distill.cu`.

use std::collections::BTreeMap;

use candle_core::{Result, bail};

use super::margin::{through_unit_rows, unit_rows_of, warps};
use super::{Arg, Array, Element, Launch, Product, fits};
use crate::ops::centres;
use crate::ops::distance::{DistillKind, check_row_weights};

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
    row_weights: Option<&[f32]>,
) -> Result<(Array, Array)> {
    let (device, d) = (student.device(), student.len() / n.max(1));
    if n == 0 || !d.is_multiple_of(8) || n * d != student.len() || teacher.len() != student.len() {
        bail!("distillation: student {}, teacher {} elements in {n} rows", student.len(), teacher.len());
    }
    check_row_weights(kind, row_weights, n)?;
    fits("distillation", Element::F32, &[(Some(student), n * d), (Some(teacher), n * d)])?;
    let (s, inv_norms) = unit_rows_of(student, n)?;
    let (t, _) = unit_rows_of(teacher, n)?;
    let (gradient, distances) = (device.array(Element::F32, n * d)?, device.array(Element::F32, n)?);
    // Factor of the sum over the rows.
    let scale = match kind {
        DistillKind::Mse | DistillKind::Cosine | DistillKind::Angular => {
            let scale = 1.0 / n as f32;
            let number = match kind {
                DistillKind::Mse => 0,
                DistillKind::Cosine => 1,
                DistillKind::Angular | DistillKind::Relational => 2,
            };
            let row_weights = row_weights.map(|weights| device.upload(weights)).transpose()?;
            let args = [
                s.arg(),
                t.arg(),
                Arg::I64(n as i64),
                Arg::I32(d as i32),
                Arg::I32(number),
                row_weights.as_ref().into(),
                Arg::F32(scale * weight),
                gradient.arg(),
                distances.arg(),
            ];
            // SAFETY: all have n rows of d, and the weights and distances n elements.
            unsafe { device.launch("distill_rows", warps(n), &args)? };
            scale
        }
        DistillKind::Relational => {
            let scale = 1.0 / (n * n) as f32;
            let pairs = device.array(Element::F32, n * n)?;
            for (x, alpha, beta) in [(&s, 1.0, 0.0), (&t, -1.0, 1.0)] {
                let (a, b) = (x.matrix(d), x.matrix(d).transposed());
                device.multiply(&Product { m: n, n, k: d, a, b, c: pairs.matrix(n), alpha, beta })?;
            }
            let args = [pairs.arg(), Arg::I64(n as i64), Arg::I32(n as i32), distances.arg()];
            // SAFETY: there are n rows of n cosines, and n sums of their squares.
            unsafe { device.launch("distill_squares", warps(n), &args)? };
            // The matrix of cosines is symmetric: each pair is in it twice.
            let (alpha, beta) = (4.0 * scale * weight, 0.0);
            let (a, b, c) = (pairs.matrix(n), s.matrix(d), gradient.matrix(d));
            device.multiply(&Product { m: n, n: d, k: n, a, b, c, alpha, beta })?;
            scale
        }
    };
    through_unit_rows(student, &inv_norms, None, &gradient)?;
    let distance = device.array(Element::F32, 1)?;
    let launch = Launch { grid: [1, 1], block: BLOCK as u32, shared_bytes: (BLOCK / 32 * 4) as u32 };
    let args = [distances.arg(), Arg::I32(n as i32), Arg::F32(scale), distance.arg()];
    // SAFETY: there are n distances of rows, and one of all.
    unsafe { device.launch("distill_finish", launch, &args)? };
    Ok((distance, gradient))
}

/// Pulls class centres `(classes, d)`, f32, towards the teacher's rows `(n, d)`, f32.
pub(super) fn pull_centres(all: &Array, student: &Array, teacher: &Array, labels: &[i64]) -> Result<()> {
    let (device, n) = (student.device(), labels.len());
    let d = student.len() / n.max(1);
    centres::check(n, [student.len(), teacher.len()], all.len(), labels)?;
    if !d.is_multiple_of(8) {
        bail!("adaptive centres: rows of {d} elements");
    }
    fits("adaptive centres", Element::F32, &[(Some(all), all.len()), (Some(student), n * d), (Some(teacher), n * d)])?;
    let mut rows_of = BTreeMap::<i64, Vec<i32>>::new();
    for (row, label) in labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
        rows_of.entry(*label).or_default().push(row as i32);
    }
    if rows_of.is_empty() {
        return Ok(());
    }
    let (s, _) = unit_rows_of(student, n)?;
    let (t, _) = unit_rows_of(teacher, n)?;
    let (mut starts, mut order) = (vec![0i32], Vec::<i32>::with_capacity(n));
    for rows in rows_of.values() {
        order.extend(rows);
        starts.push(order.len() as i32);
    }
    let classes: Vec<i64> = rows_of.into_keys().collect();
    let num = classes.len();
    let (classes, starts, order) = (device.upload(&classes)?, device.upload(&starts)?, device.upload(&order)?);
    let args = [
        s.arg(),
        t.arg(),
        Arg::I32(d as i32),
        classes.arg(),
        starts.arg(),
        order.arg(),
        Arg::I32(num as i32),
        all.arg(),
    ];
    // SAFETY: the rows in the order are of the batch, and the classes of the centres; each class occurs once.
    unsafe { device.launch("distill_pull", warps(num), &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tests::{close, device, numbers};
    use crate::ops::backend::{Backend, Order};
    use crate::ops::cpu::Cpu;

    #[test]
    fn distances_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (n, d) in [(1, 8), (5, 24), (40, 136)] {
            let [s, t] = ["s", "t"].map(|name| numbers(name, n * d, [-2.0, 2.0]));
            let weights = numbers("weights", n, [0.5, 2.0]);
            let (on_s, on_t) = (device.upload::<f32>(&s)?, device.upload::<f32>(&t)?);
            for kind in [DistillKind::Mse, DistillKind::Cosine, DistillKind::Angular, DistillKind::Relational] {
                for weights in [None, Some(&weights[..])] {
                    if (n, kind) == (1, DistillKind::Relational)
                        || (kind == DistillKind::Relational && weights.is_some())
                    {
                        // The one pair of one image has a cosine of 1 in both batches; relations are not weighted.
                        continue;
                    }
                    let (expected, of_s) = Cpu.distance(&s, &t, n, kind, 30.0, weights)?;
                    let (found, gradient) = distance(&on_s, &on_t, n, kind, 30.0, weights)?;
                    close("distance", &found, &[expected as f32], 1e-5)?;
                    close("gradient", &gradient, &of_s, 1e-4)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn pulled_centres_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        let labels = [3, -1, 0, 3, 11, 3, 0];
        for (d, k) in [(8, 12), (136, 40)] {
            let n = labels.len();
            let [mut s, t] = ["s", "t"].map(|name| numbers(name, n * d, [-1.0, 1.0]));
            // One like its teacher, and one that is not finite.
            s[3 * d..4 * d].copy_from_slice(&t[3 * d..4 * d]);
            s[4 * d] = f32::NAN;
            let mut centres = numbers("centres", d * k, [-1.0, 1.0]);
            let order = Order::transposed(d, k);
            let laid_out = |centres: &[f32]| {
                let mut all = Vec::new();
                order.laid_out(centres, &mut all);
                all
            };
            let on_device = device.upload::<f32>(&laid_out(&centres))?;
            let before = centres.clone();
            Cpu.pull_centres(&mut centres, &s, &t, &labels)?;
            pull_centres(&on_device, &device.upload::<f32>(&s)?, &device.upload::<f32>(&t)?, &labels)?;
            close("centres", &on_device, &laid_out(&centres), 1e-5)?;
            // Classes that are not there, and that of the row that is not finite, keep theirs.
            let is_changed = |class: usize| (0..d).any(|i| before[i * k + class] != centres[i * k + class]);
            let changed: Vec<usize> = (0..k).filter(|class| is_changed(*class)).collect();
            assert_eq!(changed, [0, 3]);
        }
        Ok(())
    }
}
