//! Head geometry to place a mask by: a round head, turned as the five landmarks indicate.
//!
//! Heights run along the face axis in units of the distance from eyes to mouth: 0 at the eyes, 1 at the mouth, about
//! 0.5 at the nose tip, about 1.5 at the chin. Across the face, a point is given by its angle around the head: 0 at the
//! middle of the face, positive to the image's right. The proportions are those of
//! [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS) and of an average adult head.

use crate::data::Landmarks;
use crate::error::{Error, Result};

/// Fabric units per distance from eyes to mouth.
pub(super) const UNITS: f32 = 40.0;

/// Half the width of a head at the cheeks, in distances from eyes to mouth.
const HALF_WIDTH: f32 = 0.95;
/// Distance between the eyes of a face seen from the front, in distances from eyes to mouth.
const EYE_DISTANCE: f32 = 0.866;
/// How far the eyes and the mouth lie in front of the head's axis, in half widths.
const FACE_DEPTH: f32 = 0.85;
/// How far the nose tip lies in front of the eyes and the mouth, in half widths.
const NOSE_DEPTH: f32 = 0.44;
/// How far a mask over the nose stands out from the round head, in half widths.
const NOSE_BULGE: f32 = 0.27;
/// Sine of the largest head turn that is trusted; a larger one is as often a bad nose landmark as a profile.
const MAX_SIN_YAW: f32 = 0.8;
/// The smallest and largest faces accepted, as the distance from eyes to mouth in pixels.
const FACE_PX: [f32; 2] = [2.0, 1e5];

/// A point of the image in the coordinates of the face.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FacePoint {
    /// Angle around the head, radians, 0 at the middle of the face.
    pub angle: f32,
    /// Height, 0 at the eyes and 1 at the mouth.
    pub height: f32,
    /// Sine of the angle between the surface normal and the viewer, positive to the image's right; beyond `[-1, 1]`,
    /// how far the point is outside the head's outline.
    pub facing: f32,
    /// Cosine of that angle: 1 where the surface faces the viewer, 0 at the outline and outside.
    pub cosine: f32,
}

/// The head that fits five landmarks.
#[derive(Clone, Debug)]
pub(super) struct FaceFrame {
    eyes: [f32; 2],
    /// Rows of the map from pixels to (pixels across, height).
    across: [f32; 2],
    down: [f32; 2],
    /// Unit vectors of the face in the image.
    axis_x: [f32; 2],
    axis_y: [f32; 2],
    /// Distance from eyes to mouth, pixels.
    pub unit_px: f32,
    /// Half the head's width at the cheeks, pixels.
    pub radius_px: f32,
    centre_px: f32,
    sin_yaw: f32,
    yaw: f32,
    taper: f32,
    /// Height of the lower eye landmark.
    pub eye_height: f32,
    /// Height of the nose landmark, limited to `[0.2, 0.8]`.
    pub nose_height: f32,
}

/// Returns the error for landmarks by which no mask can be placed.
pub(super) fn bad_landmarks(what: String) -> Error {
    Error::Data { path: "landmarks".into(), what }
}

impl FaceFrame {
    /// Returns the head that fits `landmarks`. Below the nose it narrows by `taper` times the squared distance.
    pub fn new(landmarks: &Landmarks, taper: f32) -> Result<Self> {
        if landmarks.iter().flatten().any(|v| !v.is_finite()) {
            return Err(bad_landmarks(format!("expected finite coordinates, found {landmarks:?}")));
        }
        let [eye_left, eye_right, nose, mouth_left, mouth_right] = *landmarks;
        let (eyes, mouth) = (middle(eye_left, eye_right), middle(mouth_left, mouth_right));
        let drop = minus(mouth, eyes);
        // Use both pairs: a turned or tilted head brings one of them off the horizontal.
        let side = [0, 1].map(|i| eye_right[i] - eye_left[i] + mouth_right[i] - mouth_left[i]);
        let (face_px, side_px) = (length(drop), length(side));
        if !(FACE_PX[0]..=FACE_PX[1]).contains(&face_px) || side_px <= 0.0 {
            return Err(bad_landmarks(format!(
                "expected {} to {} px from eyes to mouth and distinct left and right points, found {face_px} px \
                 in {landmarks:?}",
                FACE_PX[0], FACE_PX[1]
            )));
        }
        let (axis_x, axis_y) = (side.map(|v| v / side_px), drop.map(|v| v / face_px));
        let sine = axis_x[0] * axis_y[1] - axis_x[1] * axis_y[0];
        // Below 0.3 the eyes, the nose and the mouth are on one line; above, a face may be strongly turned. A negative
        // sine is a mirrored face: left and right landmarks were swapped.
        if sine < 0.3 || side_px < 0.1 * face_px {
            return Err(bad_landmarks(format!(
                "expected eyes above the mouth, left before right and not on one line, found {landmarks:?}"
            )));
        }
        let across = [axis_y[1] / sine, -axis_y[0] / sine];
        let down = [-axis_x[1] / (sine * face_px), axis_x[0] / (sine * face_px)];
        let height = |p: [f32; 2]| dot(down, minus(p, eyes));
        // Turning shortens the distance between the eyes, nodding the one from eyes to mouth: use the larger.
        let radius_px = HALF_WIDTH * face_px.max(length(minus(eye_right, eye_left)) / EYE_DISTANCE);
        let nose_px = dot(across, minus(nose, eyes));
        let sin_yaw = (nose_px / (NOSE_DEPTH * radius_px)).clamp(-MAX_SIN_YAW, MAX_SIN_YAW);
        Ok(Self {
            eyes,
            across,
            down,
            axis_x,
            axis_y,
            unit_px: face_px,
            radius_px,
            centre_px: -FACE_DEPTH * radius_px * sin_yaw,
            sin_yaw,
            yaw: arc_sine(sin_yaw),
            taper,
            eye_height: height(eye_left).max(height(eye_right)).clamp(0.0, 0.3),
            nose_height: height(nose).clamp(0.2, 0.8),
        })
    }

