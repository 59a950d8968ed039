//! Least-squares homography of point pairs, as in OpenCV's `findHomography` with method 0: a normalised direct linear
//! transform (Hartley and Zisserman, Multiple View Geometry, algorithm 4.2), then Levenberg-Marquardt on the
//! reprojection error.
//!
//! Levenberg-Marquardt runs until it has converged. OpenCV stops after ten steps, which mostly gives the same result:
//! of 44 sets of landmarks and shifts on the published template, OpenCV 4.8 had not converged in one.

use crate::error::{Error, Result};

/// A 3x3 projective map of the plane, row by row; the last entry is 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Homography(pub [[f64; 3]; 3]);

impl Homography {
    /// Fits the map that takes each `source` point to its `destination` with the least sum of squared distances, in the
    /// destination's pixels.
    ///
    /// # Errors
    /// When there are fewer than four pairs or the lists differ in length, when a coordinate is not finite, or when the
    /// points lie (nearly) on one line so that no homography is determined.
    pub fn fit(source: &[[f64; 2]], destination: &[[f64; 2]]) -> Result<Self> {
        if source.len() < 4 || source.len() != destination.len() {
            let (s, d) = (source.len(), destination.len());
            return Err(Error::Config(format!("homography: expected four or more point pairs, found {s} and {d}")));
        }
        let (from, to) = (Normaliser::new(source, "source")?, Normaliser::new(destination, "destination")?);
        let src: Vec<_> = source.iter().map(|&p| from.apply(p)).collect();
        let dst: Vec<_> = destination.iter().map(|&p| to.apply(p)).collect();
        let mut h = direct_linear_transform(&src, &dst)?;
        refine(&mut h, &src, &dst);
        let fitted = Self([[h[0], h[1], h[2]], [h[3], h[4], h[5]], [h[6], h[7], 1.0]]);
        if fitted.determinant().abs() < 1e-7 || src.iter().any(|p| fitted.weight(*p) <= 0.0) {
            return Err(Error::Config("homography: the point pairs determine no invertible map".into()));
        }
        to.inverse().compose(&fitted).compose(&from.forward()).scaled()
    }

    /// Returns the image of point `p`; not finite where `p` maps to infinity.
    pub fn apply(&self, p: [f64; 2]) -> [f64; 2] {
        let (h, w) = (&self.0, self.weight(p));
        [(h[0][0] * p[0] + h[0][1] * p[1] + h[0][2]) / w, (h[1][0] * p[0] + h[1][1] * p[1] + h[1][2]) / w]
    }

    /// Returns the homogeneous coordinate of the image of `p`; its sign distinguishes the two sides of the horizon.
    pub fn weight(&self, p: [f64; 2]) -> f64 {
        self.0[2][0] * p[0] + self.0[2][1] * p[1] + self.0[2][2]
    }

    /// Returns the inverse map.
    ///
    /// # Errors
    /// When the matrix is singular.
    pub fn invert(&self) -> Result<Self> {
        let h = &self.0;
        let cofactor = |r: usize, c: usize| {
            let (r1, r2, c1, c2) = ((r + 1) % 3, (r + 2) % 3, (c + 1) % 3, (c + 2) % 3);
            h[r1][c1] * h[r2][c2] - h[r1][c2] * h[r2][c1]
        };
        let mut adjugate = [[0.0; 3]; 3];
        for (r, row) in adjugate.iter_mut().enumerate() {
            for (c, value) in row.iter_mut().enumerate() {
                *value = cofactor(c, r);
            }
        }
        let determinant = self.determinant();
        if !determinant.is_normal() {
            return Err(Error::Config(format!("homography: cannot be inverted, its determinant is {determinant}")));
        }
        // Dividing by the determinant, not by the corner, keeps the sign of the weight: positive in front.
        Ok(Self(adjugate.map(|row| row.map(|v| v / determinant))))
    }

    fn determinant(&self) -> f64 {
        let h = &self.0;
        h[0][0] * (h[1][1] * h[2][2] - h[1][2] * h[2][1]) - h[0][1] * (h[1][0] * h[2][2] - h[1][2] * h[2][0])
            + h[0][2] * (h[1][0] * h[2][1] - h[1][1] * h[2][0])
    }

