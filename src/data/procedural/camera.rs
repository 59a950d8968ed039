//! Projection of the face into the picture and back: head pose with parallax, then the alignment of every crop.
//!
//! A point of the face is `(u, v)` on its frontal, neutral crop (`u` from the midline) and `z` px in front of the
//! plane of the head's outline. Turning the head moves near points against far ones.

use super::identity::Nose;
use super::nuisance::Pose;
use super::relief::nose_height;
use crate::data::{ALIGNED_LANDMARKS, FACE_SIZE, Landmarks};

/// Row of the crop about which the head nods.
const PIVOT_V: f32 = 62.0;
/// Bounds of [`Camera::depth`].
const DEPTH: [f32; 2] = [-12.0, 42.0];
/// Rounds of the fixed-point iteration that undoes the parallax. Each round contracts the error by a factor below 0.5.
const ROUNDS: usize = 3;

/// Camera of one image of one head.
pub(super) struct Camera<'a> {
    nose: &'a Nose,
    sin: [f32; 2],
    cos: [f32; 2],
    /// `x = a p - b q + x0`, `y = b p + a q + y0`.
    a: f32,
    b: f32,
    origin: [f32; 2],
}

impl<'a> Camera<'a> {
    /// Returns the camera and the landmarks in px of the crop, for a face with `landmarks` in `(u, v)`.
    ///
    /// As with a photograph, the crop is the least-squares similarity of the turned landmarks onto the template, up to
    /// the alignment error in `pose`.
    pub(super) fn new(pose: &Pose, nose: &'a Nose, landmarks: &Landmarks) -> (Self, Landmarks) {
        let sin = [pose.sin_yaw.clamp(-0.4, 0.4), pose.sin_pitch.clamp(-0.3, 0.3)];
        let cos = sin.map(|s| (1.0 - s * s).sqrt());
        let mut camera = Self { nose, sin, cos, a: 1.0, b: 0.0, origin: [0.0, 0.0] };
        let turned = landmarks.map(|[u, v]| camera.project(u, v, camera.depth(u, v)));
        let (a, b, origin) = similarity(&turned, &ALIGNED_LANDMARKS);
        // The alignment error acts about the middle of the crop: (a + ib) (1 + i roll) scale, with rotations as complex
        // numbers.
        let (a2, b2) = ((a - b * pose.roll) * pose.scale, (b + a * pose.roll) * pose.scale);
        let middle = 0.5 * FACE_SIZE as f32;
        let offset = [origin[0] - middle, origin[1] - middle];
        camera.a = a2;
        camera.b = b2;
        camera.origin = [
            middle + pose.scale * (offset[0] - pose.roll * offset[1]) + pose.shift[0],
            middle + pose.scale * (offset[1] + pose.roll * offset[0]) + pose.shift[1],
        ];
        let seen = turned.map(|[p, q]| camera.place(p, q));
        (camera, seen)
    }

    /// Returns the position in the picture of the point `(u, v)` at depth `z`.
    pub(super) fn project(&self, u: f32, v: f32, z: f32) -> [f32; 2] {
        self.place(u * self.cos[0] + z * self.sin[0], (v - PIVOT_V) * self.cos[1] + z * self.sin[1])
    }

    fn place(&self, p: f32, q: f32) -> [f32; 2] {
        [self.a * p - self.b * q + self.origin[0], self.b * p + self.a * q + self.origin[1]]
    }

    /// Returns the point `(u, v)` of the face that is seen at `(x, y)`.
    pub(super) fn unproject(&self, x: f32, y: f32) -> [f32; 2] {
        let inverse = 1.0 / (self.a * self.a + self.b * self.b);
        let (x, y) = (x - self.origin[0], y - self.origin[1]);
        let (p, q) = ((self.a * x + self.b * y) * inverse, (self.a * y - self.b * x) * inverse);
        // Start with the depth of most of the face.
        let (mut u, mut v) = (p - 20.0 * self.sin[0], q - 20.0 * self.sin[1] + PIVOT_V);
        for _ in 0..ROUNDS {
            let z = self.depth(u, v);
            u = (p - self.sin[0] * z) / self.cos[0];
            v = (q - self.sin[1] * z) / self.cos[1] + PIVOT_V;
        }
        [u, v]
    }

