//! Outline of the head, skin, large forms, ears, neck and clothes.

use super::canvas::Canvas;
use super::draw::noise;
use super::identity::{Ears, Identity, Skull};
use super::nuisance::Scene;
use super::shape::{Rgb, bump, cover, ellipse, lerp, mix, ramp, scaled};

/// Rows at which the outline is tabulated: `STEPS` per px, from `TOP` on.
const TOP: f32 = -40.0;
const STEPS: f32 = 2.0;
const ROWS: usize = 400;
/// Points per segment of the outline's curve.
const POINTS: usize = 12;

/// Signed distance to the outline, px, below which the head hides everything behind it, so it need not be painted.
pub(super) const HIDDEN: f32 = -3.0;

/// The half width of the head as a function of `v`.
pub(super) struct Outline {
    /// Half width and `1 / |gradient|` of `|u| - half width`.
    rows: Vec<[f32; 2]>,
}

impl Outline {
    /// Returns the outline of `skull`, with the chin lowered by `drop` px.
    pub(super) fn new(skull: &Skull, drop: f32) -> Self {
        let s = skull;
        let chin_v = s.chin_v + drop;
        let top = -19.0 - s.forehead;
        let knots = [
            [-s.temple_w * 0.76, top + 8.0],
            [0.0, top],
            [s.temple_w * 0.76, top + 8.0],
            [s.temple_w * 0.965, 14.0],
            [s.temple_w, 38.0],
            [s.cheek_w, 62.0],
            [lerp(s.cheek_w, s.jaw_w, 0.45), lerp(62.0, s.jaw_v, 0.6)],
            [s.jaw_w, s.jaw_v + 0.5 * drop],
            [s.chin_w, chin_v - 3.2],
            [0.0, chin_v],
            [-s.chin_w, chin_v - 3.2],
        ];
        let mut width = vec![f32::NAN; ROWS];
        let mut last = [0.0, top];
        for k in knots.windows(4) {
            for step in 1..=POINTS {
                let point = catmull_rom(k, step as f32 / POINTS as f32);
                fill(&mut width, last, point);
                last = point;
            }
        }
        // Beyond top and chin the width becomes negative, so that the distance keeps growing.
        let at = |row: usize| TOP + row as f32 / STEPS;
        for (row, w) in width.iter_mut().enumerate().filter(|(_, w)| w.is_nan()) {
            *w = -3.0 * (top - at(row)).max(at(row) - chin_v).max(0.0);
        }
        let rows = (0..ROWS).map(|i| {
            let (a, b) = (i.saturating_sub(1), (i + 1).min(ROWS - 1));
            let slope = (width[b] - width[a]) * STEPS / (b - a) as f32;
            [width[i], 1.0 / (1.0 + slope * slope).sqrt()]
        });
        Self { rows: rows.collect() }
    }

    /// Half width of the head at row `v` (negative above and below it), and the factor that turns the horizontal
    /// distance to it into the shortest one.
    pub(super) fn at(&self, v: f32) -> [f32; 2] {
        let at = ((v - TOP) * STEPS).clamp(0.0, (ROWS - 2) as f32);
        let (row, t) = (at as usize, at - (at as usize) as f32);
        let (a, b) = (self.rows[row], self.rows[row + 1]);
        [lerp(a[0], b[0], t), lerp(a[1], b[1], t)]
    }
}

/// Returns the point at fraction `t` between the second and the third of four knots.
fn catmull_rom(k: &[[f32; 2]], t: f32) -> [f32; 2] {
    [0, 1].map(|i| {
        let (a, b, c, d) = (k[0][i], k[1][i], k[2][i], k[3][i]);
        b + 0.5 * t * (c - a + t * (2.0 * a - 5.0 * b + 4.0 * c - d + t * (3.0 * (b - c) + d - a)))
    })
}

/// Enters the line from `a` down to `b` into the table.
fn fill(width: &mut [f32], a: [f32; 2], b: [f32; 2]) {
    let row = |v: f32| ((v - TOP) * STEPS).max(0.0);
    let (first, last) = (row(a[1]) as usize, (row(b[1]) as usize).min(ROWS - 1));
    for (i, w) in width.iter_mut().enumerate().take(last + 1).skip(first) {
        let v = TOP + i as f32 / STEPS;
        if v >= a[1] && v <= b[1] {
            *w = lerp(a[0], b[0], (v - a[1]) / (b[1] - a[1]).max(1e-3));
        }
    }
}

/// Skin tone in one image.
pub(super) fn skin_tone(identity: &Identity, scene: &Scene) -> Rgb {
    let (tone, tan) = (identity.skin.tone, scene.tan);
    [tone[0] * tan[0], tone[1] * tan[1], tone[2] * tan[2]]
}

