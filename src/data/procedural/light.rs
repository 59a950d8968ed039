//! Lighting: turns reflectance and relief into radiance, and adds the background.

use super::canvas::{Canvas, Pixel, SIDE};
use super::draw::noise;
use super::nuisance::{Light, Scene};
use super::shape::{Rgb, lerp, mix, ramp, scaled};

/// How far light wraps around a skin surface, per channel: blood lets red through the terminator.
const WRAP: Rgb = [0.42, 0.28, 0.22];
/// Distances towards the light, px, at which the relief is probed for a cast shadow, and the weight of an obstacle
/// there: distant edges cast softer shadows.
const SHADOW_STEPS: [(f32, f32); 4] = [(2.0, 0.67), (4.5, 0.47), (8.0, 0.33), (13.0, 0.24)];

/// Returns the linear radiance of every pixel, row by row.
pub(super) fn shade(canvas: &Canvas, light: &Light, scene: &Scene) -> Vec<Rgb> {
    let height = soften(&canvas.pixels);
    let mut out = Vec::with_capacity(SIDE * SIDE);
    for (i, p) in canvas.pixels.iter().enumerate() {
        let (x, y) = (i % SIDE, i / SIDE);
        let behind = if p.figure < 1.0 { background(scene, x as f32, y as f32) } else { [0.0; 3] };
        if p.figure == 0.0 {
            out.push(behind);
            continue;
        }
        let at = |x: usize, y: usize| height[y.min(SIDE - 1) * SIDE + x.min(SIDE - 1)];
        let dx = 0.5 * (at(x + 1, y) - at(x.saturating_sub(1), y));
        let dy = 0.5 * (at(x, y + 1) - at(x, y.saturating_sub(1)));
        let norm = 1.0 / (dx * dx + dy * dy + 1.0).sqrt();
        let n = [-dx * norm, -dy * norm, norm];
        let l = light.to_key;
        let lit = n[0] * l[0] + n[1] * l[1] + n[2] * l[2];
        let shadow = cast_shadow(&height, x, y, l);
        let sky = p.open * (1.0 - light.sky * n[1]);
        // The half vector between the light and the viewer, who is straight ahead.
        let h = 1.0 / (2.0 + 2.0 * l[2]).sqrt();
        let facing = ((n[0] * l[0] + n[1] * l[1] + n[2] * (l[2] + 1.0)) * h).max(0.0);
        let (f2, f4) = (facing * facing, facing * facing * facing * facing);
        let f8 = f4 * f4;
        let shine = 0.14 * p.gloss * shadow * f8 * f8 * lerp(1.0, f2, 0.5);
        let mut c = [0.0; 3];
        for (k, c) in c.iter_mut().enumerate() {
            let wrap = lerp(0.1, WRAP[k], p.skin);
            let diffuse = ((lit + wrap) / (1.0 + wrap)).max(0.0) * shadow * lerp(1.0, p.open, 0.7);
            *c = p.albedo[k] * (light.ambient[k] * sky + light.key[k] * diffuse) + light.key[k] * shine;
        }
        out.push(mix(behind, c, p.figure));
    }
    out
}

/// Returns heights averaged over each pixel and its four neighbours, so that slopes are smooth.
fn soften(pixels: &[Pixel]) -> Vec<f32> {
    let raw: Vec<f32> = pixels.iter().map(|p| p.height).collect();
    let mut soft = raw.clone();
    for y in 0..SIDE {
        let row = |y: usize| &raw[y * SIDE..][..SIDE];
        let (above, here, below) = (row(y.saturating_sub(1)), row(y), row((y + 1).min(SIDE - 1)));
        for (x, out) in soft[y * SIDE..][..SIDE].iter_mut().enumerate() {
            let cross = here[x.saturating_sub(1)] + here[(x + 1).min(SIDE - 1)] + above[x] + below[x];
            *out = 0.4 * here[x] + 0.15 * cross;
        }
    }
    soft
}

/// Returns the share of the key light that reaches a pixel past the relief in its way, `[0, 1]`.
fn cast_shadow(height: &[f32], x: usize, y: usize, to_light: [f32; 3]) -> f32 {
    let flat = (to_light[0] * to_light[0] + to_light[1] * to_light[1]).sqrt();
    if flat < 1e-3 {
        return 1.0;
    }
    let (sx, sy, rise) = (to_light[0] / flat, to_light[1] / flat, to_light[2] / flat);
    let here = height[y * SIDE + x];
    let mut blocked: f32 = 0.0;
    for (step, weight) in SHADOW_STEPS {
        let (px, py) = (x as f32 + sx * step, y as f32 + sy * step);
        if px < 0.0 || py < 0.0 || px > (SIDE - 1) as f32 || py > (SIDE - 1) as f32 {
            break;
        }
        let over = height[(py + 0.5) as usize * SIDE + (px + 0.5) as usize] - here - rise * step;
        blocked = blocked.max(over * weight);
    }
    1.0 - 0.6 * ramp(0.0, 1.6, blocked)
}

/// The background at pixel `(x, y)`: a gradient with soft blotches.
fn background(scene: &Scene, x: f32, y: f32) -> Rgb {
    let (x, y) = (x - 56.0, y - 56.0);
    let t = 0.5 + (scene.gradient[0] * x + scene.gradient[1] * y) / 112.0;
    let s = scene.texture_scale;
    let blotch = noise(s * x, s * y, scene.salt) + 0.4 * noise(3.0 * s * x, 3.0 * s * y, scene.salt ^ 1);
    let c = mix(scene.background[0], scene.background[1], t.clamp(0.0, 1.0));
    scaled(c, (1.0 + 0.8 * scene.texture * blotch).max(0.05))
}
