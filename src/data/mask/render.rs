//! Draws a design onto an image: only the rectangle that the mask can reach is visited.

use image::RgbImage;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::fabric::MaskPoint;
use super::frame::{FaceFrame, FacePoint, falloff};
use super::kinds::Design;
use super::light::{Light, luminance};
use super::noise::Noise;

/// Units of fabric in a distance from eyes to mouth.
const UNITS: f32 = 40.0;
/// How far a mask's shadow reaches over the skin, in units.
const SHADOW_REACH: f32 = 6.0;

/// A drawn mask, before it is put on the image.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    origin: [u32; 2],
    size: [u32; 2],
    /// Red, green, blue (multiplied by the cover) and cover in `[0, 1]`.
    pixels: Vec<[f32; 4]>,
    /// What the skin beside the mask is multiplied by.
    shadows: Vec<f32>,
}

/// A straight piece of strap in the image, pixels.
struct Strap {
    from: [f32; 2],
    along: [f32; 2],
    /// `1 / |along|^2`.
    per_length: f32,
}

/// Draws a mask for `image`, whose light it takes on, with the machine's widest vector instructions; the result is the same
/// with all.
pub(super) fn draw(image: &RgbImage, frame: &FaceFrame, design: &Design, noise: &Noise, rng: &mut ChaCha8Rng) -> Layer {
    pulp::Arch::new().dispatch(Draw { image, frame, design, noise, rng })
}

struct Draw<'a> {
    image: &'a RgbImage,
    frame: &'a FaceFrame,
    design: &'a Design,
    noise: &'a Noise,
    rng: &'a mut ChaCha8Rng,
}

impl pulp::NullaryFnOnce for Draw<'_> {
    type Output = Layer;

    #[inline(always)]
    fn call(self) -> Layer {
        let Self { image, frame, design, noise, rng } = self;
        draw_here(image, frame, design, noise, rng)
    }
}

#[inline(always)]
fn draw_here(image: &RgbImage, frame: &FaceFrame, design: &Design, noise: &Noise, rng: &mut ChaCha8Rng) -> Layer {
    let light = Light::measure(image, frame);
    let brightness = rng.random_range(0.92..1.06f32);
    let strap_width = rng.random_range(0.3..0.7f32);
    let is_white_strap = rng.random_bool(0.6);
    let strap_colour = if is_white_strap { [225.0; 3] } else { design.fabric.base };
    let grain_at = [rng.random_range(0..64), rng.random_range(0..64)];

    let scale = frame.unit_px / UNITS;
    let (origin, size) = reach(image, frame, design);
    let straps = straps(frame, design);
    let mut pixels = Vec::with_capacity(size[0] as usize * size[1] as usize);
    let mut shadows = Vec::with_capacity(pixels.capacity());
    let mut faces = vec![FacePoint::default(); size[0] as usize];
    for y in origin[1]..origin[1] + size[1] {
        // A loop of its own: it has no branches, so that several pixels go at once.
        for (face, x) in faces.iter_mut().zip(origin[0] as i32..) {
            *face = frame.locate([x as f32, y as f32]);
        }
        for (&face, x) in faces.iter().zip(origin[0]..) {
            let position = [x as f32, y as f32];
            let (mask, outside_px, is_on_head) = place(frame, design, face);
            let mut cover = (0.5 - outside_px / 1.3).clamp(0.0, 1.0);
            let mut colour = [0.0; 3];
            if cover > 0.0 {
                colour = design.fabric.colour(&mask, noise);
            }
            // Straps begin at the mask's ends and lead away from it.
            if outside_px > -1.0 && mask.p.abs() > 0.9 {
                let strap = straps.iter().map(|s| s.cover(position, strap_width * scale.max(0.8))).fold(0.0, f32::max);
                if strap > cover {
                    (colour, cover) = (strap_colour.map(|v| v * 0.85), strap);
                }
            }
            shadows.push(if is_on_head { contact_shadow(&mask, outside_px / scale) } else { 1.0 });
            if cover <= 0.0 {
                pixels.push([0.0; 4]);
                continue;
            }
            let relight = brightness * (1.0 + light.slope * mask.face.facing.clamp(-1.0, 1.0));
            let grain = light.grain * noise.cell(x as i32 + grain_at[0], y as i32 + grain_at[1]);
            let [red, green, blue] = lit(colour, &light, relight).map(|v| (v + grain) * cover);
            pixels.push([red, green, blue, cover]);
        }
    }
    let mut layer = Layer { origin, size, pixels, shadows };
    layer.blur(light.blur);
    layer
}

