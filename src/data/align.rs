//! Aligns a photo with five landmarks to the face template.

use image::RgbImage;

use super::bilinear::bilinear;
use super::{ALIGNED_LANDMARKS, FACE_SIZE, Landmarks};
use crate::error::{Error, Result};

/// Returns the [`FACE_SIZE`] square crop of `image` whose landmarks are as close to [`ALIGNED_LANDMARKS`] as a
/// similarity transform (shift, rotation, scaling) can bring them (least squares; Umeyama, PAMI 1991). Sampling is
/// bilinear, and black outside the photo, as in insightface's `norm_crop`.
///
/// # Errors
/// [`Error::Evaluation`] when all landmarks are in one place or one is not finite.
pub fn align_face(image: &RgbImage, landmarks: &Landmarks) -> Result<RgbImage> {
    Ok(align_face_to(image, landmarks, FACE_SIZE)?.0)
}

/// Like [`align_face`], for a crop of `side` pixels, to which the template is scaled. Returns the landmarks in the crop
/// too.
///
/// # Errors
/// As [`align_face`].
pub fn align_face_to(image: &RgbImage, landmarks: &Landmarks, side: u32) -> Result<(RgbImage, Landmarks)> {
    let scale = f64::from(side) / f64::from(FACE_SIZE);
    let map = Similarity::from_template_to(landmarks, scale)?;
    let crop = RgbImage::from_fn(side, side, |x, y| {
        let [x, y] = map.apply([f64::from(x), f64::from(y)]);
        bilinear(image, x as f32, y as f32)
    });
    let back = map.inverse();
    Ok((crop, landmarks.map(|point| back.apply(point.map(f64::from)).map(|v| v as f32))))
}

/// Similarity transform `p -> a p + b`, with points as complex numbers.
#[derive(Clone, Copy, Debug)]
struct Similarity {
    a: [f64; 2],
    b: [f64; 2],
}

impl Similarity {
    /// Returns the map from the crop to the photo: the inverse of the one that brings the photo's landmarks closest to
    /// the template's, which is `scale` times as large as that of 112 pixels.
    fn from_template_to(landmarks: &Landmarks, scale: f64) -> Result<Self> {
        let photo = landmarks.map(|p| p.map(f64::from));
        let template = ALIGNED_LANDMARKS.map(|p| p.map(|v| scale * f64::from(v)));
        let mean = |points: &[[f64; 2]; 5]| [0, 1].map(|axis| points.iter().map(|p| p[axis]).sum::<f64>() / 5.0);
        let (from, to) = (mean(&photo), mean(&template));
        let (mut product, mut spread) = ([0.0; 2], 0.0);
        for (p, t) in photo.iter().zip(&template) {
            let (p, t) = ([p[0] - from[0], p[1] - from[1]], [t[0] - to[0], t[1] - to[1]]);
            // conj(p) * t
            product[0] += p[0] * t[0] + p[1] * t[1];
            product[1] += p[0] * t[1] - p[1] * t[0];
            spread += p[0] * p[0] + p[1] * p[1];
        }
        let size = product[0].hypot(product[1]) / spread;
        if !(size.is_finite() && size > 1e-9) {
            return Err(Error::Evaluation(format!(
                "expected five landmarks that are finite and not all in one place, found {landmarks:?}"
            )));
        }
        // The inverse of multiplying by product / spread.
        let square = size * size;
        let a = [product[0] / spread / square, -product[1] / spread / square];
        Ok(Self { a, b: [from[0] - (a[0] * to[0] - a[1] * to[1]), from[1] - (a[0] * to[1] + a[1] * to[0])] })
    }

    /// Returns the map from the photo to the crop.
    fn inverse(&self) -> Self {
        let square = self.a[0].powi(2) + self.a[1].powi(2);
        let a = [self.a[0] / square, -self.a[1] / square];
        Self { a, b: [-(a[0] * self.b[0] - a[1] * self.b[1]), -(a[0] * self.b[1] + a[1] * self.b[0])] }
    }

    fn apply(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        [self.a[0] * x - self.a[1] * y + self.b[0], self.a[0] * y + self.a[1] * x + self.b[1]]
    }
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    /// A smooth gradient, so that a wrong position shows.
    fn photo(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([(x / 2) as u8, (y / 2) as u8, ((x + y) / 4) as u8]))
    }

    #[test]
    fn an_aligned_crop_stays_as_it_is() {
        let crop = photo(FACE_SIZE, FACE_SIZE);
        assert_eq!(align_face(&crop, &ALIGNED_LANDMARKS).unwrap(), crop);
    }

    #[test]
    fn a_turned_shifted_and_scaled_face_is_found() {
        let photo = photo(400, 300);
        let (sin, cos) = 0.3f64.sin_cos();
        let place = |[x, y]: [f64; 2]| [1.4 * (cos * x - sin * y) + 90.0, 1.4 * (sin * x + cos * y) + 40.0];
        let landmarks = ALIGNED_LANDMARKS.map(|p| place(p.map(f64::from)).map(|v| v as f32));
        let crop = align_face(&photo, &landmarks).unwrap();
        let (larger, found) = align_face_to(&photo, &landmarks, 224).unwrap();
        assert_eq!(larger.dimensions(), (224, 224));
        for (found, expected) in found.iter().flatten().zip(ALIGNED_LANDMARKS.as_flattened()) {
            assert!((found - 2.0 * expected).abs() < 1e-3, "{found} {expected}");
        }
        for (x, y) in [(0, 0), (50, 30), (111, 111), (56, 72)] {
            let [px, py] = place([f64::from(x), f64::from(y)]);
            let expected = bilinear(&photo, px as f32, py as f32);
            let found = crop.get_pixel(x, y);
            assert!(expected.0.iter().zip(found.0).all(|(a, b)| a.abs_diff(b) <= 1), "{x} {y} {expected:?} {found:?}");
        }
    }

    #[test]
    fn outside_the_photo_is_black_and_landmarks_in_one_place_are_refused() {
        let white = RgbImage::from_pixel(FACE_SIZE, FACE_SIZE, Rgb([255; 3]));
        let shifted = ALIGNED_LANDMARKS.map(|[x, y]| [x - 40.0, y]);
        let crop = align_face(&white, &shifted).unwrap();
        assert_eq!((crop.get_pixel(20, 56).0, crop.get_pixel(60, 56).0), ([0; 3], [255; 3]));
        assert!(align_face(&white, &[[5.0; 2]; 5]).unwrap_err().to_string().contains("five landmarks"));
        assert!(align_face(&white, &[[f32::NAN; 2]; 5]).is_err());
        assert!(align_face(&white, &[[f32::MAX; 2]; 5]).is_err());
    }
}