    /// Returns the face coordinates of pixel position `p`.
    #[inline(always)]
    pub fn locate(&self, p: [f32; 2]) -> FacePoint {
        let offset = minus(p, self.eyes);
        let height = dot(self.down, offset);
        let radius = self.radius(height);
        let flat = (dot(self.across, offset) - self.centre_px) / radius;
        // When the head turns, the bulge over the nose moves sideways by as much as it stands out at the point. Near
        // the middle, the difference of the sines approximates that of the angles.
        let bulge = NOSE_BULGE * falloff((flat - self.sin_yaw) * 1.7) * falloff((height - self.nose_height) * 1.6);
        let facing = flat - bulge * self.sin_yaw;
        let inside = facing.clamp(-1.0, 1.0);
        FacePoint { angle: arc_sine(inside) - self.yaw, height, facing, cosine: (1.0 - inside * inside).sqrt() }
    }

    /// Returns the image position of the head's point at `angle` and `height`, in pixels, and whether it faces the
    /// viewer.
    pub fn project(&self, angle: f32, height: f32) -> ([f32; 2], bool) {
        let turned = angle + self.yaw;
        let across = self.centre_px + self.radius(height) * turned.sin();
        let down = height * self.unit_px;
        ([0, 1].map(|i| self.eyes[i] + across * self.axis_x[i] + down * self.axis_y[i]), turned.cos() > 0.0)
    }

    /// Returns the image position `across` (in distances from eyes to mouth) from the face axis at `height`, on the
    /// plane through eyes and mouth.
    pub fn on_plane(&self, across: f32, height: f32) -> [f32; 2] {
        let (across, down) = (across * self.unit_px, height * self.unit_px);
        [0, 1].map(|i| self.eyes[i] + across * self.axis_x[i] + down * self.axis_y[i])
    }

    /// Returns the positions of the head's left and right outlines at the cheeks, for [`FaceFrame::on_plane`].
    pub fn sides(&self) -> (f32, f32) {
        let (centre, radius) = (self.centre_px / self.unit_px, self.radius_px / self.unit_px);
        (centre - radius, centre + radius)
    }

    /// Returns half the width of the head at `height`, in pixels.
    #[inline(always)]
    pub fn radius(&self, height: f32) -> f32 {
        let below = (height - 0.55).clamp(0.0, 1.6);
        self.radius_px * (1.0 - self.taper * below * below).max(0.45)
    }
}

/// A bell without an exponential: 1 at 0, falling to 0.25 at 1.
#[inline(always)]
pub(super) fn falloff(x: f32) -> f32 {
    let y = 1.0 / (1.0 + x * x);
    y * y
}

/// Arc sine of `x` in `[-1, 1]` within 7e-5 rad (Abramowitz and Stegun, 4.4.45), the same on every machine.
#[inline(always)]
fn arc_sine(x: f32) -> f32 {
    let a = x.abs();
    let tail = (1.0 - a).sqrt() * (1.570_728_8 + a * (-0.212_114_4 + a * (0.074_261 - 0.018_729_3 * a)));
    (std::f32::consts::FRAC_PI_2 - tail).copysign(x)
}

fn middle(a: [f32; 2], b: [f32; 2]) -> [f32; 2] {
    [0, 1].map(|i| 0.5 * a[i] + 0.5 * b[i])
}

#[inline(always)]
fn minus(a: [f32; 2], b: [f32; 2]) -> [f32; 2] {
    [a[0] - b[0], a[1] - b[1]]
}

#[inline(always)]
fn dot(a: [f32; 2], b: [f32; 2]) -> f32 {
    a[0] * b[0] + a[1] * b[1]
}

fn length(a: [f32; 2]) -> f32 {
    a[0].hypot(a[1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ALIGNED_LANDMARKS;

    #[test]
    fn a_frontal_face_has_no_turn_and_known_heights() {
        let frame = FaceFrame::new(&ALIGNED_LANDMARKS, 0.2).unwrap();
        let (nose, mouth) = (frame.locate([56.0, 71.7]), frame.locate([56.1, 92.3]));
        assert!(nose.angle.abs() < 0.03 && (nose.height - 0.49).abs() < 0.02, "{nose:?}");
        assert!(mouth.angle.abs() < 0.03 && (mouth.height - 1.0).abs() < 0.01, "{mouth:?}");
    }

    #[test]
    fn a_nose_to_the_right_turns_the_middle_of_the_face_to_the_right() {
        let mut landmarks = ALIGNED_LANDMARKS;
        landmarks[2][0] += 8.0;
        let frame = FaceFrame::new(&landmarks, 0.2).unwrap();
        assert!(frame.yaw > 0.3);
        assert!(frame.locate([landmarks[2][0], landmarks[2][1]]).angle.abs() < 0.1);
        assert!(frame.project(1.2, 0.5).0[0] < 112.0 && !frame.project(1.3, 0.5).1);
    }

    #[test]
    fn projecting_undoes_locating_away_from_the_nose() {
        let frame = FaceFrame::new(&ALIGNED_LANDMARKS, 0.2).unwrap();
        for p in [[30.0, 60.0], [80.0, 100.0], [56.0, 110.0]] {
            let at = frame.locate(p);
            let back = frame.project(at.angle, at.height).0;
            assert!((back[0] - p[0]).abs() < 0.3 && (back[1] - p[1]).abs() < 0.3, "{p:?}: {back:?}");
        }
    }
}
