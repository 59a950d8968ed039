//! Concatenation of channels, and its backward pass.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::channels::{Repeated, Seen, see, see_lanes};
use super::lanes::{load, store};
use super::simd::{dispatch, for_lanes};
use crate::parallel::Each;

/// Rows that a worker thread takes at a time.
const ROWS: usize = 64;

/// Writes the channels of all parts, `(.., c)` with their `c`, one after the other to `y`.
pub(crate) fn concat(parts: &[(Seen, usize)], y: &mut [f32]) {
    let channels: usize = parts.iter().map(|(_, c)| c).sum();
    let rows = y.len() / channels;
    assert!(parts.iter().all(|(x, c)| x.x.len() == rows * c), "parts of {} values", y.len());
    let constants: Vec<Repeated> = parts.iter().map(|(x, c)| Repeated::new(x.constants, *c)).collect();
    y.par_chunks_mut(ROWS * channels).enumerate().each(&|(block, y)| {
        let mut first = 0;
        for ((x, c), constants) in parts.iter().zip(&constants) {
            let x = &x.x[block * ROWS * c..][..y.len() / channels * c];
            dispatch(PutChannels { x, constants, c: *c, first, channels, y });
            first += c;
        }
    });
}

/// Writes rows of `c` channels to the channels from `first` on.
struct PutChannels<'a> {
    x: &'a [f32],
    constants: &'a Repeated,
    c: usize,
    first: usize,
    channels: usize,
    y: &'a mut [f32],
}

impl WithSimd for PutChannels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, constants, c, first, channels, y } = self;
        assert!(constants.period() >= c, "constants of {c} channels");
        for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(channels)) {
            let y = &mut y[first..][..c];
            for_lanes!(
                c,
                S,
                |at| {
                    // SAFETY: the vector is in the rows and the constants.
                    unsafe { store::<S>(y, at, see_lanes(simd, load::<S>(x, at), constants, at)) };
                },
                |i| {
                    y[i] = see(x[i], constants, i);
                }
            );
        }
    }
}

/// Writes the channels of `x: (.., channels)` from `first` on, plus `other`, to `y: (.., c)`.
pub(crate) fn take(x: &[f32], [first, channels, c]: [usize; 3], other: Option<&[f32]>, y: &mut [f32]) {
    assert!(first + c <= channels && x.len() * c == y.len() * channels, "{} of {} values", y.len(), x.len());
    assert!(other.is_none_or(|other| other.len() == y.len()), "{} values", y.len());
    y.par_chunks_mut(ROWS * c).enumerate().each(&|(block, y)| {
        let x = &x[block * ROWS * channels..];
        for (row, y) in y.chunks_exact_mut(c).enumerate() {
            let x = &x[row * channels + first..][..c];
            match other {
                Some(other) => {
                    let other = &other[(block * ROWS + row) * c..][..c];
                    y.iter_mut().zip(x.iter().zip(other)).for_each(|(y, (x, other))| *y = x + other);
                }
                None => y.copy_from_slice(x),
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::channels::Constants;

    #[test]
    fn channels_follow_each_other_and_come_back() {
        // One row, less than a vector, several blocks.
        for (rows, channels) in [(1, vec![1, 1]), (7, vec![3, 20, 5]), (3 * ROWS + 1, vec![40, 8, 17])] {
            let parts: Vec<Vec<f32>> = channels
                .iter()
                .enumerate()
                .map(|(part, c)| (0..rows * c).map(|i| (1000 * part + i) as f32).collect())
                .collect();
            let norms: Vec<Constants> = channels
                .iter()
                .map(|c| Constants { scale: vec![0.5; *c], shift: (0..*c).map(|i| i as f32).collect(), slope: None })
                .collect();
            let total = channels.iter().sum::<usize>();
            for has_norms in [false, true] {
                let constants = |part: usize| Some(&norms[part]).filter(|_| has_norms);
                let seen = |part: usize| (Seen { x: &parts[part], constants: constants(part) }, channels[part]);
                let mut y = vec![f32::NAN; rows * total];
                concat(&(0..parts.len()).map(seen).collect::<Vec<_>>(), &mut y);
                let mut first = 0;
                for (part, &c) in channels.iter().enumerate() {
                    let other: Vec<f32> = (0..rows * c).map(|i| i as f32).collect();
                    let (mut back, mut sum) = (vec![f32::NAN; rows * c], vec![f32::NAN; rows * c]);
                    take(&y, [first, total, c], None, &mut back);
                    take(&y, [first, total, c], Some(&other), &mut sum);
                    for i in 0..rows * c {
                        let x = parts[part][i];
                        let expected = if has_norms { 0.5 * x + (i % c) as f32 } else { x };
                        assert_eq!((back[i], sum[i]), (expected, expected + other[i]), "part {part}: {i}");
                    }
                    first += c;
                }
            }
        }
    }
}
