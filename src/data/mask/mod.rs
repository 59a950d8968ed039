//! Synthetic face masks.
//!
//! There are two protocols. `corrected` draws masks by code: it samples an outline and a fabric ([`MaskKind`],
//! [`MaskColour`]), lays them around a head whose turn is estimated from the five landmarks, lights them like the photo
//! and blends them in. `reference` reproduces the published code ([`mod@reference`]) with a template that the user
//! provides.

// Loops over pixels use indices: closures of iterators are not always inlined, and code that is not inlined is compiled
// without vector instructions.
#![allow(clippy::needless_range_loop)]

mod block;
mod border;
mod colour_list;
mod fabric;
mod frame;
mod homography;
mod kinds;
mod layer;
mod light;
mod noise;
mod outline;
mod palette;
pub mod reference;
mod render;
mod warp;

use std::cell::RefCell;
use std::path::PathBuf;

use image::RgbImage;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use self::colour_list::read_colours;
use self::frame::FaceFrame;
use self::kinds::Design;
pub use self::kinds::MaskKind;
use self::layer::Layer;
use self::noise::Noise;
pub use self::palette::MaskColour;
use self::reference::{ReferenceDraw, ReferenceMasker, TEMPLATE_LANDMARKS};
use super::Landmarks;
use crate::error::{Error, Result};

/// Protocol by which masks are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskProtocol {
    /// Masks drawn by code, of several kinds and colours.
    #[default]
    Corrected,
    /// The published code's masks, from one template.
    Reference,
}

/// Random shift of the reference template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TemplateShift {
    /// Shift by `[-10, 9] x [-40, 39]` template pixels, as in the published training.
    #[default]
    Training,
    /// No shift, as in the published evaluation.
    None,
}

/// How often each of the kinds and colours is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskMix {
    /// As often as people wear it: most masks are medical or plain fabric, and white, black or light blue.
    #[default]
    Worn,
    /// All equally often.
    Equal,
}

/// Mask settings; the default is the corrected protocol with every kind and colour. With a single kind and colour,
/// every mask has that kind and colour.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MaskConfig {
    /// Protocol by which masks are made.
    pub protocol: MaskProtocol,
    /// Kinds to draw from; `corrected` only.
    pub kinds: Vec<MaskKind>,
    /// Colours to draw from, also for the second colour of prints; `corrected` only.
    pub colours: Vec<MaskColour>,
    /// How often each of them is drawn; `corrected` only.
    pub mix: MaskMix,
    /// RGBA image of a mask; required by `reference`, not allowed with `corrected`.
    pub template: Option<PathBuf>,
    /// The five landmarks on the template, in its pixels, in the order of [`Landmarks`].
    pub template_points: Landmarks,
    /// Random shift of the template; `reference` only.
    pub template_shift: TemplateShift,
}

impl Default for MaskConfig {
    fn default() -> Self {
        Self {
            protocol: MaskProtocol::Corrected,
            kinds: MaskKind::ALL.to_vec(),
            colours: MaskColour::ALL.to_vec(),
            mix: MaskMix::default(),
            template: None,
            template_points: TEMPLATE_LANDMARKS,
            template_shift: TemplateShift::Training,
        }
    }
}

impl MaskConfig {
    /// Checks that the settings fit together.
    ///
    /// # Errors
    /// When no kind or colour is left to draw from, when the protocol lacks its template or has one it does not use, or
    /// when a template point is not finite.
    pub fn validate(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::Config(format!("mask: {what}")));
        if self.template_points.iter().flatten().any(|v| !v.is_finite()) {
            return wrong("template_points must be finite");
        }
        match (self.protocol, &self.template) {
            (MaskProtocol::Corrected, Some(_)) => wrong("protocol corrected draws its masks: expected no template"),
            (MaskProtocol::Reference, None) => wrong("protocol reference needs a template: an RGBA image, by its path"),
            (MaskProtocol::Corrected, None) if self.kinds.is_empty() => wrong("kinds: expected at least one"),
            (MaskProtocol::Corrected, None) if self.colours.is_empty() => wrong("colours: expected at least one"),
            _ => Ok(()),
        }
    }
}

thread_local! {
    /// Layer that masks are drawn on, reused because training draws one for every other image.
    static LAYER: RefCell<Layer> = RefCell::default();
}

/// Puts masks on faces.
#[derive(Clone, Debug)]
pub struct Masker {
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Drawn { kinds: Weighted<MaskKind>, colours: Weighted<MaskColour>, noise: Noise },
    Template { masker: ReferenceMasker, shift: TemplateShift },
}