impl Layer {
    /// Puts the mask on the image it was drawn for; pixels without cover or shadow keep their value.
    pub fn blend(&self, image: &mut RgbImage) {
        let places = (0..self.size[1]).flat_map(|y| (0..self.size[0]).map(move |x| (x, y)));
        for (((x, y), &[red, green, blue, cover]), &shadow) in places.zip(&self.pixels).zip(&self.shadows) {
            if cover <= 0.0 && shadow >= 1.0 {
                continue;
            }
            let target = &mut image.get_pixel_mut(self.origin[0] + x, self.origin[1] + y).0;
            for (value, mask) in target.iter_mut().zip([red, green, blue]) {
                // The cast truncates and saturates.
                *value = (f32::from(*value) * shadow * (1.0 - cover) + mask + 0.5) as u8;
            }
        }
    }

    /// Cover of the mask at a pixel, `[0, 1]`.
    #[cfg(test)]
    pub fn cover(&self, x: u32, y: u32) -> f32 {
        let (column, row) = (x.wrapping_sub(self.origin[0]), y.wrapping_sub(self.origin[1]));
        if column >= self.size[0] || row >= self.size[1] {
            return 0.0;
        }
        self.pixels[(row * self.size[0] + column) as usize][3]
    }

    /// Whether blending can change a pixel.
    #[cfg(test)]
    pub fn touches(&self, x: u32, y: u32) -> bool {
        let (column, row) = (x.wrapping_sub(self.origin[0]), y.wrapping_sub(self.origin[1]));
        column < self.size[0]
            && row < self.size[1]
            && (self.cover(x, y) > 0.0 || self.shadows[(row * self.size[0] + column) as usize] < 1.0)
    }

    /// Blurs with `[weight, 1 - 2 weight, weight]` across, then down; the border is repeated.
    fn blur(&mut self, weight: f32) {
        let (width, height) = (self.size[0] as usize, self.size[1] as usize);
        let middle = 1.0 - 2.0 * weight;
        let mix = |before: [f32; 4], at: [f32; 4], after: [f32; 4]| -> [f32; 4] {
            std::array::from_fn(|i| middle * at[i] + weight * (before[i] + after[i]))
        };
        if width == 0 || height == 0 {
            return;
        }
        for row in self.pixels.chunks_exact_mut(width) {
            let mut before = row[0];
            for x in 0..width {
                let (at, after) = (row[x], row[(x + 1).min(width - 1)]);
                row[x] = mix(before, at, after);
                before = at;
            }
        }
        let mut above: Vec<[f32; 4]> = self.pixels[..width].to_vec();
        for y in 0..height {
            for (x, above) in above.iter_mut().enumerate() {
                let at = self.pixels[y * width + x];
                let below = self.pixels[(y + 1).min(height - 1) * width + x];
                self.pixels[y * width + x] = mix(*above, at, below);
                *above = at;
            }
        }
    }
}

