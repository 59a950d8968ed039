//! Draws a mask's design, visiting only the rectangle that the mask can reach.

use image::RgbImage;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::block::{Block, LANES, Lanes};
use super::border::Border;
use super::frame::{FaceFrame, UNITS, falloff};
use super::kinds::Design;
use super::layer::Layer;
use super::light::{Light, luminance};
use super::noise::Noise;

/// Reach of a mask's shadow over the skin, in units.
const SHADOW_REACH: f32 = 6.0;

/// A straight piece of strap in the image, in pixels.
struct Strap {
    from: [f32; 2],
    along: [f32; 2],
    /// `1 / |along|^2`.
    per_length: f32,
}

/// Everything that is drawn besides the fabric itself.
struct Finish {
    light: Light,
    brightness: f32,
    strap_colour: [f32; 3],
    strap_half_width_px: f32,
    straps: Vec<Strap>,
    grain_at: [i32; 2],
}

/// Draws a mask, lit like `image`, onto `layer`. The work uses the machine's widest vector instructions; the result is
/// the same with any of them.
pub(super) fn draw(
    image: &RgbImage,
    frame: &FaceFrame,
    design: &Design,
    noise: &Noise,
    rng: &mut ChaCha8Rng,
    layer: &mut Layer,
) {
    let (origin, size) = reach(image, frame, design);
    layer.reset(origin, size);
    let finish = Finish::new(image, frame, design, rng);
    crate::vectors::arch().dispatch(Draw { frame, design, noise, finish: &finish, layer, origin, size });
    if let Some(border) = Border::find(image) {
        layer.clear(|at| border.has(at));
    }
}

/// Per-pixel work of [`draw`].
struct Draw<'a> {
    frame: &'a FaceFrame,
    design: &'a Design,
    noise: &'a Noise,
    finish: &'a Finish,
    layer: &'a mut Layer,
    origin: [u32; 2],
    size: [u32; 2],
}

impl pulp::NullaryFnOnce for Draw<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { frame, design, noise, finish, layer, origin, size } = self;
        let scale = frame.unit_px / UNITS;
        let width = size[0] as usize;
        for row in 0..size[1] {
            for column in (0..width).step_by(LANES) {
                let at = [origin[0] + column as u32, origin[1] + row];
                let m = Block::new(frame, &design.outline, at);
                let shadow = contact_shadow(&m, scale);
                let [red, green, blue, cover] = paint(&m, design, noise, finish, at);
                let num = LANES.min(width - column);
                layer.store([column, row as usize], num, [&red, &green, &blue, &cover, &shadow]);
            }
        }
        layer.blur(finish.light.blur);
    }
}

/// Returns red, green and blue in the photo's light, multiplied by the coverage, and the coverage.
#[inline(always)]
fn paint(m: &Block, design: &Design, noise: &Noise, finish: &Finish, [x, y]: [u32; 2]) -> [Lanes; 4] {
    let mut cover = [0.0; LANES];
    let (mut is_covered, mut is_at_end) = (false, false);
    for i in 0..LANES {
        cover[i] = (0.5 - m.outside_px[i] / 1.3).clamp(0.0, 1.0);
        is_covered |= cover[i] > 0.0;
        is_at_end |= ends_here(m, i);
    }
    let mut colour = if is_covered { design.fabric.colour(m, noise) } else { [[0.0; LANES]; 3] };
    if is_at_end {
        finish.add_straps(m, [x, y], &mut colour, &mut cover);
    } else if !is_covered {
        return [[0.0; LANES]; 4];
    }
    let light = &finish.light;
    for i in 0..LANES {
        let relight = finish.brightness * (1.0 + light.slope * m.facing[i].clamp(-1.0, 1.0));
        let grain = light.grain * noise.cell(x as i32 + i as i32 + finish.grain_at[0], y as i32 + finish.grain_at[1]);
        let is_seen = cover[i] > 0.0;
        let lit = lit([colour[0][i], colour[1][i], colour[2][i]], light, relight);
        // Not a `zip`, here and below: the compiler may leave its calls in the loop, which then has no vectors.
        for k in 0..3 {
            colour[k][i] = if is_seen { (lit[k] + grain) * cover[i] } else { 0.0 };
        }
    }
    let [red, green, blue] = colour;
    [red, green, blue, cover]
}

