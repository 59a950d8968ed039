//! Appearance of a mask at a point: colour, print, folds, seams and weave.
//!
//! Lengths are in fortieths of the distance from eyes to mouth: about a pixel of a 112x112 crop.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::block::{Block, LANES, Lanes};
use super::frame::falloff;
use super::light::luminance;
use super::noise::{Noise, fraction};

/// A fold across the mask.
#[derive(Clone, Debug)]
pub(super) struct Pleat {
    /// Position between the upper (0) and the lower (1) edge.
    pub at: f32,
    /// How much lower the fold is in the middle than at the ends, in the same unit.
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
    /// Centre: across from the middle of the face, and down from the eyes.
    pub at: [f32; 2],
    /// Radius.
    pub radius: f32,
    /// Brightness, 0 black to 1 white.
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
    /// Relative strength of the weave and of larger unevenness.
    pub weave: f32,
    pub mottle: f32,
    pub valve: Option<Valve>,
    /// Relative darkening under the chin.
    pub underside: f32,
    /// Offset of this mask in the noise tile.
    pub noise_at: [f32; 2],
}

impl Fabric {
    /// Returns the colours of a block in even light, `[0, 255]`, with the shadows of folds but without the photo's
    /// light.
    #[inline(always)]
    pub fn colour(&self, m: &Block, noise: &Noise) -> [Lanes; 3] {
        let print = self.pattern.coverage(&m.across, &m.down, noise);
        let mut shade = self.relief(m);
        let [nx, ny] = self.noise_at;
        for i in 0..LANES {
            let (x, y) = (m.across[i], m.down[i]);
            shade[i] += self.mottle * 2.0 * noise.smooth(nx + x * 0.11, ny + y * 0.11);
            shade[i] += self.weave * noise.smooth(nx + x * 1.3, ny + y * 1.3);
        }
        let mut colour = [[0.0; LANES]; 3];
        for (channel, plane) in colour.iter_mut().enumerate() {
            let (base, second) = (self.base[channel], self.second[channel]);
            for i in 0..LANES {
                plane[i] = base + print[i] * (second - base);
            }
        }
        if let Some(valve) = &self.valve {
            for i in 0..LANES {
                let painted = valve.paint([m.across[i], m.down[i]], [colour[0][i], colour[1][i], colour[2][i]]);
                (colour[0][i], colour[1][i], colour[2][i]) = (painted[0], painted[1], painted[2]);
            }
        }
        for i in 0..LANES {
            // Folds in dark cloth show by their sheen, so the relative shade gets a small absolute part there.
            let sheen = 14.0 * (1.0 - luminance([colour[0][i], colour[1][i], colour[2][i]]) / 255.0);
            for plane in &mut colour {
                plane[i] = plane[i] * shade[i] + sheen * (shade[i] - 1.0) * 2.0;
            }
        }
        colour
    }

    /// Returns the brightness relative to flat fabric seen from the front.
    #[inline(always)]
    fn relief(&self, m: &Block) -> Lanes {
        let mut shade = [0.0; LANES];
        for i in 0..LANES {
            shade[i] = 0.70 + 0.30 * m.cosine[i];
            shade[i] += 0.05 * falloff((m.height[i] - 0.45) * 3.0) * falloff(m.angle[i] * 2.2);
            let under = ((m.height[i] - 0.95) / 0.75).clamp(0.0, 1.0);
            shade[i] -= self.underside * under * (0.4 + 0.6 * under);
        }
        for pleat in &self.pleats {
            for i in 0..LANES {
                let at = (pleat.at + pleat.sag * (1.0 - m.p[i] * m.p[i])) * m.tall[i];
                let d = m.below_top[i] - at;
                shade[i] += pleat.depth * (0.35 * falloff((d + 1.6) * 0.7) - falloff((d - 0.5) * 0.75));
            }
        }
        for wrinkle in &self.wrinkles {
            for i in 0..LANES {
                shade[i] += wrinkle.relief([m.across[i], m.down[i]]);
            }
        }
        if self.seam > 0.0 {
            for i in 0..LANES {
                let x = m.across[i];
                shade[i] -= self.seam * falloff(x * 0.8) - 0.3 * self.seam * falloff((x - 2.6) * 0.6);
            }
        }
        if self.wire > 0.0 {
            for i in 0..LANES {
                shade[i] += self.wire * falloff((m.below_top[i] - 2.8) * 0.9) * falloff(m.p[i] * 1.4);
            }
        }
        for i in 0..LANES {
            // Stitches: a dashed groove.
            let dash = 0.7 + 0.3 * fraction((m.across[i] + m.down[i]) * 0.4);
            shade[i] -= self.hem * dash * falloff((m.inside[i] - self.hem_at) * 1.1);
            shade[i] -= 0.10 * falloff(m.inside[i] * 0.8);
        }
        shade
    }
}

