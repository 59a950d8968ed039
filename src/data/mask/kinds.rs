//! Kinds of masks: their outlines, folds and fabrics, drawn with random variation.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::fabric::{Fabric, Pattern, Pleat, Valve, Wrinkle};
use super::frame::{FaceFrame, falloff};
use super::outline::{Curve, Outline};

/// A kind of mask, or a way to wear one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskKind {
    /// A pleated medical mask.
    Surgical,
    /// A plain fabric mask shaped to the face, with or without a centre seam.
    Cloth,
    /// A folded FFP2 or KN95 cup with a centre seam.
    Ffp2,
    /// A medical or fabric mask worn below the nose.
    LowWorn,
    /// A medical or fabric mask pulled up to just under the eyes.
    HighWorn,
    /// A fabric mask with a printed pattern in two colours.
    Patterned,
    /// A round respirator with a valve and head straps.
    Respirator,
    /// A neck gaiter or bandana that reaches down over the chin.
    Gaiter,
}

/// One mask: its outline on the head, and its fabric.
#[derive(Clone, Debug)]
pub(super) struct Design {
    /// Outline on the head.
    pub outline: Outline,
    /// Fabric of the mask.
    pub fabric: Fabric,
    /// Heights at the ears where the upper and the lower strap end; `None` without straps.
    pub straps: Option<[f32; 2]>,
}

/// Parameters of an outline; heights are in distances from eyes to mouth.
struct Shape {
    half_angle: f32,
    corner: f32,
    /// Height of the upper edge at the nose, of its lowest point beside the nose, and at the ends.
    top: [f32; 3],
    /// Height of the lower edge at the chin and at the ends, and which of two curves lies between.
    bottom: [f32; 2],
    power: i32,
}

impl MaskKind {
    /// Every kind, in the order of declaration.
    pub const ALL: [Self; 8] = [
        Self::Surgical,
        Self::Cloth,
        Self::Ffp2,
        Self::LowWorn,
        Self::HighWorn,
        Self::Patterned,
        Self::Respirator,
        Self::Gaiter,
    ];

    /// Rough share of masks of this kind, in percent, judged by eye in 143 photos from the web of people who wear one.
    /// Masks worn below the nose are rare in these, and commoner where nobody poses.
    pub(super) fn share(self) -> f32 {
        match self {
            Self::Surgical => 44.0,
            Self::Cloth => 26.0,
            Self::Ffp2 | Self::Patterned => 8.0,
            Self::Respirator | Self::HighWorn => 4.0,
            Self::LowWorn | Self::Gaiter => 3.0,
        }
    }

    /// Narrowing of a mask of this kind towards the chin (see [`FaceFrame::new`]).
    pub(super) fn taper(self) -> f32 {
        match self {
            Self::Surgical | Self::LowWorn | Self::HighWorn => 0.20,
            Self::Cloth | Self::Patterned => 0.30,
            Self::Ffp2 | Self::Respirator => 0.26,
            Self::Gaiter => 0.16,
        }
    }
}

impl Design {
    /// Returns a random mask of `kind` for the head `frame`, in two colours (the second one for prints).
    pub fn new(kind: MaskKind, colours: [[f32; 3]; 2], frame: &FaceFrame, rng: &mut ChaCha8Rng) -> Self {
        // Masks worn low or high have either of two fabrics.
        let is_pleated = match kind {
            MaskKind::Surgical => true,
            MaskKind::LowWorn | MaskKind::HighWorn => rng.random_bool(0.6),
            _ => false,
        };
        let shape = if is_pleated { Shape::pleated(rng) } else { Shape::of(kind, rng) };
        let lift = rng.random_range(-0.07..0.03f32);
        let (tilt, skew) = (rng.random_range(-0.05..0.05f32), rng.random_range(-0.04..0.04f32));
        let covers = |angle: f32, height: f32| fit_to_face(kind, frame, angle, height);
        let top = Curve::new(frame, shape.half_angle, |p, angle| {
            covers(angle, shape.top(p) + worn(kind, frame) + lift + tilt * p)
        });
        let bottom = Curve::new(frame, shape.half_angle, |p, angle| {
            let height = shape.bottom(p) + 0.5 * lift + skew * p;
            // Always covers the mouth.
            if angle.abs() < 0.65 { height.max(1.2) } else { height.max(top.at(p).0 + 0.2) }
        });
        let straps = match kind {
            MaskKind::Gaiter => None,
            MaskKind::Respirator => Some([rng.random_range(-0.15..0.1), rng.random_range(0.8..1.0)]),
            MaskKind::LowWorn => Some([rng.random_range(0.35..0.55), rng.random_range(0.75..0.9)]),
            _ => Some([rng.random_range(0.1..0.3), rng.random_range(0.6..0.85)]),
        };
        let fabric = fabric(kind, is_pleated, colours, rng);
        let outline = Outline { half_angle: shape.half_angle, corner: shape.corner, top, bottom };
        Self { outline, fabric, straps }
    }
}

