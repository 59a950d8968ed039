//! The nose: its relief, which also gives it parallax, and the nostrils.

use super::canvas::Canvas;
use super::identity::Nose;
use super::shape::{bell, bump, cover, ellipse, lerp, ramp, segment};

/// Row where the bridge starts.
const ROOT_V: f32 = 46.0;

/// Height of the nose above the face at `(u, v)`, px.
pub(super) fn profile(nose: &Nose, u: f32, v: f32) -> f32 {
    if u.abs() > 14.0 || v < ROOT_V - 6.0 || v > nose.tip_v + 9.0 {
        return 0.0;
    }
    let t = ((v - ROOT_V) / (nose.tip_v - ROOT_V)).clamp(0.0, 1.0);
    let u = u - nose.skew * t;
    let width = lerp(nose.bridge_w, nose.tip_w, t) * 1.9;
    let height = lerp(nose.bridge_h, nose.tip_h, t) + nose.hump * 4.0 * t * (1.0 - t) * (1.0 - 0.5 * t);
    // The ridge rises out of the brow and drops below the tip.
    let ends = ramp(ROOT_V - 6.0, ROOT_V + 4.0, v) * ramp(nose.tip_v + 6.0, nose.tip_v - 1.5, v);
    let ridge = height * ends * bell((u / width) * (u / width));
    let ball = 1.6 * bump(u, v - nose.tip_v + nose.upturn, nose.tip_w, 5.5);
    let wing_v = nose.tip_v + 1.8;
    let wings = 2.9 * bump(u.abs() - nose.wing_w + 2.6, v - wing_v, 4.4, 5.0);
    ridge + ball + wings
}

/// Paints the nose; a smile widens it.
pub(super) fn paint(canvas: &mut Canvas, nose: &Nose, smile: f32) {
    let wide = nose.wing_w + 0.7 * smile.max(0.0);
    let base_v = nose.tip_v + 4.3;
    canvas.around([0.0, 58.0], [16.0, 24.0], |p| {
        p.height += profile(nose, p.u, p.v);
        p.gloss += 0.35 * bump(p.u - nose.skew, p.v - nose.tip_v + 1.5, 4.0, 5.0);
    });
    canvas.around([0.0, base_v], [16.0, 8.0], |p| {
        let (u, v) = (p.u - nose.skew, p.v);
        let side = u.abs();
        // Shadow below the tip.
        p.crease(0.22 * bump(u, v - base_v - 0.8, wide * 0.95, 3.2));
        let hole = ellipse(
            side - 0.47 * wide - 0.5,
            v - base_v + 0.6 + 0.3 * nose.upturn + 0.12 * side,
            0.8 + 0.17 * wide,
            0.95,
        );
        let dark = cover(hole, 2.0) * (0.3 + 0.55 * nose.nostril);
        p.lay([0.035, 0.012, 0.010], dark);
        p.gloss *= 1.0 - dark;
        // The crease around the wing.
        let (d, _) = segment([side, v], [wide + 0.5, base_v - 5.0], [wide - 0.4, base_v - 0.4]);
        p.crease(0.34 * cover(d - 0.3, 2.4));
    });
}
