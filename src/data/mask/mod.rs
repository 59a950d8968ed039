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

/// Mask settings; the default is the corrected protocol with every kind and colour. With a single kind and colour,
/// every mask has that kind and colour.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MaskConfig {
    /// Protocol by which masks are made.
    pub protocol: MaskProtocol,
    /// Kinds to draw from with equal probability; `corrected` only.
    pub kinds: Vec<MaskKind>,
    /// Colours to draw from with equal probability, also for the second colour of prints; `corrected` only.
    pub colours: Vec<MaskColour>,
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
    Drawn { kinds: Vec<MaskKind>, colours: Vec<MaskColour>, noise: Noise },
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
            None => Source::Drawn { kinds: config.kinds.clone(), colours: config.colours.clone(), noise: Noise::new() },
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
                let kind = pick(kinds, rng);
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
    colours: &[MaskColour],
    noise: &Noise,
    rng: &mut ChaCha8Rng,
    layer: &mut Layer,
) -> Result<()> {
    let frame = FaceFrame::new(landmarks, kind.taper())?;
    let base = pick(colours, rng).sample(rng);
    let mut second = pick(colours, rng).sample(rng);
    // A print needs two colours that can be told apart.
    if base.iter().zip(second).all(|(a, b)| (a - b).abs() < 40.0) {
        let is_light = base.iter().sum::<f32>() > 380.0;
        second = base.map(|v| if is_light { v * 0.6 } else { 120.0 + v * 0.5 });
    }
    let design = Design::new(kind, [base, second], &frame, rng);
    render::draw(image, &frame, &design, noise, rng, layer);
    Ok(())
}

fn pick<T: Copy>(from: &[T], rng: &mut ChaCha8Rng) -> T {
    from[rng.random_range(0..from.len())]
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
        let image = RgbImage::from_pixel(300, 300, image::Rgb([190, 150, 130]));
        for i in 0..800 {
            let (kind, landmarks) = (MaskKind::ALL[i % 8], face(&mut rng));
            let mut layer = Layer::default();
            draw(&image, &landmarks, kind, &MaskColour::ALL, &noise, &mut rng, &mut layer).unwrap();
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
        for i in 0..40 {
            let image = RgbImage::from_fn(300, 280, |x, y| image::Rgb([(x * 7 + y) as u8, (x ^ y) as u8, y as u8]));
            let (kind, mut layer) = (MaskKind::ALL[i % 8], Layer::default());
            draw(&image, &face(&mut rng), kind, &MaskColour::ALL, &noise, &mut rng, &mut layer).unwrap();
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
}