impl Shape {
    fn pleated(rng: &mut ChaCha8Rng) -> Self {
        let nose = rng.random_range(0.18..0.32f32);
        Self {
            half_angle: rng.random_range(1.08..1.34),
            corner: rng.random_range(1.0..3.0),
            top: [nose, nose + rng.random_range(0.04..0.13), nose + rng.random_range(0.02..0.16)],
            bottom: [rng.random_range(1.5..1.7), rng.random_range(1.0..1.25)],
            power: 2,
        }
    }

    fn of(kind: MaskKind, rng: &mut ChaCha8Rng) -> Self {
        match kind {
            MaskKind::Ffp2 => {
                let nose = rng.random_range(0.16..0.28f32);
                let beside = nose + rng.random_range(0.14..0.22f32);
                Self {
                    half_angle: rng.random_range(1.05..1.28),
                    corner: rng.random_range(2.0..4.0),
                    top: [nose, beside, beside + rng.random_range(0.1..0.2)],
                    bottom: [rng.random_range(1.5..1.68), rng.random_range(0.9..1.05)],
                    power: 1,
                }
            }
            MaskKind::Respirator => {
                let nose = rng.random_range(0.18..0.28f32);
                let beside = nose + rng.random_range(0.10..0.16f32);
                Self {
                    half_angle: rng.random_range(0.95..1.1),
                    corner: rng.random_range(8.0..12.0),
                    top: [nose, beside, beside + rng.random_range(0.16..0.24)],
                    bottom: [rng.random_range(1.45..1.6), rng.random_range(0.95..1.1)],
                    power: 2,
                }
            }
            MaskKind::Gaiter => {
                let nose = rng.random_range(0.24..0.38f32);
                Self {
                    half_angle: 1.7,
                    corner: 0.5,
                    top: [nose, nose + rng.random_range(0.06..0.14), nose + rng.random_range(0.02..0.16)],
                    bottom: [rng.random_range(2.1..2.6), rng.random_range(2.0..2.4)],
                    power: 2,
                }
            }
            MaskKind::Surgical | MaskKind::Cloth | MaskKind::LowWorn | MaskKind::HighWorn | MaskKind::Patterned => {
                let nose = rng.random_range(0.20..0.32f32);
                let beside = nose + rng.random_range(0.10..0.18f32);
                Self {
                    half_angle: rng.random_range(1.18..1.42),
                    corner: rng.random_range(2.0..5.0),
                    top: [nose, beside, beside + rng.random_range(-0.06..0.06)],
                    bottom: [rng.random_range(1.52..1.72), rng.random_range(0.82..1.0)],
                    power: 1,
                }
            }
        }
    }

    fn top(&self, p: f32) -> f32 {
        let [nose, beside, end] = self.top;
        let (a, peak) = (p.abs(), falloff(p * 2.6));
        let rest = beside + (end - beside) * a * a;
        rest + (nose - rest) * peak
    }

    fn bottom(&self, p: f32) -> f32 {
        let [chin, end] = self.bottom;
        let square = p * p;
        // With power 1 the curve leaves the chin sooner; both curves are flat in the middle.
        let fall = if self.power == 1 { square * (1.35 - 0.35 * square) } else { square * (0.55 + 0.45 * square) };
        chin + (end - chin) * fall
    }
}

/// Offset of the upper edge for the way in which the mask is worn.
fn worn(kind: MaskKind, frame: &FaceFrame) -> f32 {
    match kind {
        MaskKind::LowWorn => frame.nose_height - 0.12,
        MaskKind::HighWorn => -0.24,
        _ => 0.0,
    }
}