/// Whether a strap may be at a pixel: straps begin at the mask's ends and lead away from it.
#[inline(always)]
fn ends_here(m: &Block, i: usize) -> bool {
    (m.outside_px[i] > -1.0) & (m.p[i].abs() > 0.9)
}

impl Finish {
    fn new(image: &RgbImage, frame: &FaceFrame, design: &Design, rng: &mut ChaCha8Rng) -> Self {
        let light = Light::measure(image, frame);
        let brightness = rng.random_range(0.92..1.06f32);
        let strap_width = rng.random_range(0.3..0.7f32);
        let strap_colour = if rng.random_bool(0.6) { [225.0; 3] } else { design.fabric.base };
        Self {
            light,
            brightness,
            strap_colour: strap_colour.map(|v| v * 0.85),
            strap_half_width_px: strap_width * (frame.unit_px / UNITS).max(0.8),
            straps: straps(frame, design),
            grain_at: [rng.random_range(0..64), rng.random_range(0..64)],
        }
    }

    /// Draws the straps where their coverage exceeds the mask's.
    #[inline(always)]
    fn add_straps(&self, m: &Block, [x, y]: [u32; 2], colour: &mut [Lanes; 3], cover: &mut Lanes) {
        let mut strap = [0.0f32; LANES];
        for piece in &self.straps {
            for i in 0..LANES {
                let position = [(x as i32 + i as i32) as f32, y as f32];
                strap[i] = strap[i].max(piece.cover(position, self.strap_half_width_px));
            }
        }
        for i in 0..LANES {
            let is_strap = ends_here(m, i) & (strap[i] > cover[i]);
            for k in 0..3 {
                colour[k][i] = if is_strap { self.strap_colour[k] } else { colour[k][i] };
            }
            cover[i] = if is_strap { strap[i] } else { cover[i] };
        }
    }
}

/// Returns the factor on skin outside the mask. Light comes from above, so less shadow falls above the mask, and none
/// beside the head.
#[inline(always)]
fn contact_shadow(m: &Block, scale: f32) -> Lanes {
    let mut shadow = [0.0; LANES];
    for i in 0..LANES {
        let outside = m.outside_px[i] / scale;
        let strength = if m.below_top[i] < 0.0 { 0.16 } else { 0.32 };
        let fade = 1.0 - outside / SHADOW_REACH;
        let is_shadow = (outside > 0.0) & (outside < SHADOW_REACH) & (m.outline_px[i] < 0.0);
        shadow[i] = if is_shadow { 1.0 - strength * fade * falloff(outside * 0.45) } else { 1.0 };
    }
    shadow
}

/// Returns a fabric's colour in the photo's light.
#[inline(always)]
fn lit(colour: [f32; 3], light: &Light, relight: f32) -> [f32; 3] {
    let grey = luminance(colour);
    let mut y = [0.0; 3];
    for i in 0..3 {
        let value = (grey + light.saturation * (colour[i] - grey)) * light.gain[i] * relight;
        // Highlights roll off instead of clipping, as a camera's do.
        let rolled = 235.0 + 20.0 * (1.0 - 20.0 / (value - 215.0));
        y[i] = if value > 235.0 { rolled } else { value.max(2.0) };
    }
    y
}