impl Masker {
    /// Returns a masker with these settings; `reference` reads its template here.
    ///
    /// # Errors
    /// When the settings do not fit together or the template cannot be used.
    pub fn new(config: &MaskConfig) -> Result<Self> {
        config.validate()?;
        let source = match &config.template {
            Some(path) => Source::Template {
                masker: ReferenceMasker::open(path, &config.template_points)?,
                shift: config.template_shift,
            },
            None => Source::Drawn {
                kinds: Weighted::new(&config.kinds, config.mix, MaskKind::share),
                colours: Weighted::new(&config.colours, config.mix, MaskColour::share),
                noise: Noise::new(),
            },
        };
        Ok(Self { source })
    }

    /// Puts a random mask on the face with these five landmarks, in pixels of `image`, which may be of any size.
    ///
    /// The same image, landmarks and state of `rng` give the same result. Landmarks outside the image are allowed: the
    /// mask is cut off at the image's edge.
    ///
    /// # Errors
    /// When the landmarks are not finite or show no face (all on one line, eyes below the mouth, left and right
    /// swapped); the image is then unchanged.
    pub fn apply(&self, image: &mut RgbImage, landmarks: &Landmarks, rng: &mut ChaCha8Rng) -> Result<()> {
        match &self.source {
            Source::Drawn { kinds, colours, noise } => {
                let kind = kinds.draw(rng);
                LAYER.with_borrow_mut(|layer| {
                    draw(image, landmarks, kind, colours, noise, rng, layer)?;
                    layer.blend(image);
                    Ok(())
                })
            }
            Source::Template { masker, shift } => {
                let draw = match shift {
                    TemplateShift::Training => ReferenceDraw::training(rng),
                    TemplateShift::None => ReferenceDraw::evaluation(rng),
                };
                masker.apply(image, landmarks, draw)
            }
        }
    }

    /// Puts the template of the `reference` protocol on a face, with the shift and colour of `draw`.
    ///
    /// # Errors
    /// When the protocol is not `reference`, and the errors of [`Self::apply`].
    pub fn apply_template(&self, image: &mut RgbImage, landmarks: &Landmarks, draw: ReferenceDraw) -> Result<()> {
        match &self.source {
            Source::Template { masker, .. } => masker.apply(image, landmarks, draw),
            Source::Drawn { .. } => {
                Err(Error::Config("mask: colours from a list need protocol reference and its template".into()))
            }
        }
    }
}

fn draw(
    image: &RgbImage,
    landmarks: &Landmarks,
    kind: MaskKind,
    colours: &Weighted<MaskColour>,
    noise: &Noise,
    rng: &mut ChaCha8Rng,
    layer: &mut Layer,
) -> Result<()> {
    let frame = FaceFrame::new(landmarks, kind.taper())?;
    let base = colours.draw(rng).sample(rng);
    let mut second = colours.draw(rng).sample(rng);
    // A print needs two colours that can be told apart.
    if base.iter().zip(second).all(|(a, b)| (a - b).abs() < 40.0) {
        let is_light = base.iter().sum::<f32>() > 380.0;
        second = base.map(|v| if is_light { v * 0.6 } else { 120.0 + v * 0.5 });
    }
    let design = Design::new(kind, [base, second], &frame, rng);
    render::draw(image, &frame, &design, noise, rng, layer);
    Ok(())
}

/// Values to draw from, each with its weight.
#[derive(Clone, Debug)]
struct Weighted<T> {
    values: Vec<(T, f32)>,
    total: f32,
}

impl<T: Copy> Weighted<T> {
    fn new(values: &[T], mix: MaskMix, share: impl Fn(T) -> f32) -> Self {
        let weight = |value| if mix == MaskMix::Equal { 1.0 } else { share(value) };
        let values: Vec<(T, f32)> = values.iter().map(|&value| (value, weight(value))).collect();
        let total = values.iter().map(|(_, weight)| weight).sum();
        Self { values, total }
    }

