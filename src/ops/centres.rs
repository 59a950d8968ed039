//! Class centres: those of sampled classes, and those that a teacher's embeddings pull (AdaDistill, Boutros et al., ECCV
//! 2024).

use candle_core::{Result, bail};
use rayon::prelude::*;

use super::distance::{dot, unit_rows};
use crate::parallel::Each;

const NAME: &str = "adaptive centres";

/// Smallest share that a centre keeps.
pub(crate) const MIN_SHARE: f64 = 1e-6;

/// Pulls the class centre of each row with a label towards the teacher's embedding of the row: with all vectors scaled
/// to length 1,
///
/// ```text
/// a = clamp(cos(f_S, f_T) cos(w_y, f_T), 1e-6, 1)
/// w_y <- a w_y + (1 - a) f_T
/// ```
///
/// A student that is far from its teacher, or a face unlike the centre, replaces the centre by the teacher's embedding;
/// later the centre becomes a moving average of the person's embeddings. Rows of one class follow each other in their
/// order. Not defined by the paper, and chosen here: the centre that is kept has length 1.
///
/// - `centres`: `(d, K)`; `student`, `teacher`: `(n, d)`; row-major
/// - `labels`: `n` classes, or -1 for a row to ignore
///
/// # Errors
/// When the lengths do not match, or a label is out of range.
pub fn pull_centres(centres: &mut [f32], student: &[f32], teacher: &[f32], labels: &[i64]) -> Result<()> {
    let n = labels.len();
    let d = student.len() / n.max(1);
    let k = centres.len() / d.max(1);
    check(n, [student.len(), teacher.len()], centres.len(), labels)?;
    let ((s, _), (t, _)) = (unit_rows(student, d), unit_rows(teacher, d));
    for (row, label) in labels.iter().enumerate() {
        let Ok(class) = usize::try_from(*label) else { continue };
        let (s, t) = (&s[row * d..][..d], &t[row * d..][..d]);
        let centre: Vec<f32> = (0..d).map(|i| centres[i * k + class]).collect();
        let (w, _) = unit_rows(&centre, d);
        let share = (dot(s, t) * dot(&w, t)).clamp(MIN_SHARE, 1.0);
        // Embeddings that are not finite must not spoil the centre: the step will be skipped.
        if share.is_nan() {
            continue;
        }
        for (i, (w, t)) in w.iter().zip(t).enumerate() {
            centres[i * k + class] = (share * w + (1.0 - share) * t) as f32;
        }
    }
    Ok(())
}

/// Returns the columns of some classes of `all: (size, K)`.
///
/// # Errors
/// When the sizes do not match, or there is no such class.
pub(crate) fn select(all: &[f32], size: usize, classes: &[u32]) -> Result<Vec<f32>> {
    let k = num_classes(all.len(), size, classes)?;
    let mut selected = vec![0.0; size * classes.len()];
    selected.par_chunks_mut(classes.len().max(1)).zip(all.par_chunks(k)).each(&|(selected, all)| {
        selected.iter_mut().zip(classes).for_each(|(selected, class)| *selected = all[*class as usize]);
    });
    Ok(selected)
}

/// Inverse of [`select`]: replaces the columns of some classes of `all: (size, K)`.
///
/// # Errors
/// When the sizes do not match, or there is no such class.
pub(crate) fn replace(all: &mut [f32], size: usize, classes: &[u32], by: &[f32]) -> Result<()> {
    let k = num_classes(all.len(), size, classes)?;
    if by.len() != size * classes.len() {
        bail!("sampled classes: {} elements for {} classes of {size}", by.len(), classes.len());
    }
    all.par_chunks_mut(k).zip(by.par_chunks(classes.len().max(1))).each(&|(all, by)| {
        classes.iter().zip(by).for_each(|(class, by)| all[*class as usize] = *by);
    });
    Ok(())
}

/// Returns the number of classes of an array that has all of these.
fn num_classes(len: usize, size: usize, classes: &[u32]) -> Result<usize> {
    let k = len / size.max(1);
    match classes.iter().find(|class| **class as usize >= k) {
        _ if k * size != len || k == 0 => bail!("sampled classes: {len} elements are no class centres of {size}"),
        Some(class) => bail!("sampled classes: expected classes below {k}, found {class}"),
        None => Ok(k),
    }
}

/// Checks the numbers of elements and the labels of `n` rows.
pub(crate) fn check(n: usize, rows: [usize; 2], centres: usize, labels: &[i64]) -> Result<()> {
    let d = rows[0] / n.max(1);
    if n == 0 || d == 0 || rows != [n * d; 2] || !centres.is_multiple_of(d) {
        bail!("{NAME}: student {}, teacher {} elements in {n} rows, centres {centres}", rows[0], rows[1]);
    }
    let k = (centres / d) as i64;
    match labels.iter().find(|label| **label < -1 || **label >= k) {
        Some(label) => bail!("{NAME}: expected labels below {k} or -1, found {label}"),
        None => Ok(()),
    }
}
