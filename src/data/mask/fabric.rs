//! What a mask looks like at one point: colour, print, folds, seams and weave.
//!
//! Lengths are in fortieths of the distance from eyes to mouth: about a pixel of a 112x112 crop.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::frame::{FacePoint, falloff};
use super::light::luminance;
use super::noise::{Noise, fraction};

/// A fold across the mask.
#[derive(Clone, Debug)]
pub(super) struct Pleat {
    /// Place between the upper (0) and the lower (1) edge.
    pub at: f32,
    /// How much lower it is in the middle than at the ends, same unit.
    pub sag: f32,
    /// Relative darkening in the fold.
    pub depth: f32,
}

/// A short soft crease.
#[derive(Clone, Debug)]
pub(super) struct Wrinkle {
    middle: [f32; 2],
    direction: [f32; 2],
    length: f32,
    width: f32,
    depth: f32,
}

/// A round exhalation valve.
#[derive(Clone, Debug)]
pub(super) struct Valve {
    /// Its middle: across from the middle of the face and down from the eyes.
    pub at: [f32; 2],
    /// Its radius.
    pub radius: f32,
    /// Its brightness, 0 black to 1 white.
    pub level: f32,
}

/// A print in the second colour.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pattern {
    Plain,
    Dots { cell: f32, radius: f32 },
    Stripes { cell: f32, direction: [f32; 2] },
    Checks { cell: f32 },
    Flowers { cell: f32 },
    Blotches { cell: f32 },
    Zigzag { cell: f32 },
}

/// Everything about a mask but its outline.
#[derive(Clone, Debug)]
pub(super) struct Fabric {
    pub base: [f32; 3],
    pub second: [f32; 3],
    pub pattern: Pattern,
    pub pleats: Vec<Pleat>,
    pub wrinkles: Vec<Wrinkle>,
    /// Relative darkening of the centre seam, 0 for none.
    pub seam: f32,
    /// Relative darkening of the stitches along the edge, and their distance from it.
    pub hem: f32,
    pub hem_at: f32,
    /// Relative brightening of the nose wire under the upper edge, 0 for none.
    pub wire: f32,
    /// Relative size of the weave and of larger unevenness.
    pub weave: f32,
    pub mottle: f32,
    pub valve: Option<Valve>,
    /// Relative darkening under the chin.
    pub underside: f32,
    /// Where in the noise tile this mask begins.
    pub noise_at: [f32; 2],
}

/// A point of the mask in its own coordinates.
#[derive(Clone, Copy, Debug)]
pub(super) struct MaskPoint {
    /// The same point of the face.
    pub face: FacePoint,
    /// Across, `[-1, 1]` from the mask's left to its right end.
    pub p: f32,
    /// Distance from the upper edge and distance between the edges.
    pub below_top: f32,
    pub tall: f32,
    /// Distance from the nearest edge, positive inside.
    pub inside: f32,
    /// Across along the surface and down from the eyes.
    pub at: [f32; 2],
}

impl Fabric {
    /// The colour at a point, `[0, 255]` in even light, with the folds' shadows in it but without the photo's light.
    #[inline(always)]
    pub fn colour(&self, m: &MaskPoint, noise: &Noise) -> [f32; 3] {
        let [x, y] = m.at;
        let print = self.pattern.coverage(x, y, noise);
        let mut shade = self.relief(m);
        let [nx, ny] = self.noise_at;
        shade += self.mottle * 2.0 * noise.smooth(nx + x * 0.11, ny + y * 0.11);
        shade += self.weave * noise.smooth(nx + x * 1.3, ny + y * 1.3);
        let mut y: [f32; 3] = std::array::from_fn(|i| self.base[i] + print * (self.second[i] - self.base[i]));
        if let Some(valve) = &self.valve {
            valve.paint(m.at, &mut y);
        }
        // A dark cloth's folds show by their sheen: what is relative on a light one gets a small absolute part there.
        let sheen = 14.0 * (1.0 - luminance(y) / 255.0);
        y.map(|v| v * shade + sheen * (shade - 1.0) * 2.0)
    }

    /// Brightness relative to flat fabric seen from the front.
    #[inline(always)]
    fn relief(&self, m: &MaskPoint) -> f32 {
        let FacePoint { angle, height, cosine, .. } = m.face;
        let mut shade = 0.70 + 0.30 * cosine;
        shade += 0.05 * falloff((height - 0.45) * 3.0) * falloff(angle * 2.2);
        let under = ((height - 0.95) / 0.75).clamp(0.0, 1.0);
        shade -= self.underside * under * (0.4 + 0.6 * under);
        for pleat in &self.pleats {
            let at = (pleat.at + pleat.sag * (1.0 - m.p * m.p)) * m.tall;
            let d = m.below_top - at;
            shade += pleat.depth * (0.35 * falloff((d + 1.6) * 0.7) - falloff((d - 0.5) * 0.75));
        }
        for wrinkle in &self.wrinkles {
            shade += wrinkle.relief(m.at);
        }
        if self.seam > 0.0 {
            shade -= self.seam * falloff(m.at[0] * 0.8) - 0.3 * self.seam * falloff((m.at[0] - 2.6) * 0.6);
        }
        if self.wire > 0.0 {
            shade += self.wire * falloff((m.below_top - 2.8) * 0.9) * falloff(m.p * 1.4);
        }
        // Stitches: a groove, in dashes.
        let dash = 0.7 + 0.3 * fraction((m.at[0] + m.at[1]) * 0.4);
        shade -= self.hem * dash * falloff((m.inside - self.hem_at) * 1.1);
        shade - 0.10 * falloff(m.inside * 0.8)
    }
}

