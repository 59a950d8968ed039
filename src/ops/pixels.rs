//! Passes over the pixels of images `(n, pixels, c)`: sums of each channel, products with one factor per image and
//! channel, and activations without parameters, for squeeze-excitation and pooling. Sums run over blocks of a fixed
//! number of rows and are joined in f64 in the blocks' order, so they do not depend on the number of threads.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::channels::{MapBlock, Repeated, Seen, SeenBlock, see, see_lanes};
use super::lanes::{load, store};
use super::rows::{block_len, join};
use super::simd::{dispatch, for_lanes};
use crate::parallel::{self, Each};

/// Writes `factor` times the sums over the pixels of `x`, or of its products with `with`, to `y: (n, c)`.
pub(crate) fn sums(x: Seen, with: Option<&[f32]>, [pixels, c]: [usize; 2], factor: f32, y: &mut [f32]) {
    let of_image = pixels * c;
    assert!(x.x.len() == y.len() * pixels && y.len().is_multiple_of(c), "{} values of {c} channels", x.x.len());
    assert!(with.is_none_or(|with| with.len() == x.x.len()), "{} values", x.x.len());
    let (constants, len) = (Repeated::new(x.constants, c), block_len(c));
    let of_blocks = of_image.div_ceil(len);
    let period = constants.period();
    let blocks = parallel::map(y.len() / c * of_blocks, |i| {
        let start = i / of_blocks * of_image + i % of_blocks * len;
        let end = (start + len).min((i / of_blocks + 1) * of_image);
        let mut sums = vec![0.0; period];
        dispatch(SumsBlock {
            x: &x.x[start..end],
            with: with.map(|with| &with[start..end]),
            constants: &constants,
            sums: &mut sums,
        });
        sums
    });
    for (y, blocks) in y.chunks_exact_mut(c).zip(blocks.chunks_exact(of_blocks)) {
        let all = join(blocks, period);
        for (channel, y) in y.iter_mut().enumerate() {
            let sum: f64 = all.iter().skip(channel).step_by(c).sum();
            *y = (sum * f64::from(factor)) as f32;
        }
    }
}

/// Writes `x * by * factor + plus` to `y: (n, pixels, c)`, `by` being `(n, c)`; `x` is 1 and `plus` 0 if not given.
pub(crate) fn scale(x: Option<Seen>, by: &[f32], factor: f32, plus: Option<Seen>, c: usize, y: &mut [f32]) {
    assert!(by.len().is_multiple_of(c) && y.len().is_multiple_of(by.len()), "{} factors", by.len());
    assert!([x, plus].iter().flatten().all(|seen| seen.x.len() == y.len()), "{} values", y.len());
    let constants = |seen: Option<Seen>| Repeated::new(seen.and_then(|seen| seen.constants), c);
    let (of_x, of_plus, len) = (constants(x), constants(plus), block_len(c));
    let of_image = y.len() / by.len() * c;
    y.par_chunks_mut(of_image).zip(by.par_chunks(c)).enumerate().each(&|(image, (y, by))| {
        let by: Vec<f32> = by.iter().map(|by| by * factor).collect();
        let period = of_x.period();
        let by = by.repeat(period / c);
        y.par_chunks_mut(len).enumerate().each(&|(block, y)| {
            let start = image * of_image + block * len;
            let x = x.map(|seen| SeenBlock { x: &seen.x[start..][..y.len()], constants: &of_x });
            let plus = plus.map(|seen| SeenBlock { x: &seen.x[start..][..y.len()], constants: &of_plus });
            dispatch(MapBlock { x, by: Some(&by), plus, period, y });
        });
    });
}

/// Adds `x`, or its products with `with`, to the sums of a period.
struct SumsBlock<'a> {
    x: &'a [f32],
    with: Option<&'a [f32]>,
    constants: &'a Repeated,
    sums: &'a mut [f32],
}

impl WithSimd for SumsBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, with, constants, sums } = self;
        let period = constants.period();
        assert!(sums.len() == period && with.is_none_or(|with| with.len() == x.len()), "{} values", x.len());
        let one = simd.splat_f32s(1.0);
        for first in (0..x.len()).step_by(period) {
            let n = period.min(x.len() - first);
            let (x, with) = (&x[first..][..n], with.map(|with| &with[first..][..n]));
            for_lanes!(
                n,
                S,
                |at| {
                    // SAFETY: the vector is in the rows, the constants and the sums.
                    unsafe {
                        let with = match with {
                            Some(with) => load::<S>(with, at),
                            None => one,
                        };
                        let x = see_lanes(simd, load::<S>(x, at), constants, at);
                        store::<S>(sums, at, simd.mul_add_e_f32s(x, with, load::<S>(sums, at)));
                    }
                },
                |i| {
                    sums[i] += see(x[i], constants, i) * with.map_or(1.0, |with| with[i]);
                }
            );
        }
    }
}

/// An activation without parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
}

/// Writes the activation of `x: (.., c)` to `y`.
pub(crate) fn activate(x: Seen, activation: Activation, c: usize, y: &mut [f32]) {
    assert_eq!(x.x.len(), y.len());
    let (constants, len) = (Repeated::new(x.constants, c), block_len(c));
    y.par_chunks_mut(len).zip(x.x.par_chunks(len)).each(&|(y, x)| {
        dispatch(ActivateBlock { x, constants: &constants, activation, y });
    });
}

/// Writes the activation of values with their map applied.
struct ActivateBlock<'a> {
    x: &'a [f32],
    constants: &'a Repeated,
    activation: Activation,
    y: &'a mut [f32],
}

