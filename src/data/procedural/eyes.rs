//! Eyes and eyebrows.

use super::canvas::Canvas;
use super::draw::noise;
use super::identity::{Brows, Eyes};
use super::nuisance::{Expression, Light};
use super::shape::{bell, bump, cover, lerp, mix, ramp, scaled};

/// Paints both eyes.
pub(super) fn paint(canvas: &mut Canvas, eyes: &Eyes, expression: &Expression, light: &Light) {
    let open = expression.eye_open.clamp(0.08, 1.3);
    // The eye mirrors the key light.
    let glint = [1.9 * light.to_key[0], 1.6 * light.to_key[1] - 0.3];
    for side in [-1.0, 1.0] {
        let centre = side * eyes.spacing;
        canvas.around([centre, eyes.v], [eyes.half_w + 5.0, 13.0], |p| {
            let x = side * (p.u - centre);
            let a = x / eyes.half_w;
            let y = p.v - eyes.v + eyes.slant * a;
            let arc = 1.0 - a * a;
            let full = eyes.upper * arc * (1.0 + eyes.peak * a);
            let upper = if arc > 0.0 { full * open - 0.9 * eyes.lower * arc * (1.0 - open).max(0.0) } else { full };
            let lower = eyes.lower * arc * (1.0 + 0.25 * a) * lerp(1.0, open.min(1.0), 0.4);
            // Distance inside the lids, px, corrected to first order for the slope of the lids near the corners.
            let slope = 2.0 * a / eyes.half_w;
            let from_upper = (y + upper) / (1.0 + (eyes.upper * slope) * (eyes.upper * slope)).sqrt();
            let from_lower = (lower - y) / (1.0 + (eyes.lower * slope) * (eyes.lower * slope)).sqrt();
            let inside = cover(-from_upper.min(from_lower), 1.1);

            // The lids bulge over the ball; the crease runs above the upper one.
            p.height += 1.7 * bump(x, y + 0.5, eyes.half_w + 1.5, 6.5);
            let fold = (y + full * 0.9 + eyes.crease_gap) / (1.0 + 0.10 * x * x / eyes.half_w).sqrt();
            let along = bell(a * a * 0.8);
            p.crease(0.42 * eyes.crease * along * bell(fold * fold / 1.9));
            p.crease(0.16 * along * ramp(-eyes.crease_gap - 2.0, 0.0, -from_upper) * (1.0 - inside));
            let bag = y - eyes.lower - 3.2 + 0.03 * x * x;
            p.crease(0.26 * eyes.bags * bell(bag * bag / 3.0) * bell(a * a * 0.7));

            let (ix, iy) = (x - side * expression.gaze[0], y + 0.5 - expression.gaze[1]);
            let r = (ix * ix + iy * iy).sqrt();
            let white = mix([0.54, 0.49, 0.46], [0.34, 0.22, 0.19], ramp(0.5, 1.0, a.abs()));
            let fibre = 0.85 + 0.3 * noise(1.7 * ix, 1.7 * iy, 77) + 0.35 * ramp(0.2, 1.0, iy / eyes.iris_r);
            let iris = scaled(eyes.iris, fibre * lerp(1.15, 0.35, ramp(0.62, 1.0, r / eyes.iris_r)));
            let mut ball = mix(white, iris, cover(r - eyes.iris_r, 1.1));
            ball = mix(ball, [0.006, 0.005, 0.005], cover(r - 0.42 * eyes.iris_r, 1.0));
            // The lid casts a shadow on the ball.
            ball = scaled(ball, lerp(0.45, 1.0, ramp(-0.2, 2.6, from_upper)));
            let (gx, gy) = (p.u - centre - expression.gaze[0] - glint[0], iy - glint[1]);
            ball = mix(ball, [1.5, 1.5, 1.5], 0.85 * cover((gx * gx + gy * gy).sqrt() - 0.55, 1.0));
            p.lay(ball, inside);
            p.gloss *= 1.0 - inside;
            p.skin *= 1.0 - 0.7 * inside;

            let on_lid = cover(a.abs() - 1.04, 0.1);
            let thick = lerp(0.55, 1.15, eyes.lashes) * (0.75 + 0.3 * a);
            p.lay([0.018, 0.012, 0.010], (0.5 + 0.5 * eyes.lashes) * on_lid * cover(from_upper.abs() - thick, 1.1));
            p.lay([0.10, 0.045, 0.035], (0.25 + 0.25 * eyes.lashes) * on_lid * cover(from_lower.abs() - 0.3, 1.2));
            // The pink of the inner corner.
            p.lay([0.42, 0.17, 0.14], 0.6 * bump(a + 0.93, y / eyes.half_w, 0.16, 0.16));
        });
    }
}

/// Paints both eyebrows, `raised` px above their rest position.
pub(super) fn brows(canvas: &mut Canvas, brows: &Brows, eyes: &Eyes, raised: f32) {
    let v = eyes.v - brows.gap - raised;
    let length = brows.outer_u - brows.inner_u;
    let middle = 0.5 * (brows.outer_u + brows.inner_u);
    for side in [-1.0, 1.0] {
        canvas.around([side * middle, v], [0.5 * length + 3.0, 9.0], |p| {
            let t = (side * p.u - brows.inner_u) / length;
            let span = if t < brows.arch_at { brows.arch_at } else { 1.15 - brows.arch_at };
            let off = (t - brows.arch_at) / span;
            let line = v - brows.arch * (1.0 - off * off) - brows.slope * (t - 0.5) - 0.4 * raised * off;
            let taper = lerp(1.0, 0.35, ramp(0.35, 1.0, t)) * ramp(-0.12, 0.12, t);
            let ragged = 0.45 * noise(0.55 * side * p.u + 0.5 * p.v, 0.35 * p.v, 11);
            let half = 0.5 * brows.thickness * taper + 0.4;
            let ends = (-t).max(t - 1.0) * length;
            let d = ((p.v - line).abs() - half + ragged).max(ends);
            let strands = 0.85 + 0.25 * noise(1.1 * (side * p.u + 0.8 * p.v), 0.3 * p.v, 12);
            let alpha = (brows.density * strands).min(1.0) * cover(d, 1.8);
            p.lay(brows.color, alpha);
            p.gloss *= 1.0 - alpha;
            p.height += 0.35 * alpha;
            p.skin *= 1.0 - 0.6 * alpha;
        });
    }
}
