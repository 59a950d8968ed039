//! The nose and the nostrils.

use super::canvas::Canvas;
use super::identity::Nose;
use super::relief::nose_height;
use super::shape::{bump, cover, ellipse, segment};

/// Paints the nose; a smile widens it.
pub(super) fn paint(canvas: &mut Canvas, nose: &Nose, smile: f32) {
    let wide = nose.wing_w + 0.7 * smile.max(0.0);
    let base_v = nose.tip_v + 4.3;
    canvas.around([0.0, 58.0], [16.0, 24.0], |p| {
        p.height += nose_height(nose, p.u, p.v);
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
