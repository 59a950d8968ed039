//! Nuisance parameters, which differ between images of one person: pose, expression, light, surroundings, sensor.

use super::draw::{Draw, Purpose};
use super::shape::{Rgb, lerp};

/// Nuisance parameters of one image.
pub(super) struct Nuisance {
    pub(super) pose: Pose,
    pub(super) expression: Expression,
    pub(super) light: Light,
    pub(super) scene: Scene,
    pub(super) sensor: Sensor,
}

/// Head pose, and the alignment error of the crop.
pub(super) struct Pose {
    /// Sine of the turn to the side; positive turns the face to the image's right.
    pub(super) sin_yaw: f32,
    /// Sine of the nod; positive looks down.
    pub(super) sin_pitch: f32,
    /// Alignment error: tangent of the roll, relative scale, shift in px.
    pub(super) roll: f32,
    pub(super) scale: f32,
    pub(super) shift: [f32; 2],
}

/// Facial expression.
pub(super) struct Expression {
    /// -0.5 (sad) to 1 (broad smile).
    pub(super) smile: f32,
    /// 0 (closed) to 1.
    pub(super) mouth_open: f32,
    /// Factor on how open the eyes are.
    pub(super) eye_open: f32,
    /// How far the brows are raised, px.
    pub(super) brow_raise: f32,
    /// Offset of the irises, px.
    pub(super) gaze: [f32; 2],
}

/// Light on the face.
pub(super) struct Light {
    /// Unit vector to the key light: right, down, towards the camera.
    pub(super) to_key: [f32; 3],
    pub(super) key: Rgb,
    pub(super) ambient: Rgb,
    /// How much brighter ambient light is from above than from below.
    pub(super) sky: f32,
}

/// Surroundings of the face, and what the person wears in this image.
pub(super) struct Scene {
    pub(super) background: [Rgb; 2],
    /// Direction of the background's gradient.
    pub(super) gradient: [f32; 2],
    pub(super) texture: f32,
    pub(super) texture_scale: f32,
    pub(super) clothes: Rgb,
    pub(super) has_glasses: bool,
    pub(super) glasses: Glasses,
    /// Change of the hairline and the side hair, px.
    pub(super) hair_shift: f32,
    /// Factor on the hair's volume.
    pub(super) hair_volume: f32,
    /// Factor on the colour of the hair.
    pub(super) hair_light: f32,
    /// Whether long hair is tied back in this image.
    pub(super) ties_hair: bool,
    /// Strength of lipstick, `[0, 1]`; ignored on faces with any stubble.
    pub(super) lipstick: f32,
    /// Factor on the beard's density.
    pub(super) shave: f32,
    /// Tan or flush in this image: factors on the skin's tone.
    pub(super) tan: Rgb,
    pub(super) salt: u32,
}

/// A pair of glasses.
pub(super) struct Glasses {
    pub(super) half_w: f32,
    pub(super) half_h: f32,
    pub(super) round: f32,
    pub(super) rim: f32,
    pub(super) color: Rgb,
    pub(super) glare: f32,
}

/// Effects of the camera on the picture.
pub(super) struct Sensor {
    pub(super) exposure: f32,
    pub(super) contrast: f32,
    pub(super) saturation: f32,
    pub(super) balance: Rgb,
    /// Standard deviation of the blur, px.
    pub(super) blur: f32,
    /// Standard deviation of the noise, display levels of 0..255.
    pub(super) noise: f32,
    /// Factor by which the resolution is reduced, 1 for none.
    pub(super) shrink: f32,
    /// Quantiser step of the block transform, 0 for none.
    pub(super) quantiser: f32,
}

impl Nuisance {
    /// Returns the nuisance parameters of one image; `strength` 0 makes an even, frontal, neutral picture, 1 the full
    /// range.
    pub(super) fn new(seed: u64, identity: u64, image: u64, strength: f32) -> Self {
        let d = &mut Draw::new(seed, identity, image, Purpose::Nuisance);
        Self {
            pose: Pose {
                sin_yaw: strength * d.bell(0.0, 0.165),
                sin_pitch: strength * d.bell(0.0, 0.11),
                roll: strength * d.bell(0.0, 0.022),
                scale: 1.0 + strength * d.bell(0.0, 0.022),
                shift: [strength * d.bell(0.0, 0.8), strength * d.bell(0.0, 0.8)],
            },
            expression: expression(d, strength),
            light: light(d, strength),
            scene: scene(d, strength),
            sensor: sensor(d, strength),
        }
    }
}