impl Wrinkle {
    /// A crease anywhere on a mask, mostly across it, of this depth on average.
    pub fn sample(depth: f32, rng: &mut ChaCha8Rng) -> Self {
        let angle = rng.random_range(-0.9..0.9f32);
        Self {
            middle: [rng.random_range(-28.0..28.0), rng.random_range(22.0..66.0)],
            direction: [angle.cos(), angle.sin()],
            length: rng.random_range(8.0..22.0),
            width: rng.random_range(1.6..4.0),
            depth: depth * rng.random_range(0.4..1.6f32),
        }
    }

    #[inline(always)]
    fn relief(&self, at: [f32; 2]) -> f32 {
        let (dx, dy) = (at[0] - self.middle[0], at[1] - self.middle[1]);
        let along = (self.direction[0] * dx + self.direction[1] * dy) / self.length;
        let across = (self.direction[0] * dy - self.direction[1] * dx) / self.width;
        // Light on one flank, shadow on the other.
        -2.0 * self.depth * across * falloff(across) * falloff(along)
    }
}

impl Valve {
    fn paint(&self, at: [f32; 2], colour: &mut [f32; 3]) {
        let (dx, dy) = (at[0] - self.at[0], at[1] - self.at[1]);
        let r = (dx * dx + dy * dy).sqrt();
        let cover = (self.radius + 0.5 - r).clamp(0.0, 1.0);
        if r > self.radius + 3.0 {
            return;
        }
        let slats = 0.12 * (fraction(dy * 0.45) - 0.5);
        let rim = 0.22 * falloff((r - self.radius + 0.8) * 0.9);
        let level = 235.0 * self.level * (0.92 + slats - rim - 0.02 * dy / self.radius);
        let shadow = 1.0 - 0.3 * falloff((r - self.radius - 0.5) * 0.7) * (1.0 - cover);
        for value in colour {
            *value = *value * shadow + cover * (level - *value * shadow);
        }
    }
}

impl Pattern {
    /// A print of random kind and size.
    pub fn sample(rng: &mut ChaCha8Rng) -> Self {
        let cell = rng.random_range(5.0..10.0f32);
        match rng.random_range(0..6) {
            0 => Self::Dots { cell, radius: cell * rng.random_range(0.2..0.34f32) },
            1 => {
                let angle = rng.random_range(0.0..std::f32::consts::PI);
                Self::Stripes { cell, direction: [angle.cos(), angle.sin()] }
            }
            2 => Self::Checks { cell },
            3 => Self::Flowers { cell: cell * 1.3 },
            4 => Self::Blotches { cell: cell * 0.9 },
            _ => Self::Zigzag { cell },
        }
    }

    /// How much of the second colour there is at a point, `[0, 1]`; edges are a unit wide, so that prints do not alias.
    #[inline(always)]
    fn coverage(&self, x: f32, y: f32, noise: &Noise) -> f32 {
        match *self {
            Self::Plain => 0.0,
            Self::Dots { cell, radius } => {
                let [dx, dy] = in_cell(x, y, cell);
                (radius + 0.5 - (dx * dx + dy * dy).sqrt()).clamp(0.0, 1.0)
            }
            Self::Stripes { cell, direction } => stripe(direction[0] * x + direction[1] * y, cell),
            Self::Checks { cell } => 0.5 * (stripe(x, cell) + stripe(y, cell)),
            Self::Flowers { cell } => {
                let [dx, dy] = in_cell(x, y, cell);
                // Five petals: directions 72 degrees apart.
                const PETALS: [[f32; 2]; 5] =
                    [[0.0, -1.0], [0.951, -0.309], [0.588, 0.809], [-0.588, 0.809], [-0.951, -0.309]];
                let (ring, size) = (0.22 * cell, 0.16 * cell);
                let nearest = PETALS
                    .iter()
                    .map(|p| (dx - ring * p[0]).powi(2) + (dy - ring * p[1]).powi(2))
                    .fold(f32::INFINITY, f32::min);
                (size + 0.5 - nearest.sqrt()).clamp(0.0, 1.0)
            }
            Self::Blotches { cell } => (0.5 + 4.0 * noise.smooth(x / cell, y / cell)).clamp(0.0, 1.0),
            Self::Zigzag { cell } => {
                let fold = (fraction(x / cell) - 0.5).abs() * cell;
                stripe(y + fold, cell)
            }
        }
    }
}

/// The offset from the middle of the nearest cell; every second row is moved by half a cell.
fn in_cell(x: f32, y: f32, cell: f32) -> [f32; 2] {
    let shift = if fraction(0.5 * y / cell) < 0.5 { 0.0 } else { 0.5 };
    [(fraction(x / cell + shift) - 0.5) * cell, (fraction(y / cell) - 0.5) * cell]
}

/// Stripes of half a period each, with edges a unit wide.
fn stripe(x: f32, period: f32) -> f32 {
    let from_middle = (fraction(x / period) - 0.5).abs() * period;
    (0.5 + period * 0.25 - from_middle).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn prints_show_both_colours_and_stay_in_range() {
        let (noise, mut rng) = (Noise::new(), ChaCha8Rng::seed_from_u64(2));
        for _ in 0..60 {
            let pattern = Pattern::sample(&mut rng);
            let grid = (-40..40).flat_map(|x| (-40..40).map(move |y| (x as f32, y as f32)));
            let values: Vec<f32> = grid.map(|(x, y)| pattern.coverage(x, y, &noise)).collect();
            assert!(values.iter().all(|v| (0.0..=1.0).contains(v)), "{pattern:?}");
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            assert!((0.08..0.92).contains(&mean), "{pattern:?}: {mean}");
        }
    }
}