impl Wrinkle {
    /// Returns a random crease, mostly across the mask, of this mean depth.
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
    /// Returns the colour at a point where the fabric alone has the colour `fabric`.
    #[inline(always)]
    fn paint(&self, at: [f32; 2], fabric: [f32; 3]) -> [f32; 3] {
        let (dx, dy) = (at[0] - self.at[0], at[1] - self.at[1]);
        let r = (dx * dx + dy * dy).sqrt();
        let cover = (self.radius + 0.5 - r).clamp(0.0, 1.0);
        let slats = 0.12 * (fraction(dy * 0.45) - 0.5);
        let rim = 0.22 * falloff((r - self.radius + 0.8) * 0.9);
        let level = 235.0 * self.level * (0.92 + slats - rim - 0.02 * dy / self.radius);
        let shadow = 1.0 - 0.3 * falloff((r - self.radius - 0.5) * 0.7) * (1.0 - cover);
        let is_beside = r > self.radius + 3.0;
        let mut y = fabric;
        for value in &mut y {
            let painted = *value * shadow + cover * (level - *value * shadow);
            *value = if is_beside { *value } else { painted };
        }
        y
    }
}

impl Pattern {
    /// Returns a print of random kind and size.
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

    /// Returns the share of the second colour at points, `[0, 1]`. Edges are a unit wide, so that prints do not alias.
    #[inline(always)]
    fn coverage(&self, x: &Lanes, y: &Lanes, noise: &Noise) -> Lanes {
        let mut print = [0.0; LANES];
        match *self {
            Self::Plain => {}
            Self::Dots { cell, radius } => {
                for i in 0..LANES {
                    let [dx, dy] = in_cell(x[i], y[i], cell);
                    print[i] = (radius + 0.5 - (dx * dx + dy * dy).sqrt()).clamp(0.0, 1.0);
                }
            }
            Self::Stripes { cell, direction } => {
                for i in 0..LANES {
                    print[i] = stripe(direction[0] * x[i] + direction[1] * y[i], cell);
                }
            }
            Self::Checks { cell } => {
                for i in 0..LANES {
                    print[i] = 0.5 * (stripe(x[i], cell) + stripe(y[i], cell));
                }
            }
            Self::Flowers { cell } => {
                for i in 0..LANES {
                    print[i] = petals(in_cell(x[i], y[i], cell), cell);
                }
            }
            Self::Blotches { cell } => {
                for i in 0..LANES {
                    print[i] = (0.5 + 4.0 * noise.smooth(x[i] / cell, y[i] / cell)).clamp(0.0, 1.0);
                }
            }
            Self::Zigzag { cell } => {
                for i in 0..LANES {
                    let fold = (fraction(x[i] / cell) - 0.5).abs() * cell;
                    print[i] = stripe(y[i] + fold, cell);
                }
            }
        }
        print
    }
}

/// Coverage by a flower in the middle of a cell.
#[inline(always)]
fn petals([dx, dy]: [f32; 2], cell: f32) -> f32 {
    // Five petals: directions 72 degrees apart.
    const PETALS: [[f32; 2]; 5] = [[0.0, -1.0], [0.951, -0.309], [0.588, 0.809], [-0.588, 0.809], [-0.951, -0.309]];
    let (ring, size) = (0.22 * cell, 0.16 * cell);
    let mut nearest = f32::INFINITY;
    for p in PETALS {
        let (ex, ey) = (dx - ring * p[0], dy - ring * p[1]);
        nearest = nearest.min(ex * ex + ey * ey);
    }
    (size + 0.5 - nearest.sqrt()).clamp(0.0, 1.0)
}

/// Offset from the centre of the cell; every second row is shifted by half a cell.
#[inline(always)]
fn in_cell(x: f32, y: f32, cell: f32) -> [f32; 2] {
    let shift = if fraction(0.5 * y / cell) < 0.5 { 0.0 } else { 0.5 };
    [(fraction(x / cell + shift) - 0.5) * cell, (fraction(y / cell) - 0.5) * cell]
}

/// Coverage by stripes half a period wide, with edges a unit wide.
#[inline(always)]
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
            let along: Lanes = std::array::from_fn(|i| i as f32 - 16.0);
            let rows = (-40..40).map(|y| pattern.coverage(&along, &[y as f32; LANES], &noise));
            let values: Vec<f32> = rows.flatten().collect();
            assert!(values.iter().all(|v| (0.0..=1.0).contains(v)), "{pattern:?}");
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            assert!((0.08..0.92).contains(&mean), "{pattern:?}: {mean}");
        }
    }
}