impl WithSimd for ActivateBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { x, constants, activation, y } = self;
        let period = constants.period();
        assert_eq!(x.len(), y.len());
        for first in (0..x.len()).step_by(period) {
            let n = period.min(x.len() - first);
            let (x, y) = (&x[first..][..n], &mut y[first..][..n]);
            for i in 0..n {
                let x = see(x[i], constants, i);
                y[i] = match activation {
                    // A NaN stays NaN.
                    Activation::Relu => {
                        if x < 0.0 {
                            0.0
                        } else {
                            x
                        }
                    }
                    Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
                };
            }
        }
    }
}

/// Writes the gradient of an activation's input to `gx`, from its result and the gradient of that.
pub(crate) fn activate_backward(y: &[f32], gy: &[f32], activation: Activation, gx: &mut [f32]) {
    assert!(y.len() == gy.len() && y.len() == gx.len(), "{} values", y.len());
    let len = block_len(1);
    gx.par_chunks_mut(len).zip(y.par_chunks(len).zip(gy.par_chunks(len))).each(&|(gx, (y, gy))| {
        dispatch(ActivateGrad { y, gy, activation, gx });
    });
}

/// Writes the gradient of an activation's input.
struct ActivateGrad<'a> {
    y: &'a [f32],
    gy: &'a [f32],
    activation: Activation,
    gx: &'a mut [f32],
}

impl WithSimd for ActivateGrad<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { y, gy, activation, gx } = self;
        let (y, gy) = (&y[..gx.len()], &gy[..gx.len()]);
        for i in 0..gx.len() {
            gx[i] = match activation {
                Activation::Relu => {
                    if y[i] > 0.0 {
                        gy[i]
                    } else {
                        0.0
                    }
                }
                Activation::Sigmoid => gy[i] * y[i] * (1.0 - y[i]),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::channels::Constants;

    fn values(len: usize, seed: f32) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + 1.0) * seed).sin() * 2.0).collect()
    }

    fn assert_near(found: &[f32], expected: impl Iterator<Item = f64>) {
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(*found) - expected).abs() <= 1e-4 * (1.0 + expected.abs()), "{i}: {found}, {expected}");
        }
    }

    /// Sizes of one pixel, odd channels, more channels than a period, and images of several blocks.
    const SIZES: [[usize; 3]; 5] = [[1, 1, 1], [2, 7, 3], [3, 49, 96], [2, 3, 700], [2, 900, 40]];

    #[test]
    fn sums_and_products_are_those_of_their_definition() {
        for [n, pixels, c] in SIZES {
            let [x, other] = [0.7, 1.3].map(|seed| values(n * pixels * c, seed));
            let by = values(n * c, 0.4);
            let slope = values(c, 2.1);
            let constants = Constants { scale: values(c, 1.7), shift: values(c, 0.3), slope: Some(slope) };
            let see = |constants: Option<&Constants>, x: f32, i: usize| {
                let Some(Constants { scale, shift, slope }) = constants else { return f64::from(x) };
                let z = f64::from(x) * f64::from(scale[i % c]) + f64::from(shift[i % c]);
                if z > 0.0 { z } else { z * slope.as_ref().map_or(1.0, |slope| f64::from(slope[i % c])) }
            };
            for constants in [None, Some(&constants)] {
                let seen = Seen { x: &x, constants };
                for with in [None, Some(other.as_slice())] {
                    let mut found = vec![f32::NAN; n * c];
                    sums(seen, with, [pixels, c], 0.5, &mut found);
                    let sum = |i: usize| {
                        let at = |pixel: usize| (i / c * pixels + pixel) * c + i % c;
                        let term = |at: usize| see(constants, x[at], at) * with.map_or(1.0, |with| f64::from(with[at]));
                        0.5 * (0..pixels).map(|pixel| term(at(pixel))).sum::<f64>()
                    };
                    assert_near(&found, (0..n * c).map(sum));
                }
                for (x, plus) in
                    [(Some(seen), None), (None, Some(seen)), (Some(seen), Some(Seen { x: &other, constants }))]
                {
                    let mut found = vec![f32::NAN; n * pixels * c];
                    scale(x, &by, 0.25, plus, c, &mut found);
                    let value = |i: usize| {
                        let at = |seen: Seen| see(seen.constants, seen.x[i], i);
                        let by = f64::from(by[i / (pixels * c) * c + i % c]);
                        x.map_or(1.0, at) * by * 0.25 + plus.map_or(0.0, at)
                    };
                    assert_near(&found, (0..n * pixels * c).map(value));
                }
            }
        }
    }

    #[test]
    fn activations_have_numeric_gradients() {
        let (x, gy) = (values(40, 0.7), values(40, 1.9));
        for activation in [Activation::Relu, Activation::Sigmoid] {
            let run = |shift: f32| {
                let constants = Constants { scale: vec![1.0; 4], shift: vec![shift; 4], slope: None };
                let mut y = vec![f32::NAN; 40];
                activate(Seen { x: &x, constants: Some(&constants) }, activation, 4, &mut y);
                y
            };
            let (above, below, mut gx) = (run(1e-3), run(-1e-3), vec![f32::NAN; 40]);
            activate_backward(&run(0.0), &gy, activation, &mut gx);
            for i in 0..40 {
                let expected = gy[i] * (above[i] - below[i]) / 2e-3;
                assert!((gx[i] - expected).abs() < 2e-3, "{activation:?} of {}: {}, {expected}", x[i], gx[i]);
            }
        }
        let nan = Seen { x: &[f32::NAN], constants: None };
        let mut y = [0.0];
        activate(nan, Activation::Relu, 1, &mut y);
        assert!(y[0].is_nan());
    }
}