/// Returns the height nearest to `height` that leaves the eyes free and covers the nose, or leaves the nose free if the
/// mask is worn low.
fn fit_to_face(kind: MaskKind, frame: &FaceFrame, angle: f32, height: f32) -> f32 {
    let eyes = frame.eye_height + 0.14 - 0.09 * falloff(angle * 5.0);
    let nose = frame.nose_height;
    // Beside the nose the limit relaxes without a step.
    let beside = 1.2 * (angle.abs() - 0.22).max(0.0);
    match kind {
        MaskKind::LowWorn => height.max(nose + 0.09 - beside).max(eyes).min(nose.max(0.6) + 0.2 + beside),
        _ => height.min(nose - 0.12 + beside).max(eyes.min(nose - 0.05 + beside)),
    }
}

/// Returns a random fabric of a kind, with its folds.
fn fabric(kind: MaskKind, is_pleated: bool, colours: [[f32; 3]; 2], rng: &mut ChaCha8Rng) -> Fabric {
    let mut y = Fabric {
        base: colours[0],
        second: colours[1],
        pattern: Pattern::Plain,
        pleats: Vec::new(),
        wrinkles: Vec::new(),
        seam: 0.0,
        hem: rng.random_range(0.06..0.14),
        hem_at: rng.random_range(2.2..3.2),
        wire: 0.0,
        weave: rng.random_range(0.008..0.022),
        mottle: rng.random_range(0.02..0.05),
        valve: None,
        underside: rng.random_range(0.14..0.30),
        noise_at: [rng.random_range(0.0..64.0), rng.random_range(0.0..64.0)],
    };
    if is_pleated {
        let count = rng.random_range(2..=4);
        let first = rng.random_range(0.34..0.44f32);
        let apart = rng.random_range(0.4..0.5f32) / count as f32;
        for i in 0..count {
            y.pleats.push(Pleat {
                at: first + apart * i as f32 + rng.random_range(-0.015..0.015),
                sag: rng.random_range(-0.04..0.06),
                depth: rng.random_range(0.14..0.32),
            });
        }
        y.wire = rng.random_range(0.03..0.09);
    }
    match kind {
        MaskKind::Ffp2 => {
            y.seam = rng.random_range(0.14..0.28);
            y.weave = rng.random_range(0.004..0.012);
        }
        MaskKind::Cloth | MaskKind::Patterned if rng.random_bool(0.6) => y.seam = rng.random_range(0.08..0.2),
        MaskKind::Respirator => {
            let side = if rng.random_bool(0.5) { 1.0 } else { -1.0 };
            y.valve = Some(Valve {
                at: [side * rng.random_range(0.0..12.0f32), rng.random_range(34.0..42.0)],
                radius: rng.random_range(5.0..6.5),
                level: rng.random_range(0.35..1.0),
            });
        }
        _ => {}
    }
    if kind == MaskKind::Patterned {
        y.pattern = Pattern::sample(rng);
    }
    let (count, depth) = match kind {
        MaskKind::Ffp2 | MaskKind::Respirator => (2, 0.05),
        MaskKind::Gaiter => (9, 0.18),
        _ if is_pleated => (6, 0.10),
        _ => (6, 0.12),
    };
    for _ in 0..count {
        y.wrinkles.push(Wrinkle::sample(depth, rng));
    }
    y
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::data::ALIGNED_LANDMARKS;

    #[test]
    fn every_kind_leaves_the_eyes_free_and_covers_nose_and_mouth() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for kind in MaskKind::ALL {
            let frame = FaceFrame::new(&ALIGNED_LANDMARKS, kind.taper()).unwrap();
            for _ in 0..300 {
                let design = Design::new(kind, [[200.0; 3]; 2], &frame, &mut rng);
                for i in -10..=10 {
                    let p = i as f32 / 10.0;
                    let ((top, _), (bottom, _)) = (design.outline.top.at(p), design.outline.bottom.at(p));
                    assert!(top > 0.045 && bottom > top + 0.15, "{kind:?} at {p}: {top} to {bottom}");
                }
                let (top, bottom) = (design.outline.top.at(0.0).0, design.outline.bottom.at(0.0).0);
                assert!((top > frame.nose_height) == (kind == MaskKind::LowWorn), "{kind:?}: {top}");
                assert!(top < 0.9 && bottom > 1.15, "{kind:?}: {top} to {bottom}");
            }
        }
    }

    #[test]
    fn an_unknown_kind_is_an_error_that_lists_the_known_ones() {
        let error = serde_json::from_str::<MaskKind>("\"visor\"").unwrap_err().to_string();
        for kind in MaskKind::ALL {
            let name = serde_json::to_string(&kind).unwrap();
            assert!(error.contains(name.trim_matches('"')), "{error}");
        }
    }
}