    /// Returns a box `[x0, y0, x1, y1]` of the picture that holds every point with `u` and `v` in the given ranges.
    pub(super) fn bounds(&self, u: [f32; 2], v: [f32; 2]) -> [f32; 4] {
        let mut bounds = [f32::MAX, f32::MAX, f32::MIN, f32::MIN];
        for (u, v) in u.into_iter().flat_map(|u| v.map(|v| (u, v))) {
            for z in DEPTH {
                let [x, y] = self.project(u, v, z);
                bounds = [bounds[0].min(x), bounds[1].min(y), bounds[2].max(x), bounds[3].max(y)];
            }
        }
        bounds
    }

    /// Returns how far the surface lies in front of the outline's plane, px: the curvature of the head, and the nose on
    /// it.
    fn depth(&self, u: f32, v: f32) -> f32 {
        let (x, y) = (u / 46.0, (v - 66.0) / 62.0);
        let head = 28.0 - 30.0 * x * x - 12.0 * y * y;
        (head + nose_height(self.nose, u, v)).clamp(DEPTH[0], DEPTH[1])
    }
}

/// Returns the similarity `x -> (a + ib) x + origin` that takes `from` closest to `to` (least squares).
fn similarity(from: &Landmarks, to: &Landmarks) -> (f32, f32, [f32; 2]) {
    let mean = |points: &Landmarks| {
        let sum = points.iter().fold([0.0, 0.0], |s, p| [s[0] + p[0], s[1] + p[1]]);
        [sum[0] / 5.0, sum[1] / 5.0]
    };
    let (mf, mt) = (mean(from), mean(to));
    let (mut dot, mut cross, mut norm) = (0.0, 0.0, 0.0);
    for (f, t) in from.iter().zip(to) {
        let (fx, fy, tx, ty) = (f[0] - mf[0], f[1] - mf[1], t[0] - mt[0], t[1] - mt[1]);
        dot += fx * tx + fy * ty;
        cross += fx * ty - fy * tx;
        norm += fx * fx + fy * fy;
    }
    let (a, b) = (dot / norm, cross / norm);
    (a, b, [mt[0] - a * mf[0] + b * mf[1], mt[1] - b * mf[0] - a * mf[1]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::procedural::identity::Identity;

    #[test]
    fn unprojecting_undoes_projecting() {
        let nose = Identity::new(1, 2).nose;
        let pose = Pose { sin_yaw: 0.3, sin_pitch: -0.2, roll: 0.05, scale: 1.03, shift: [2.0, -1.0] };
        let (camera, _) = Camera::new(&pose, &nose, &ALIGNED_LANDMARKS.map(|[x, y]| [x - 56.0, y]));
        for [u, v] in [[0.0, 40.0], [-25.0, 60.0], [20.0, 95.0], [3.0, 100.0]] {
            let [x, y] = camera.project(u, v, camera.depth(u, v));
            let [u2, v2] = camera.unproject(x, y);
            // The error that three rounds leave where the surface is steep.
            assert!((u - u2).abs() < 0.3 && (v - v2).abs() < 0.3, "({u}, {v}) came back as ({u2}, {v2})");
        }
    }

    #[test]
    fn similarity_finds_the_turn_scale_and_shift() {
        let from = ALIGNED_LANDMARKS.map(|[x, y]| [0.5 * x + 0.25 * y - 3.0, 0.5 * y - 0.25 * x + 7.0]);
        let (a, b, [x0, y0]) = similarity(&from, &ALIGNED_LANDMARKS);
        for (f, t) in from.iter().zip(ALIGNED_LANDMARKS) {
            let (x, y) = (a * f[0] - b * f[1] + x0, b * f[0] + a * f[1] + y0);
            assert!((x - t[0]).abs() < 1e-3 && (y - t[1]).abs() < 1e-3);
        }
    }
}