/// Returns the first column and row, and the number of columns and rows, of the part of the image that the mask, its
/// straps and its shadow can reach.
fn reach(image: &RgbImage, frame: &FaceFrame, design: &Design) -> ([u32; 2], [u32; 2]) {
    let margin = SHADOW_REACH / UNITS;
    let strap_top = design.straps.map_or(f32::INFINITY, |s| s[0]);
    let top = design.outline.top.range().0.min(strap_top) - margin;
    let bottom = design.outline.bottom.range().1 + margin;
    let (left, right) = frame.sides();
    let corners = [[left, top], [right, top], [left, bottom], [right, bottom]].map(|c| frame.on_plane(c[0], c[1]));
    let limit = [image.width(), image.height()];
    let bound = |axis: usize| {
        let least = corners.iter().fold(f32::INFINITY, |m, c| m.min(c[axis])) - 2.0;
        let most = corners.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c[axis])) + 3.0;
        // The casts saturate.
        let first = (least.max(0.0) as u32).min(limit[axis]);
        (first, (most.max(0.0) as u32).clamp(first, limit[axis]) - first)
    };
    let ((x, width), (y, height)) = (bound(0), bound(1));
    ([x, y], [width, height])
}

/// Returns the pieces of strap that are visible.
fn straps(frame: &FaceFrame, design: &Design) -> Vec<Strap> {
    let Some([upper, lower]) = design.straps else { return Vec::new() };
    let mut pieces = Vec::new();
    for side in [-1.0, 1.0] {
        let (top, bottom) = (design.outline.top.at(side).0, design.outline.bottom.at(side).0);
        // A little inside the corners, so that rounded corners are still reached.
        let inset = 0.04 * (bottom - top);
        for (corner, ear) in [(top + inset, upper), (bottom - inset, lower)] {
            let (from, is_seen) = frame.project(side * design.outline.half_angle * 0.97, corner);
            let (to, _) = frame.project(side * design.outline.half_angle.max(1.5), ear);
            let along = [to[0] - from[0], to[1] - from[1]];
            let squared = along[0] * along[0] + along[1] * along[1];
            if is_seen && squared > 0.0 {
                pieces.push(Strap { from, along, per_length: 1.0 / squared });
            }
        }
    }
    pieces
}

impl Strap {
    /// Coverage of the pixel at `p`, `[0, 1]`.
    #[inline(always)]
    fn cover(&self, p: [f32; 2], half_width_px: f32) -> f32 {
        let (dx, dy) = (p[0] - self.from[0], p[1] - self.from[1]);
        let t = ((dx * self.along[0] + dy * self.along[1]) * self.per_length).clamp(0.0, 1.0);
        let (ex, ey) = (dx - t * self.along[0], dy - t * self.along[1]);
        (half_width_px + 0.5 - (ex * ex + ey * ey).sqrt()).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::data::ALIGNED_LANDMARKS;
    use crate::data::mask::MaskKind;

    #[test]
    fn vector_instructions_change_no_bit() {
        let noise = Noise::new();
        let image = RgbImage::from_fn(112, 112, |x, y| image::Rgb([90 + x as u8, 60 + y as u8, (x ^ y) as u8]));
        for (seed, kind) in (0..).zip(MaskKind::ALL) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let frame = FaceFrame::new(&ALIGNED_LANDMARKS, kind.taper()).unwrap();
            let design = Design::new(kind, [[200.0, 210.0, 220.0], [40.0, 80.0, 60.0]], &frame, &mut rng);
            let finish = Finish::new(&image, &frame, &design, &mut rng);
            let (origin, size) = reach(&image, &frame, &design);
            let mut layers = [Layer::default(), Layer::default()];
            for (layer, is_dispatched) in layers.iter_mut().zip([true, false]) {
                layer.reset(origin, size);
                let (frame, design, noise, finish) = (&frame, &design, &noise, &finish);
                let drawing = Draw { frame, design, noise, finish, layer, origin, size };
                if is_dispatched {
                    crate::vectors::arch().dispatch(drawing)
                } else {
                    pulp::NullaryFnOnce::call(drawing)
                }
            }
            assert!((0..112).any(|y| layers[0].cover(56, y) > 0.0));
            assert!(layers[0] == layers[1], "{kind:?}");
        }
    }
}
