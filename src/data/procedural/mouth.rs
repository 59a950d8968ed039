//! The mouth: lips, the gap between them, and the relief around them.

use super::canvas::Canvas;
use super::identity::{Identity, Marks, Mouth};
use super::nuisance::{Expression, Scene};
use super::shape::{Rgb, bell, bump, cover, lerp, mix, ramp, rgb, scaled, segment};

/// Shape of the mouth in one image.
pub(super) struct Pose {
    half_w: f32,
    /// Row of the line between the lips on the midline, and how far its corners lie below that row (negative: above).
    v: f32,
    corner: f32,
    gap: f32,
    smile: f32,
}

impl Pose {
    /// Returns the shape of `mouth` with `expression`.
    pub(super) fn new(mouth: &Mouth, expression: &Expression) -> Self {
        let (smile, open) = (expression.smile, expression.mouth_open);
        Self {
            half_w: mouth.half_w * (1.0 + 0.13 * smile - 0.07 * open),
            v: mouth.v + 0.4 * smile - 0.3 * open,
            corner: -mouth.corners - 2.6 * smile + 1.2 * open,
            gap: 5.5 * open + 1.6 * (smile - 0.55).max(0.0),
            smile,
        }
    }

    /// `(u, v)` of the two corners, the image's left one first.
    pub(super) fn corners(&self) -> [[f32; 2]; 2] {
        [-1.0, 1.0].map(|side| [side * self.half_w, self.v + self.corner])
    }

    /// How far the chin drops, px.
    pub(super) fn chin_drop(&self) -> f32 {
        0.75 * self.gap
    }
}

/// Colour of the lips, in skin of the colour `tone`.
pub(super) fn color(identity: &Identity, scene: &Scene, tone: Rgb) -> Rgb {
    let lip = mix(identity.mouth.color, tone, 0.12);
    let is_painted = identity.beard.stubble == 0.0;
    mix(lip, rgb(176, 52, 64), if is_painted { 0.6 * scene.lipstick } else { 0.0 })
}

/// Paints the mouth with lips of the colour `lip`.
pub(super) fn paint(canvas: &mut Canvas, mouth: &Mouth, marks: &Marks, pose: &Pose, lip: Rgb) {
    let thin = 1.0 - 0.16 * pose.smile.max(0.0);
    canvas.around([0.0, pose.v + 0.5 * pose.gap], [pose.half_w + 5.0, 13.0 + pose.gap], |p| {
        let a = p.u / pose.half_w;
        let arc = (1.0 - a * a).max(0.0);
        let line = pose.v + pose.corner * a * a + 0.35 * mouth.bow * bump(a, 0.0, 0.3, 1.0);
        let (line_u, line_l) = (line - 0.25 * pose.gap * arc, line + 0.75 * pose.gap * arc);
        let bow = mouth.bow * (0.30 * bell((a.abs() - 0.24) * (a.abs() - 0.24) / 0.05) - 0.26 * bell(a * a / 0.03));
        let top = line_u - mouth.upper * thin * (arc * (0.45 + 0.55 * arc) + bow);
        let bottom = line_l + mouth.lower * thin * arc * (0.35 + 0.65 * arc.sqrt());
        let ends = (a.abs() - 1.0) * pose.half_w;

        let upper = cover((top - p.v).max(p.v - line_u).max(ends), 1.5);
        let lower = cover((line_l - p.v).max(p.v - bottom).max(ends), 1.5);
        p.lay(scaled(lip, 0.80), upper);
        p.lay(lip, lower * 0.92);
        let lips = upper.max(lower);
        p.gloss = lerp(p.gloss, 0.9, 0.7 * lower);

        // Relief: the upper lip faces down, the lower one up, with a hollow below it and the philtrum above.
        let t = ((p.v - top) / (line_u - top).max(0.5)).clamp(0.0, 1.0);
        p.height += mouth.fullness * 0.8 * upper * t * arc;
        p.height +=
            mouth.fullness * 1.2 * bump(a, (p.v - line_l - 0.45 * mouth.lower) / (0.9 * mouth.lower), 0.85, 1.0);
        p.height -= 1.3 * bump(p.u, p.v - bottom - 3.0, 10.0, 3.4);
        p.height -= 0.7 * mouth.philtrum * bump(p.u, p.v - top + 3.0, 2.4, 5.0);
        p.crease(0.16 * bump(p.u, p.v - bottom - 1.2, 9.0, 2.6));

        // Between the lips: darkness, and as much of the teeth as a smile bares.
        let inside = cover((line_u - p.v).max(p.v - line_l).max(ends), 1.2) * ramp(0.3, 1.2, pose.gap);
        let teeth_v = line_u + 0.3 + (0.35 + 0.5 * pose.smile.clamp(0.0, 1.0)) * pose.gap;
        let teeth = cover(p.v - teeth_v, 1.2) * ramp(0.9, 0.6, a.abs());
        let shade = lerp(0.75, 1.0, ramp(0.0, 1.5, p.v - line_u)) * (1.0 - 0.35 * a * a);
        let dark = mix([0.05, 0.012, 0.010], [0.25, 0.06, 0.055], bump(a, (p.v - line_l) / 4.0, 0.6, 1.0));
        p.lay(mix(dark, scaled([0.72, 0.68, 0.60], shade), teeth), inside);
        p.gloss *= 1.0 - inside;

        let slit = (p.v - line).abs() - 0.25;
        let closed = 1.0 - ramp(0.2, 1.0, pose.gap);
        p.lay([0.06, 0.014, 0.012], 0.72 * closed * cover(slit.max(ends), 1.4));
        p.crease(0.35 * bump(p.u.abs() - pose.half_w - 0.4, p.v - pose.v - pose.corner, 2.6, 2.2));
        p.skin *= 1.0 - 0.4 * lips;
    });
    folds(canvas, marks, pose);
}

/// Paints the folds from the wings of the nose past the corners of the mouth.
fn folds(canvas: &mut Canvas, marks: &Marks, pose: &Pose) {
    let depth = (0.55 * marks.nasolabial + 0.45 * pose.smile.max(0.0)).min(1.0);
    let (top, foot) = ([11.5, pose.v - 19.0], [pose.half_w + 4.2, pose.v - 2.0 + 0.5 * pose.corner]);
    let knee = [lerp(top[0], foot[0], 0.62) + 1.2 + pose.smile.max(0.0), lerp(top[1], foot[1], 0.5)];
    for side in [-1.0, 1.0] {
        canvas.around([side * 16.0, pose.v - 10.0], [10.0, 15.0], |p| {
            let point = [side * p.u, p.v];
            let ((d1, t1), (d2, t2)) = (segment(point, top, knee), segment(point, knee, foot));
            let (d, t) = if d1 < d2 { (d1, 0.5 * t1) } else { (d2, 0.5 + 0.5 * t2) };
            let fade = ramp(0.0, 0.3, t) * ramp(1.0, 0.6, t);
            p.crease(0.26 * depth * fade * bell(d * d / 4.0));
            p.height -= 0.8 * depth * fade * bell(d * d / 14.0);
        });
    }
}