/// Paints neck and shoulders.
pub(super) fn neck(canvas: &mut Canvas, identity: &Identity, scene: &Scene, tone: Rgb) {
    let width = identity.skull.neck_w;
    let collar = 113.0 + 4.0 * scene.gradient[0];
    canvas.around([0.0, 110.0], [90.0, 34.0], |p| {
        if p.rim < HIDDEN {
            return;
        }
        let side = p.u.abs();
        let skin = cover(side - width - 0.012 * (p.v - 80.0) * (p.v - 80.0), 1.5) * ramp(76.0, 80.0, p.v);
        let cloth = cover(collar + 0.10 * (side - 14.0).max(0.0) - 0.25 * (20.0 - side).max(0.0) - p.v, 1.5)
            * cover(side - 30.0 - 2.6 * (p.v - 100.0), 2.0);
        p.lay(scaled(tone, 0.8), skin);
        p.lay(scene.clothes, cloth);
        p.figure = p.figure.max(skin).max(cloth);
        p.skin = skin * (1.0 - cloth);
        p.height = lerp(p.height, -36.0 - 10.0 * (side / 40.0) * (side / 40.0) + 3.0 * cloth, skin.max(cloth));
        // Little light reaches the skin under the jaw.
        p.crease(0.5 * skin * ramp(124.0, 100.0, p.v));
    });
}

/// Paints both ears.
pub(super) fn ears(canvas: &mut Canvas, ears: &Ears, skull: &Skull, tone: Rgb) {
    for side in [-1.0, 1.0] {
        let centre = side * (skull.cheek_w - 3.0 + 0.5 * ears.out);
        canvas.around([centre, ears.v], [12.0, ears.half_h + 5.0], |p| {
            let (x, y) = (side * (p.u - centre), p.v - ears.v);
            let narrow = lerp(1.0, 0.62 * ears.lobe, ramp(-0.3 * ears.half_h, ears.half_h, y));
            let (rx, ry) = ((3.6 + ears.out) * narrow, ears.half_h);
            let d = ellipse(x - 0.15 * (ears.half_h - y) * 0.4, y, rx, ry);
            let alpha = cover(d, 1.3);
            p.lay(mix(tone, [tone[0], tone[1] * 0.72, tone[2] * 0.7], 0.5), alpha);
            p.figure = p.figure.max(alpha);
            p.skin = p.skin.max(alpha);
            p.height =
                lerp(p.height, -14.0 + 2.2 * bump(x - 1.0, y, rx, ry) - 2.5 * bump(x, y, 0.6 * rx, 0.7 * ry), alpha);
            p.crease(0.4 * alpha * bump(x - 0.4, y + 1.0, 0.55 * rx, 0.6 * ry));
        });
    }
}

/// Stores every pixel's distance to the outline.
pub(super) fn measure(canvas: &mut Canvas, outline: &Outline) {
    canvas.everywhere(|p| {
        let [width, steep] = outline.at(p.v);
        p.rim = (p.u.abs() - width) * steep;
    });
}

/// Paints the bare head with its large forms.
pub(super) fn paint(canvas: &mut Canvas, identity: &Identity, outline: &Outline, tone: Rgb, smile: f32) {
    let (skull, skin) = (&identity.skull, &identity.skin);
    let eyes = &identity.eyes;
    let chin = skull.chin_v - 8.0;
    let blush = [tone[0] * 1.04, tone[1] * 0.80, tone[2] * 0.80];
    canvas.everywhere(|p| {
        let alpha = cover(p.rim, 1.3);
        if alpha == 0.0 {
            return;
        }
        let (u, v) = (p.u.abs(), p.v);
        let [width, _] = outline.at(v);
        let q = (u / width.max(1.0)).min(1.0);
        let round = 27.0 * ((1.0 - 0.91 * q * q).sqrt() - 1.0);
        let low = (v - 62.0) / 58.0;
        let under = (1.0 + p.rim / 9.0).max(0.0);
        let mut h = round - 11.0 * low * low - 4.5 * under * under;
        h += (skull.cheekbone + 1.3 * smile.max(0.0)) * bump(u - 24.5, v - 68.0 + 1.5 * smile, 17.0, 12.0);
        h -= skull.cheek_hollow * bump(u - 25.0, v - 87.0, 13.0, 15.0);
        h += skull.forehead * bump(u - 10.0, v - 28.0, 20.0, 15.0);
        h -= eyes.socket * bump(u - eyes.spacing + 2.0, v - eyes.v + 0.5, 13.5, 9.0);
        h += identity.brows.ridge * bump(u - 14.0, v - eyes.v + identity.brows.gap - 1.0, 17.0, 6.5);
        h += skull.chin_boss * bump(u, v - chin, 12.5, 9.0);
        h -= 0.9 * skull.chin_cleft * bump(u, v - chin - 1.5, 2.2, 6.0);
        h -= 2.2 * bump(u - 37.0, v - 36.0, 13.0, 24.0);
        p.height = lerp(p.height, h, alpha);
        let mottle = 1.0 + 0.035 * noise(0.3 * p.u, 0.3 * v, skin.salt);
        let flush = (0.35 + 0.65 * skin.blush) * bump(u - 24.0, v - 72.0, 18.0, 14.0)
            + 0.3 * bump(u, v - identity.nose.tip_v, 10.0, 9.0);
        p.lay(scaled(mix(tone, blush, flush.min(1.0)), mottle), alpha);
        p.open = lerp(
            p.open,
            1.0 - 0.10 * (eyes.socket / 4.2) * bump(u - eyes.spacing + 3.0, v - eyes.v + 1.5, 13.0, 8.0),
            alpha,
        );
        // The middle of the face shines most.
        p.gloss = alpha * skin.gloss * (0.35 + 0.65 * bump(u, v - 55.0, 34.0, 60.0));
        p.figure = p.figure.max(alpha);
        p.skin = p.skin.max(alpha);
    });
}
