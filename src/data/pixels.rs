//! From 8-bit images to the numbers that a network sees.

use candle_core::{Device, Tensor};
use image::RgbImage;
use image::imageops;

use crate::error::Result;

/// Images as a network sees them: `(N, 3, size, size)`, RGB, `(x / 255 - 0.5) / 0.5`, in `[-1, 1]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pixels {
    /// The values, row-major.
    pub values: Vec<f32>,
    /// `N`.
    pub num_images: usize,
    /// Side in pixels.
    pub size: usize,
}

impl Pixels {
    /// Returns an empty batch of images of side `size`.
    pub fn new(size: usize) -> Self {
        Self { values: Vec::new(), num_images: 0, size }
    }

    /// Appends an image, scaled by area to `size` first if it is of another size.
    pub fn push(&mut self, image: &RgbImage) {
        let size = self.size as u32;
        if image.dimensions() == (size, size) {
            self.push_exact(image);
        } else {
            self.push_exact(&imageops::thumbnail(image, size, size));
        }
    }

    /// Returns the images as a tensor `(N, 3, size, size)`, f32.
    ///
    /// # Errors
    /// When it cannot be placed on `device`.
    pub fn into_tensor(self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.values, (self.num_images, 3, self.size, self.size), device)?)
    }

    fn push_exact(&mut self, image: &RgbImage) {
        let raw = image.as_raw();
        for channel in 0..3 {
            let values = raw.iter().skip(channel).step_by(3);
            self.values.extend(values.map(|&v| (f32::from(v) / 255.0 - 0.5) / 0.5));
        }
        self.num_images += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_are_rgb_and_scaled_to_minus_one_to_one() {
        let mut image = RgbImage::new(2, 2);
        image.put_pixel(1, 0, image::Rgb([255, 0, 51]));
        let mut pixels = Pixels::new(2);
        pixels.push(&image);
        assert_eq!(pixels.values[..4], [-1.0, 1.0, -1.0, -1.0]);
        assert_eq!(pixels.values[4..8], [-1.0; 4]);
        assert!((pixels.values[9] - -0.6).abs() <= 1e-6);
    }

    #[test]
    fn scaling_down_averages() {
        let image = RgbImage::from_fn(4, 4, |x, _| image::Rgb([if x % 2 == 0 { 0 } else { 200 }; 3]));
        let mut pixels = Pixels::new(2);
        pixels.push(&image);
        assert_eq!(pixels.num_images, 1);
        for v in &pixels.values {
            assert!((v - (100.0 / 127.5 - 1.0)).abs() <= 0.01, "{v}");
        }
    }
}
