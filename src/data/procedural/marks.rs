//! Freckles, moles, wrinkles and glasses.

use super::canvas::Canvas;
use super::draw::noise;
use super::identity::{Eyes, Marks};
use super::nuisance::Glasses;
use super::shape::{Rgb, bell, bump, cover, lerp, ramp, rounded_box, scaled};

/// Paints the marks on skin of the colour `tone`.
pub(super) fn paint(canvas: &mut Canvas, marks: &Marks, eyes: &Eyes, tone: Rgb, brow_raise: f32) {
    if marks.freckles > 0.0 {
        let color = [tone[0] * 0.62, tone[1] * 0.45, tone[2] * 0.38];
        canvas.around([0.0, 64.0], [34.0, 22.0], |p| {
            let spots = ramp(0.30, 0.62, noise(0.62 * p.u, 0.62 * p.v, marks.freckle_salt));
            let here = bump(p.u.abs() - 12.0, p.v - 66.0, 24.0, 17.0);
            p.lay(color, 0.75 * marks.freckles * spots * here.sqrt() * p.skin);
        });
    }
    for mole in &marks.moles {
        let color = [tone[0] * 0.24, tone[1] * 0.17, tone[2] * 0.15];
        canvas.around([mole.u, mole.v], [3.0, 3.0], |p| {
            let (x, y) = (p.u - mole.u, p.v - mole.v);
            p.lay(color, 0.85 * cover((x * x + y * y).sqrt() - mole.r, 1.2) * p.skin);
        });
    }
    let furrows = (marks.wrinkles + 0.35 * brow_raise.max(0.0)).min(1.3);
    if furrows > 0.05 {
        canvas.around([0.0, 28.0], [30.0, 12.0], |p| {
            let wave = p.v + 0.004 * p.u * p.u + 0.9 * noise(0.08 * p.u, 0.0, marks.freckle_salt);
            for line in [22.0, 27.5, 33.0] {
                let d = wave - line;
                let fade = bump(p.u, 0.0, 27.0, 1.0);
                p.crease(0.18 * furrows * fade * bell(d * d / 2.2) * p.skin);
                p.height -= 0.35 * furrows * fade * bell(d * d / 4.0);
            }
        });
    }
    if marks.wrinkles > 0.0 {
        for side in [-1.0, 1.0] {
            let corner = eyes.spacing + eyes.half_w + 4.0;
            canvas.around([side * corner, eyes.v], [6.0, 7.0], |p| {
                let (x, y) = (side * p.u - corner, p.v - eyes.v);
                for slope in [-0.5, 0.05, 0.6] {
                    let d = y - slope * (x + 4.0);
                    p.crease(0.2 * marks.wrinkles * bump(x, y, 5.5, 6.0) * bell(d * d / 1.2));
                }
            });
        }
    }
}

/// Paints glasses.
pub(super) fn glasses(canvas: &mut Canvas, glasses: &Glasses, eyes: &Eyes) {
    let g = glasses;
    let v = eyes.v + 1.2;
    canvas.around([0.0, v], [46.0, g.half_h + 4.0], |p| {
        let (side, y) = (p.u.abs(), p.v - v);
        let x = side - eyes.spacing - 0.6;
        let lens = rounded_box(x, y, g.half_w, g.half_h, g.round.min(g.half_h));
        let rim = cover(lens.abs() - 0.5 * g.rim, 1.1);
        let bridge = cover((y + 0.35 * g.half_h + 0.05 * p.u * p.u).abs() - 0.5 * g.rim, 1.1)
            * cover(side - eyes.spacing + g.half_w - 0.4, 1.0);
        let arm = cover((y + 0.4 * g.half_h).abs() - 0.5 * g.rim, 1.1)
            * cover(eyes.spacing + g.half_w + 0.6 - side, 1.0)
            * cover(p.rim - 1.5, 1.5);
        let frame = rim.max(bridge).max(arm);
        // Glass dims a little, and mirrors a slanted stripe of the surroundings.
        let inside = cover(lens, 1.0);
        let stripe = bump((x + 0.6 * y) - 2.0, 0.0, 0.5 * g.half_w, 1.0);
        p.lay([0.75, 0.78, 0.82], inside * (0.03 + 0.38 * g.glare * stripe));
        p.crease(0.22 * cover((lens - 1.6).abs() - 0.6, 2.2) * ramp(-2.0, 4.0, y));
        p.lay(scaled(g.color, lerp(1.3, 0.7, ramp(-g.half_h, g.half_h, y))), frame);
        p.gloss = lerp(p.gloss, 0.8, frame);
        p.height += 0.9 * frame;
        p.skin *= 1.0 - frame;
    });
}
