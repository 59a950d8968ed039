//! Scalar functions with which every feature is drawn: ramps, bumps and signed distances.

/// Linear RGB, `[0, 1]` for a reflectance. The display value is its square root (a gamma of 2).
pub(super) type Rgb = [f32; 3];

/// Linear interpolation from `a` (`t = 0`) to `b` (`t = 1`).
#[inline]
pub(super) fn lerp(a: f32, b: f32, t: f32) -> f32 {
    a + (b - a) * t
}

/// [`lerp`] of every channel.
#[inline]
pub(super) fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    [lerp(a[0], b[0], t), lerp(a[1], b[1], t), lerp(a[2], b[2], t)]
}

/// Every channel times `k`.
#[inline]
pub(super) fn scaled(a: Rgb, k: f32) -> Rgb {
    [a[0] * k, a[1] * k, a[2] * k]
}

/// The linear colour of an 8-bit display colour.
#[inline]
pub(super) fn rgb(r: u8, g: u8, b: u8) -> Rgb {
    [r, g, b].map(|c| (f32::from(c) / 255.0) * (f32::from(c) / 255.0))
}

/// 0 below `low`, 1 above `high`, smooth in between; falls instead of rising when `low > high`.
#[inline]
pub(super) fn ramp(low: f32, high: f32, x: f32) -> f32 {
    let t = ((x - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// A bell of height 1 at `d2 = 0` that is exactly 0 from `d2 = 1` on; `d2` is a squared distance.
#[inline]
pub(super) fn bell(d2: f32) -> f32 {
    let t = (1.0 - d2).max(0.0);
    t * t
}

/// [`bell`] over an ellipse: `(x, y)` from its centre, radii `rx` and `ry`.
#[inline]
pub(super) fn bump(x: f32, y: f32, rx: f32, ry: f32) -> f32 {
    let (x, y) = (x / rx, y / ry);
    bell(x * x + y * y)
}

/// Coverage of a pixel by a shape at signed distance `d` (px, negative inside), with an edge `soft` px wide.
#[inline]
pub(super) fn cover(d: f32, soft: f32) -> f32 {
    (0.5 - d / soft).clamp(0.0, 1.0)
}

/// Approximate signed distance to an ellipse (exact on its axes, first order elsewhere).
#[inline]
pub(super) fn ellipse(x: f32, y: f32, rx: f32, ry: f32) -> f32 {
    let (a, b) = (x / rx, y / ry);
    let k = (a * a + b * b).sqrt();
    let (ga, gb) = (a / rx, b / ry);
    let g = (ga * ga + gb * gb).sqrt();
    if g < 1e-6 { -rx.min(ry) } else { k * (k - 1.0) / g }
}

/// Distance from `p` to the segment `a b`, and the position of the nearest point along it (`[0, 1]`).
#[inline]
pub(super) fn segment(p: [f32; 2], a: [f32; 2], b: [f32; 2]) -> (f32, f32) {
    let (px, py, bx, by) = (p[0] - a[0], p[1] - a[1], b[0] - a[0], b[1] - a[1]);
    let t = ((px * bx + py * by) / (bx * bx + by * by)).clamp(0.0, 1.0);
    let (dx, dy) = (px - t * bx, py - t * by);
    ((dx * dx + dy * dy).sqrt(), t)
}

/// Signed distance to a box with half sides `hx`, `hy` and corners rounded with radius `r`.
#[inline]
pub(super) fn rounded_box(x: f32, y: f32, hx: f32, hy: f32, r: f32) -> f32 {
    let (qx, qy) = (x.abs() - hx + r, y.abs() - hy + r);
    let (ox, oy) = (qx.max(0.0), qy.max(0.0));
    (ox * ox + oy * oy).sqrt() + qx.max(qy).min(0.0) - r
}