fn expression(d: &mut Draw, strength: f32) -> Expression {
    let smile = match d.pick(&[0.4, 0.45, 0.15]) {
        0 => d.bell(0.0, 0.1),
        1 => d.range(0.2, 1.0),
        _ => d.range(-0.5, -0.1),
    };
    let open = if d.chance(0.35) { d.range(0.2, 1.0) } else { 0.0 };
    let squint = if d.chance(0.05) { 0.2 } else { d.bell(0.97, 0.1) - 0.18 * smile.max(0.0) };
    Expression {
        smile: strength * smile,
        mouth_open: strength * open,
        eye_open: lerp(1.0, squint, strength.min(1.2)),
        brow_raise: strength * d.bell(0.0, 0.9),
        gaze: [strength * d.bell(0.0, 0.8), strength * d.bell(0.0, 0.35)],
    }
}

fn light(d: &mut Draw, strength: f32) -> Light {
    let (x, y) = (strength * d.bell(0.0, 0.72), -0.45 + strength * d.bell(0.0, 0.36));
    let norm = 1.0 / (x * x + y * y + 1.0).sqrt();
    let key = 0.95 * (1.0 + strength * d.bell(0.0, 0.2));
    let ambient = 0.42 * (1.0 + strength * d.bell(0.0, 0.28));
    let (warm, fill) = (strength * d.bell(0.0, 0.085), strength * d.bell(0.0, 0.07));
    Light {
        to_key: [x * norm, y * norm, norm],
        key: [key * (1.0 + warm), key, key * (1.0 - warm)],
        ambient: [ambient * (1.0 + fill), ambient, ambient * (1.0 - fill)],
        sky: 0.2 + strength * d.bell(0.0, 0.08),
    }
}

fn scene(d: &mut Draw, strength: f32) -> Scene {
    let base = d.unit();
    let mut backdrop = |spread: f32| {
        let level = (base + spread * d.range(-0.4, 0.4)).clamp(0.02, 1.0);
        [0, 1, 2].map(|_| {
            let c = (0.25 + 0.65 * level) * (1.0 + d.bell(0.0, 0.16));
            lerp(0.45, c * c, strength.min(1.0))
        })
    };
    let background = [backdrop(0.3), backdrop(1.0)];
    let tan = 1.0 + strength * d.bell(0.0, 0.07);
    let flush = strength * d.bell(0.0, 0.03);
    Scene {
        background,
        gradient: [d.range(-1.0, 1.0), d.range(-1.0, 1.0)],
        texture: strength * d.unit() * d.unit(),
        texture_scale: d.range(0.03, 0.14),
        clothes: [d.range(0.03, 0.75), d.range(0.03, 0.75), d.range(0.03, 0.75)],
        has_glasses: d.chance(0.17 * strength.min(1.0)),
        glasses: Glasses {
            half_w: d.range(10.5, 13.0),
            half_h: d.range(6.5, 9.5),
            round: d.range(2.5, 6.4),
            rim: d.range(0.9, 2.1),
            color: [d.range(0.005, 0.12), d.range(0.005, 0.06), d.range(0.005, 0.05)],
            glare: d.unit() * d.unit(),
        },
        hair_shift: strength * d.bell(0.0, 2.0),
        hair_volume: 1.0 + strength * d.bell(0.0, 0.25),
        hair_light: 1.0 + strength * d.bell(0.0, 0.17),
        ties_hair: d.chance(0.22 * strength.min(1.0)),
        lipstick: if d.chance(0.25) { strength.min(1.0) * d.unit() } else { 0.0 },
        shave: 1.0 + strength * d.bell(0.0, 0.25),
        tan: [tan * (1.0 + flush), tan, tan * (1.0 - 0.5 * flush)],
        salt: d.bits(),
    }
}

fn sensor(d: &mut Draw, strength: f32) -> Sensor {
    let level = d.bell(0.0, 1.0);
    let (warm, green) = (d.bell(0.0, 0.065), d.bell(0.0, 0.022));
    Sensor {
        exposure: (1.0 + strength * 0.2 * level).max(0.3),
        contrast: 1.0 + strength * d.bell(0.0, 0.12),
        saturation: 1.0 + strength * d.bell(0.0, 0.13),
        balance: [1.0 + strength * warm, 1.0 + strength * green, 1.0 - strength * warm],
        blur: 0.45 + strength * d.unit() * d.unit() * 1.3,
        noise: strength * d.range(0.8, 6.0),
        shrink: if d.chance(0.27) { 1.0 + strength * d.range(0.3, 2.0) } else { 1.0 },
        quantiser: if d.chance(0.35) { strength * d.range(6.0, 34.0) } else { 0.0 },
    }
}
