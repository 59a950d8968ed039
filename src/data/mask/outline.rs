//! Outline of a mask on the head.

use super::frame::FaceFrame;

/// Points at which an outline is tabulated across the mask.
const CURVE_POINTS: usize = 33;

/// A height as a function of the position across the mask, `[-1, 1]` from its left to its right end.
#[derive(Clone, Debug)]
pub(super) struct Curve {
    heights: [f32; CURVE_POINTS],
    /// Factor that turns a vertical distance to the curve into about the true distance.
    foreshortening: [f32; CURVE_POINTS],
}

/// Outline of a mask.
#[derive(Clone, Debug)]
pub(super) struct Outline {
    /// Angle around the head at which the mask ends, radians.
    pub half_angle: f32,
    /// Radius of the corners, in fortieths of the distance from eyes to mouth.
    pub corner: f32,
    /// Upper edge.
    pub top: Curve,
    /// Lower edge.
    pub bottom: Curve,
}

impl Curve {
    pub fn new(frame: &FaceFrame, half_angle: f32, height: impl Fn(f32, f32) -> f32) -> Self {
        let place = |i: usize| i as f32 / (CURVE_POINTS - 1) as f32 * 2.0 - 1.0;
        let heights: [f32; CURVE_POINTS] = std::array::from_fn(|i| height(place(i), half_angle * place(i)));
        let step = half_angle * frame.radius_px / frame.unit_px * (place(1) - place(0));
        let foreshortening = std::array::from_fn(|i| {
            let (from, to) = (i.saturating_sub(1), (i + 1).min(CURVE_POINTS - 1));
            let slope = (heights[to] - heights[from]) / (step * (to - from) as f32);
            1.0 / (1.0 + slope * slope).sqrt()
        });
        Self { heights, foreshortening }
    }

    /// Returns the height at `p` (beyond `[-1, 1]`, that of the ends) and the factor that makes vertical distances true
    /// ones.
    #[inline(always)]
    pub fn at(&self, p: f32) -> (f32, f32) {
        let place = (p.clamp(-1.0, 1.0) + 1.0) * 0.5 * (CURVE_POINTS - 1) as f32;
        // A cast to `usize` has no vector instruction.
        let i = (place as i32).clamp(0, CURVE_POINTS as i32 - 2) as usize;
        let f = place - i as i32 as f32;
        let mix = |v: &[f32; CURVE_POINTS]| v[i] + f * (v[i + 1] - v[i]);
        (mix(&self.heights), mix(&self.foreshortening))
    }

    /// Returns the least and the greatest height.
    pub fn range(&self) -> (f32, f32) {
        self.heights.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &h| (a.min(h), b.max(h)))
    }
}
