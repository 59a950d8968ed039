//! Relief of the nose, which also gives it parallax.

use super::identity::Nose;
use super::shape::{bell, bump, lerp, ramp};

/// Row where the bridge starts.
const ROOT_V: f32 = 46.0;

/// Height of the nose above the face at `(u, v)`, px.
pub(super) fn nose_height(nose: &Nose, u: f32, v: f32) -> f32 {
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