    /// Draws a value; there must be one.
    fn draw(&self, rng: &mut ChaCha8Rng) -> T {
        let mut left = self.total * rng.random::<f32>();
        for &(value, weight) in &self.values[1..] {
            if left < weight {
                return value;
            }
            left -= weight;
        }
        self.values[0].0
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;
    use crate::data::ALIGNED_LANDMARKS;

    /// Landmarks of a plausible face: any size and roll, some turn of the head, some detector error.
    fn face(rng: &mut ChaCha8Rng) -> Landmarks {
        let (turn, scale) = (rng.random_range(-0.5..0.5f32), rng.random_range(0.7..2.5f32));
        let (sine, cosine) = rng.random_range(-0.8..0.8f32).sin_cos();
        let mut points = ALIGNED_LANDMARKS.map(|p| [(p[0] - 56.0) * (1.0 - 0.3 * turn.abs()), p[1] - 72.0]);
        points[2][0] += 14.0 * turn;
        points.map(|p| {
            let p = p.map(|v| scale * (v + rng.random_range(-1.2..1.2f32)));
            [150.0 + cosine * p[0] - sine * p[1], 150.0 + sine * p[0] + cosine * p[1]]
        })
    }

    fn cover(layer: &Layer, p: [f32; 2]) -> f32 {
        layer.cover(p[0].round() as u32, p[1].round() as u32)
    }

    #[test]
    fn masks_cover_nose_and_mouth_and_never_the_eyes() {
        let (noise, mut rng) = (Noise::new(), ChaCha8Rng::seed_from_u64(11));
        let colours = Weighted::new(&MaskColour::ALL, MaskMix::Equal, MaskColour::share);
        // Sharp: a mask is as blurred as its photo.
        let image =
            RgbImage::from_fn(300, 300, |x, y| image::Rgb([190, 150, 130].map(|v| v + 40 * ((x ^ y) & 1) as u8)));
        for i in 0..800 {
            let (kind, landmarks) = (MaskKind::ALL[i % 8], face(&mut rng));
            let mut layer = Layer::default();
            draw(&image, &landmarks, kind, &colours, &noise, &mut rng, &mut layer).unwrap();
            let at = landmarks.map(|p| cover(&layer, p));
            assert!(at[0] == 0.0 && at[1] == 0.0, "{kind:?} over the eyes of {landmarks:?}: {at:?}");
            assert!(at[3] > 0.9 && at[4] > 0.9, "{kind:?} not over the mouth of {landmarks:?}: {at:?}");
            let is_over_nose = kind != MaskKind::LowWorn;
            assert!(if is_over_nose { at[2] > 0.9 } else { at[2] < 0.1 }, "{kind:?}, nose of {landmarks:?}: {at:?}");
        }
    }

    #[test]
    fn pixels_that_mask_and_shadow_do_not_touch_are_unchanged() {
        let (noise, mut rng) = (Noise::new(), ChaCha8Rng::seed_from_u64(12));
        let colours = Weighted::new(&MaskColour::ALL, MaskMix::Equal, MaskColour::share);
        for i in 0..40 {
            let image = RgbImage::from_fn(300, 280, |x, y| image::Rgb([(x * 7 + y) as u8, (x ^ y) as u8, y as u8]));
            let (kind, mut layer) = (MaskKind::ALL[i % 8], Layer::default());
            draw(&image, &face(&mut rng), kind, &colours, &noise, &mut rng, &mut layer).unwrap();
            let mut masked = image.clone();
            layer.blend(&mut masked);
            let mut untouched = 0;
            for (x, y, pixel) in image.enumerate_pixels() {
                if !layer.touches(x, y) {
                    assert_eq!(masked.get_pixel(x, y), pixel, "at {x}, {y}");
                    untouched += 1;
                }
            }
            assert!(untouched > 20_000, "{untouched}");
        }
    }

    #[test]
    fn the_border_of_a_crop_stays_black() {
        let masker = Masker::new(&MaskConfig::default()).unwrap();
        let is_inside = |x: u32, y: u32| (40..80).contains(&x) && y < 95;
        let image =
            RgbImage::from_fn(112, 112, |x, y| image::Rgb(if is_inside(x, y) { [150, 120, 100] } else { [0; 3] }));
        for seed in 0..20 {
            let mut masked = image.clone();
            masker.apply(&mut masked, &ALIGNED_LANDMARKS, &mut ChaCha8Rng::seed_from_u64(seed)).unwrap();
            let changed: Vec<_> = masked.enumerate_pixels().filter(|(x, y, p)| *p != image.get_pixel(*x, *y)).collect();
            assert!(changed.len() > 500 && changed.iter().all(|(x, y, _)| is_inside(*x, *y)), "seed {seed}");
        }
    }

    #[test]
    fn kinds_and_colours_come_as_often_as_they_are_worn_or_equally_often() {
        for mix in [MaskMix::Worn, MaskMix::Equal] {
            let colours = Weighted::new(&MaskColour::ALL, mix, MaskColour::share);
            let (mut rng, num) = (ChaCha8Rng::seed_from_u64(13), 20_000);
            let mut counts = [0; MaskColour::ALL.len()];
            for _ in 0..num {
                counts[colours.draw(&mut rng) as usize] += 1;
            }
            let total: f32 = MaskColour::ALL.iter().map(|c| c.share()).sum();
            for (count, colour) in counts.into_iter().zip(MaskColour::ALL) {
                let expected = if mix == MaskMix::Equal { 1.0 / counts.len() as f32 } else { colour.share() / total };
                assert!((count as f32 / num as f32 - expected).abs() < 0.015, "{mix:?}, {colour:?}: {count}");
            }
        }
    }
}