/// The mask coordinates of a point of the face, its distance outside the mask's edge in pixels (negative inside), and whether it is
/// on the head.
#[inline(always)]
fn place(frame: &FaceFrame, design: &Design, face: FacePoint) -> (MaskPoint, f32, bool) {
    let p = face.angle / design.half_angle;
    let ((top, top_scale), (bottom, bottom_scale)) = (design.top.at(p), design.bottom.at(p));
    let radius = frame.radius(face.height);
    let above = (top - face.height) * frame.unit_px * top_scale;
    let below = (face.height - bottom) * frame.unit_px * bottom_scale;
    // Where the surface turns away a step along it is shorter in the image, but never nothing: the outline comes first.
    let beside = (face.angle.abs() - design.half_angle) * radius * face.cosine.max(0.25);
    let outline = (face.facing.abs() - 1.0) * radius;
    let scale = frame.unit_px / UNITS;
    let corner = design.corner * scale;
    let (a, b) = (above.max(below) + corner, beside + corner);
    let rounded = (a.max(0.0) * a.max(0.0) + b.max(0.0) * b.max(0.0)).sqrt() - corner + a.max(b).min(0.0);
    let outside_px = rounded.max(outline);
    let mask = MaskPoint {
        face,
        p,
        below_top: (face.height - top) * UNITS,
        tall: (bottom - top) * UNITS,
        inside: -outside_px / scale,
        at: [face.angle * radius / scale, face.height * UNITS],
    };
    (mask, outside_px, outline < 0.0)
}

/// What skin at this distance (in units) outside the mask is multiplied by; light comes from above, so less shadow
/// falls above the mask.
fn contact_shadow(mask: &MaskPoint, outside: f32) -> f32 {
    if outside <= 0.0 || outside >= SHADOW_REACH {
        return 1.0;
    }
    let strength = if mask.below_top < 0.0 { 0.16 } else { 0.32 };
    let fade = 1.0 - outside / SHADOW_REACH;
    1.0 - strength * fade * falloff(outside * 0.45)
}

/// A fabric's colour in the photo's light.
fn lit(colour: [f32; 3], light: &Light, relight: f32) -> [f32; 3] {
    let grey = luminance(colour);
    std::array::from_fn(|i| {
        let value = (grey + light.saturation * (colour[i] - grey)) * light.gain[i] * relight;
        // Highlights roll off instead of clipping, as a camera's do.
        if value > 235.0 { 235.0 + 20.0 * (1.0 - 20.0 / (value - 215.0)) } else { value.max(2.0) }
    })
}

/// First column and row, and number of columns and rows, of the part of the image that the mask, its straps and its
/// shadow can reach.
fn reach(image: &RgbImage, frame: &FaceFrame, design: &Design) -> ([u32; 2], [u32; 2]) {
    let margin = SHADOW_REACH / UNITS;
    let strap_top = design.straps.map_or(f32::INFINITY, |s| s[0]);
    let top = design.top.range().0.min(strap_top) - margin;
    let bottom = design.bottom.range().1 + margin;
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

/// The pieces of strap that the viewer sees.
fn straps(frame: &FaceFrame, design: &Design) -> Vec<Strap> {
    let Some([upper, lower]) = design.straps else { return Vec::new() };
    let mut pieces = Vec::new();
    for side in [-1.0, 1.0] {
        let (top, bottom) = (design.top.at(side).0, design.bottom.at(side).0);
        // A little inside the corners, so that a rounded one is still reached.
        let inset = 0.04 * (bottom - top);
        for (corner, ear) in [(top + inset, upper), (bottom - inset, lower)] {
            let (from, is_seen) = frame.project(side * design.half_angle * 0.97, corner);
            let (to, _) = frame.project(side * design.half_angle.max(1.5), ear);
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
            let with = draw(&image, &frame, &design, &noise, &mut rng.clone());
            let without = draw_here(&image, &frame, &design, &noise, &mut rng);
            assert!(with.pixels.iter().any(|pixel| pixel[3] > 0.0));
            assert_eq!((with.origin, with.size), (without.origin, without.size));
            assert!(with.pixels == without.pixels && with.shadows == without.shadows, "{kind:?}");
        }
    }
}
