//! A run of pixels of one row, processed together. Every step is a loop without branches over arrays of a fixed length,
//! so that vector instructions handle several pixels at once.

use super::frame::{FaceFrame, UNITS};
use super::outline::Outline;

/// Pixels of a block: enough that the compiler vectorises the loops instead of unrolling them first, few enough to skip
/// pixels that a mask does not reach.
pub(super) const LANES: usize = 32;

/// One value per pixel of a block.
pub(super) type Lanes = [f32; LANES];

/// Positions of a block's pixels on the face and on the mask. Lengths without a unit are in fortieths of the distance
/// from eyes to mouth.
#[derive(Clone, Debug)]
pub(super) struct Block {
    /// Angle around the head, radians, 0 at the middle of the face.
    pub angle: Lanes,
    /// Height on the face: 0 at the eyes, 1 at the mouth.
    pub height: Lanes,
    /// Sine and cosine of the angle between the surface normal and the viewer.
    pub facing: Lanes,
    pub cosine: Lanes,
    /// Position across the mask, `[-1, 1]` from its left to its right end.
    pub p: Lanes,
    /// Distance below the upper edge, and distance between the edges.
    pub below_top: Lanes,
    pub tall: Lanes,
    /// Distance from the nearest edge, positive inside.
    pub inside: Lanes,
    /// Position on the face: across along the surface, and down from the eyes.
    pub across: Lanes,
    pub down: Lanes,
    /// Distance outside the mask's edge and outside the head's outline, pixels, negative inside.
    pub outside_px: Lanes,
    pub outline_px: Lanes,
}

impl Block {
    /// Returns the block that begins at column `x` of row `y`.
    #[inline(always)]
    pub fn new(frame: &FaceFrame, outline: &Outline, [x, y]: [u32; 2]) -> Self {
        const NONE: Lanes = [0.0; LANES];
        let mut m = Self {
            angle: NONE,
            height: NONE,
            facing: NONE,
            cosine: NONE,
            p: NONE,
            below_top: NONE,
            tall: NONE,
            inside: NONE,
            across: NONE,
            down: NONE,
            outside_px: NONE,
            outline_px: NONE,
        };
        for i in 0..LANES {
            let face = frame.locate([(x as i32 + i as i32) as f32, y as i32 as f32]);
            (m.angle[i], m.height[i]) = (face.angle, face.height);
            (m.facing[i], m.cosine[i]) = (face.facing, face.cosine);
        }
        let scale = frame.unit_px / UNITS;
        let corner = outline.corner * scale;
        for i in 0..LANES {
            let (angle, height) = (m.angle[i], m.height[i]);
            let p = angle / outline.half_angle;
            let ((top, top_scale), (bottom, bottom_scale)) = (outline.top.at(p), outline.bottom.at(p));
            let radius = frame.radius(height);
            let above = (top - height) * frame.unit_px * top_scale;
            let below = (height - bottom) * frame.unit_px * bottom_scale;
            // Where the surface turns away, a step along it is shorter in the image. The factor has a lower limit,
            // since the outline ends the mask first.
            let beside = (angle.abs() - outline.half_angle) * radius * m.cosine[i].max(0.25);
            let outside_head = (m.facing[i].abs() - 1.0) * radius;
            let (a, b) = (above.max(below) + corner, beside + corner);
            let rounded = (a.max(0.0) * a.max(0.0) + b.max(0.0) * b.max(0.0)).sqrt() - corner + a.max(b).min(0.0);
            let outside = rounded.max(outside_head);
            m.p[i] = p;
            m.below_top[i] = (height - top) * UNITS;
            m.tall[i] = (bottom - top) * UNITS;
            m.inside[i] = -outside / scale;
            m.across[i] = angle * radius / scale;
            m.down[i] = height * UNITS;
            (m.outside_px[i], m.outline_px[i]) = (outside, outside_head);
        }
        m
    }
}
