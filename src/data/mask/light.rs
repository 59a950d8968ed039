//! Measures the light and sharpness of a photo, so that a drawn mask matches it.

use image::RgbImage;

use super::frame::FaceFrame;

/// Samples across and down the face.
const GRID: i32 = 16;
/// Colour of skin in even light: red, green and blue over luminance.
const SKIN: [f32; 3] = [1.22, 0.95, 0.80];

/// Luminance of paper over that of pale skin.
const SKIN_TO_WHITE: f32 = 1.45;
/// Luminance of white fabric, as the palette has it, and of the brightest that a photo of it shows.
const WHITE: f32 = 235.0;
const MAX_WHITE: f32 = 245.0;
/// Standard deviation of a blur that leaves faces with details of one grey level, in pixels: measured on sharp faces
/// that were blurred by 0.3 to 4 pixels, on which it is inversely proportional to the details.
const SHARPNESS: f32 = 12.5;
/// Largest such deviation, in distances from eyes to mouth.
const MAX_BLUR: f32 = 0.06;

/// Light, sharpness and noise of a photo.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Light {
    /// Factor on red, green and blue: brightness and colour cast.
    pub gain: [f32; 3],
    /// Relative brightness gained per half face width to the image's right.
    pub slope: f32,
    /// 1 for a colour photo, 0 for a grey one.
    pub saturation: f32,
    /// Variance of a blur that softens a drawing to the photo's sharpness, in square pixels.
    pub blur: f32,
    /// Strength of the photo's noise, in grey levels.
    pub grain: f32,
}

impl Light {
    /// Measures the light on the face in `frame`. Returns average light if less than a quarter of the face is in the
    /// image.
    pub fn measure(image: &RgbImage, frame: &FaceFrame) -> Self {
        let (mut colours, mut details) = (Vec::new(), Vec::new());
        let (mut tilt, mut spread) = (0.0, 0.0);
        for row in 0..GRID {
            for column in 0..GRID {
                let across = (column as f32 + 0.5) / GRID as f32 * 2.0 - 1.0;
                let [x, y] = frame.on_plane(0.55 * across, 0.1 + 0.95 * row as f32 / GRID as f32);
                let Some(colour) = colour_at(image, x, y) else { continue };
                tilt += across * luminance(colour);
                spread += across * across;
                colours.push(colour);
                if let Some(detail) = detail_at(image, x, y) {
                    details.push(detail);
                }
            }
        }
        if colours.len() < (GRID * GRID / 4) as usize || details.len() < 8 {
            return Self { gain: [0.95; 3], slope: 0.0, saturation: 1.0, blur: 0.16, grain: 1.5 };
        }
        let n = colours.len() as f32;
        let mean: [f32; 3] = std::array::from_fn(|i| colours.iter().map(|c| c[i]).sum::<f32>() / n);
        let level = luminance(mean).max(1.0);
        let mut skin: Vec<f32> = colours.iter().map(|&c| luminance(c)).collect();
        let skin = quantile(&mut skin, 0.8);
        let mut scene = scene_luminances(image);
        let scene = quantile(&mut scene, 0.95);
        // Paper is half as bright again as pale skin beside it. Dark skin under bright light and pale skin in the shade
        // look alike; the brightest parts of the photo tell them apart, so both count.
        let white = (SKIN_TO_WHITE * skin * scene.min(MAX_WHITE)).sqrt();
        let brightness = (white / WHITE).clamp(0.2, 1.08);
        let chroma = colours.iter().map(|c| range(*c)).sum::<f32>() / n / level;
        let saturation = ((chroma - 0.04) / 0.14).clamp(0.0, 1.0);
        // A third of the measured cast: the rest is the skin's own colour.
        let cast = |i: usize| 1.0 + saturation * 0.33 * (mean[i] / level / SKIN[i] - 1.0).clamp(-0.4, 0.4);
        Self {
            gain: std::array::from_fn(|i| brightness * cast(i)),
            slope: (tilt / spread / level).clamp(-0.35, 0.35),
            saturation,
            blur: (SHARPNESS / quantile(&mut details, 0.9).max(1.0)).min(MAX_BLUR * frame.unit_px).powi(2),
            grain: (0.4 * quantile(&mut details, 0.2)).clamp(0.4, 5.0),
        }
    }
}

/// Rec. 601 luminance.
#[inline(always)]
pub(super) fn luminance(c: [f32; 3]) -> f32 {
    0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]
}

fn range(c: [f32; 3]) -> f32 {
    c[0].max(c[1]).max(c[2]) - c[0].min(c[1]).min(c[2])
}

fn colour_at(image: &RgbImage, x: f32, y: f32) -> Option<[f32; 3]> {
    if !(x >= 0.0 && y >= 0.0) {
        return None;
    }
    image.get_pixel_checked(x as u32, y as u32).map(|p| p.0.map(f32::from))
}

/// Absolute second difference of the luminance at a pixel, in grey levels.
fn detail_at(image: &RgbImage, x: f32, y: f32) -> Option<f32> {
    let at = |dx: f32, dy: f32| colour_at(image, x + dx, y + dy).map(luminance);
    Some((4.0 * at(0.0, 0.0)? - at(-1.0, 0.0)? - at(1.0, 0.0)? - at(0.0, -1.0)? - at(0.0, 1.0)?).abs())
}

/// Luminances of about 200 pixels spread over the image.
fn scene_luminances(image: &RgbImage) -> Vec<f32> {
    let count = image.pixels().len();
    // An odd step, so that the columns of an image with an even width are all visited.
    let luminances = image.pixels().step_by((count / 200).max(1) | 1).map(|p| luminance(p.0.map(f32::from)));
    // The border of a crop is not part of the scene.
    luminances.filter(|luminance| *luminance > 6.0).collect()
}

/// Returns the value below which a share `q` of the values lies; 0 if there are none.
fn quantile(values: &mut [f32], q: f32) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let rank = (q * (values.len() - 1) as f32) as usize;
    *values.select_nth_unstable_by(rank, f32::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ALIGNED_LANDMARKS;

    fn measure(pixel: impl Fn(u32, u32) -> [u8; 3]) -> Light {
        let image = RgbImage::from_fn(112, 112, |x, y| image::Rgb(pixel(x, y)));
        Light::measure(&image, &FaceFrame::new(&ALIGNED_LANDMARKS, 0.2).unwrap())
    }

    #[test]
    fn brighter_photos_give_brighter_masks_and_grey_ones_grey() {
        let (dark, bright) = (measure(|_, _| [80, 60, 50]), measure(|_, _| [210, 165, 140]));
        assert!(dark.gain[1] < bright.gain[1] && bright.saturation == 1.0);
        assert_eq!(measure(|_, _| [120; 3]).saturation, 0.0);
    }

    #[test]
    fn light_from_the_right_has_a_positive_slope() {
        assert!(measure(|x, _| [60 + x as u8, 50 + x as u8, 40 + x as u8]).slope > 0.1);
        assert!(measure(|x, _| [180 - x as u8, 170 - x as u8, 160 - x as u8]).slope < -0.1);
    }

    #[test]
    fn a_face_outside_the_image_gets_average_light() {
        let far = ALIGNED_LANDMARKS.map(|p| [p[0] + 5000.0, p[1]]);
        let light = Light::measure(&RgbImage::new(112, 112), &FaceFrame::new(&far, 0.2).unwrap());
        assert_eq!(light.gain, [0.95; 3]);
    }
}