    fn compose(&self, first: &Self) -> Self {
        let (a, b) = (&self.0, &first.0);
        let mut y = [[0.0; 3]; 3];
        for (r, row) in y.iter_mut().enumerate() {
            for (c, value) in row.iter_mut().enumerate() {
                *value = (0..3).map(|k| a[r][k] * b[k][c]).sum();
            }
        }
        Self(y)
    }

    fn scaled(self) -> Result<Self> {
        let corner = self.0[2][2];
        let y = self.0.map(|row| row.map(|v| v / corner));
        if y.iter().flatten().all(|v| v.is_finite()) {
            return Ok(Self(y));
        }
        Err(Error::Config("homography: the point pairs map the origin to infinity".into()))
    }
}

/// Normalises points to mean 0 and mean distance `sqrt 2`, without which the equations are badly conditioned. The scale
/// is the same in x and y, so minimising the reprojection error also minimises it in pixels.
struct Normaliser {
    mean: [f64; 2],
    scale: f64,
}

impl Normaliser {
    fn new(points: &[[f64; 2]], what: &str) -> Result<Self> {
        if points.iter().flatten().any(|v| !v.is_finite()) {
            return Err(Error::Config(format!("homography: {what} points must be finite, found {points:?}")));
        }
        let n = points.len() as f64;
        let mean = [0, 1].map(|i| points.iter().map(|p| p[i]).sum::<f64>() / n);
        let (mut xx, mut xy, mut yy, mut distance) = (0.0, 0.0, 0.0, 0.0);
        for p in points {
            let (x, y) = (p[0] - mean[0], p[1] - mean[1]);
            (xx, xy, yy, distance) = (xx + x * x, xy + x * y, yy + y * y, distance + x.hypot(y));
        }
        // The ratio of the principal variances is about determinant / trace^2 when it is small.
        let spread = (xx * yy - xy * xy) / ((xx + yy) * (xx + yy));
        let scale = std::f64::consts::SQRT_2 * n / distance;
        // The spread of identical points is NaN, and that of huge ones may be.
        if spread.is_nan() || spread <= 1e-6 || !scale.is_finite() {
            let list = format!("{points:?}");
            return Err(Error::Config(format!("homography: {what} points must not lie on one line, found {list}")));
        }
        Ok(Self { mean, scale })
    }

    fn apply(&self, p: [f64; 2]) -> [f64; 2] {
        [(p[0] - self.mean[0]) * self.scale, (p[1] - self.mean[1]) * self.scale]
    }

    fn forward(&self) -> Homography {
        let (s, m) = (self.scale, self.mean);
        Homography([[s, 0.0, -s * m[0]], [0.0, s, -s * m[1]], [0.0, 0.0, 1.0]])
    }

    fn inverse(&self) -> Homography {
        let (s, m) = (1.0 / self.scale, self.mean);
        Homography([[s, 0.0, m[0]], [0.0, s, m[1]], [0.0, 0.0, 1.0]])
    }
}

/// Returns the first eight entries (the ninth is 1) of the map with the least algebraic error.
fn direct_linear_transform(src: &[[f64; 2]], dst: &[[f64; 2]]) -> Result<[f64; 8]> {
    let mut normal = [[0.0; 9]; 9];
    for (&[x, y], &[u, v]) in src.iter().zip(dst) {
        for row in [[x, y, 1.0, 0.0, 0.0, 0.0, -u * x, -u * y, -u], [0.0, 0.0, 0.0, x, y, 1.0, -v * x, -v * y, -v]] {
            for (i, line) in normal.iter_mut().enumerate() {
                for (j, sum) in line.iter_mut().enumerate() {
                    *sum += row[i] * row[j];
                }
            }
        }
    }
    let h = smallest_eigenvector(normal);
    if h[8].abs() < 1e-9 {
        return Err(Error::Config("homography: the point pairs map their own centre to infinity".into()));
    }
    Ok(std::array::from_fn(|i| h[i] / h[8]))
}

/// Returns the eigenvector of the smallest eigenvalue of a symmetric matrix, by Jacobi rotations.
fn smallest_eigenvector(mut a: [[f64; 9]; 9]) -> [f64; 9] {
    let mut vectors: [[f64; 9]; 9] = std::array::from_fn(|i| std::array::from_fn(|j| if i == j { 1.0 } else { 0.0 }));
    let trace: f64 = (0..9).map(|i| a[i][i]).sum();
    for _sweep in 0..30 {
        // The remainder changes the vectors by less than their last bit.
        let off_diagonal =
            (0..9).flat_map(|p| (p + 1..9).map(move |q| (p, q))).map(|(p, q)| a[p][q].abs()).sum::<f64>();
        if off_diagonal <= 1e-18 * trace {
            break;
        }
        for p in 0..8 {
            for q in p + 1..9 {
                if a[p][q].abs() < 1e-300 {
                    continue;
                }
                let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for row in &mut a {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                let (upper, lower) = (a[p], a[q]);
                a[p] = std::array::from_fn(|k| c * upper[k] - s * lower[k]);
                a[q] = std::array::from_fn(|k| s * upper[k] + c * lower[k]);
                for row in &mut vectors {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
            }
        }
    }
    let smallest = (0..9).fold(0, |best, i| if a[i][i] < a[best][best] { i } else { best });
    std::array::from_fn(|i| vectors[i][smallest])
}

/// Lowers the reprojection error of `h` by Levenberg-Marquardt with Marquardt's diagonal scaling.
fn refine(h: &mut [f64; 8], src: &[[f64; 2]], dst: &[[f64; 2]]) {
    let mut damping = 1e-3;
    let mut error = reprojection_error(h, src, dst);
    for _step in 0..100 {
        let (mut normal, mut gradient) = ([[0.0; 8]; 8], [0.0; 8]);
        for (&[x, y], &target) in src.iter().zip(dst) {
            let w = 1.0 / (h[6] * x + h[7] * y + 1.0);
            let found = [(h[0] * x + h[1] * y + h[2]) * w, (h[3] * x + h[4] * y + h[5]) * w];
            let (xw, yw) = (x * w, y * w);
            for axis in 0..2 {
                let mut row = [0.0; 8];
                row[3 * axis..3 * axis + 3].copy_from_slice(&[xw, yw, w]);
                row[6..].copy_from_slice(&[-xw * found[axis], -yw * found[axis]]);
                let residual = found[axis] - target[axis];
                for i in 0..8 {
                    gradient[i] += row[i] * residual;
                    for j in 0..8 {
                        normal[i][j] += row[i] * row[j];
                    }
                }
            }
        }
        for (i, row) in normal.iter_mut().enumerate() {
            row[i] += damping * row[i] + 1e-15;
        }
        let Some(step) = solve(normal, gradient) else { return };
        let trial: [f64; 8] = std::array::from_fn(|i| h[i] - step[i]);
        let trial_error = reprojection_error(&trial, src, dst);
        // A NaN error counts as worse.
        if trial_error < error {
            let is_done = error - trial_error <= 1e-14 * error;
            (*h, error, damping) = (trial, trial_error, damping * 0.1);
            if is_done {
                return;
            }
        } else {
            damping *= 10.0;
            if damping > 1e12 {
                return;
            }
        }
    }
}

fn reprojection_error(h: &[f64; 8], src: &[[f64; 2]], dst: &[[f64; 2]]) -> f64 {
    let map = Homography([[h[0], h[1], h[2]], [h[3], h[4], h[5]], [h[6], h[7], 1.0]]);
    let squared = |(&s, d): (&[f64; 2], &[f64; 2])| {
        let y = map.apply(s);
        (y[0] - d[0]).powi(2) + (y[1] - d[1]).powi(2)
    };
    src.iter().zip(dst).map(squared).sum()
}

/// Solves `a x = b` by elimination with row pivots; `None` if `a` is singular.
fn solve(mut a: [[f64; 8]; 8], mut b: [f64; 8]) -> Option<[f64; 8]> {
    for k in 0..8 {
        let pivot = (k..8).fold(k, |best, i| if a[i][k].abs() > a[best][k].abs() { i } else { best });
        if !a[pivot][k].is_normal() {
            return None;
        }
        a.swap(k, pivot);
        b.swap(k, pivot);
        let row = a[k];
        for i in k + 1..8 {
            let factor = a[i][k] / row[k];
            for j in k..8 {
                a[i][j] -= factor * row[j];
            }
            b[i] -= factor * b[k];
        }
    }
    for k in (0..8).rev() {
        let known: f64 = (k + 1..8).map(|j| a[k][j] * b[j]).sum();
        b[k] = (b[k] - known) / a[k][k];
    }
    Some(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: Homography = Homography([[0.9, 0.1, 12.0], [-0.05, 1.1, 3.0], [0.0004, -0.0002, 1.0]]);

    fn assert_maps(h: &Homography, source: &[[f64; 2]], destination: &[[f64; 2]], tolerance: f64) {
        for (&s, d) in source.iter().zip(destination) {
            let y = h.apply(s);
            assert!((y[0] - d[0]).abs() <= tolerance && (y[1] - d[1]).abs() <= tolerance, "{s:?}: {y:?}, not {d:?}");
        }
    }

    #[test]
    fn four_pairs_are_met_exactly() {
        let source = [[0.0, 0.0], [100.0, 5.0], [90.0, 120.0], [-10.0, 100.0]];
        let destination = [[10.0, 20.0], [60.0, 12.0], [70.0, 80.0], [5.0, 66.0]];
        let h = Homography::fit(&source, &destination).unwrap();
        assert_maps(&h, &source, &destination, 1e-9);
    }

    #[test]
    fn a_known_map_is_recovered_and_inverted() {
        let source: Vec<[f64; 2]> = (0..12).map(|i| [f64::from(i * 37 % 101), f64::from(i * i * 13 % 89)]).collect();
        let destination: Vec<_> = source.iter().map(|&p| KNOWN.apply(p)).collect();
        let h = Homography::fit(&source, &destination).unwrap();
        for (found, expected) in h.0.iter().flatten().zip(KNOWN.0.iter().flatten()) {
            assert!((found - expected).abs() <= 1e-8, "{h:?}");
        }
        assert_maps(&h.invert().unwrap(), &destination, &source, 1e-7);
    }

    #[test]
    fn the_fit_is_a_minimum_of_the_reprojection_error() {
        let source = [[678.0, 464.0], [548.0, 614.0], [991.0, 664.0], [1009.0, 64.0], [557.0, 64.0]];
        let destination = [[56.0, 71.0], [41.0, 92.0], [70.0, 92.0], [73.0, 51.0], [38.0, 51.0]];
        let h = Homography::fit(&source, &destination).unwrap();
        let flat = |h: &Homography| -> [f64; 8] { std::array::from_fn(|i| h.0[i / 3][i % 3]) };
        let least = reprojection_error(&flat(&h), &source, &destination);
        for i in 0..8 {
            for factor in [0.9999, 1.0001] {
                let mut moved = flat(&h);
                moved[i] *= factor;
                assert!(reprojection_error(&moved, &source, &destination) >= least, "entry {i}");
            }
        }
    }

    #[test]
    fn degenerate_points_are_errors() {
        let good = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.3, 0.4]];
        let line: Vec<_> = (0..5).map(|i| [f64::from(i), 2.0 * f64::from(i)]).collect();
        assert!(Homography::fit(&good, &line).unwrap_err().to_string().contains("destination points must not lie on"));
        assert!(Homography::fit(&[[3.0, 4.0]; 5], &good).is_err());
        assert!(Homography::fit(&good, &good[..4]).is_err());
        assert!(Homography::fit(&good[..3], &good[..3]).is_err());
        assert!(Homography::fit(&good, &[[f64::NAN; 2]; 5]).is_err());
        let three_on_a_line = [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]];
        assert!(Homography::fit(&three_on_a_line, &good[..4]).is_err());
    }
}
