//! Batches of 8-bit images and their conversion to network input.

use candle_core::{Device, Tensor};
use image::RgbImage;
use image::imageops;

use super::{Channels, Preprocessing};
use crate::error::Result;

/// A batch of images of one size, `(N, size, size, 3)`, RGB, 8 bits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pixels {
    /// Pixel values, row-major.
    pub values: Vec<u8>,
    /// Number of images, `N`.
    pub num_images: usize,
    /// Side in pixels.
    pub size: usize,
}

impl Pixels {
    /// Returns an empty batch of images of side `size`.
    pub fn new(size: usize) -> Self {
        Self { values: Vec::new(), num_images: 0, size }
    }

    /// Returns an empty batch with room for `num_images` images of side `size`.
    pub fn with_capacity(size: usize, num_images: usize) -> Self {
        Self { values: Vec::with_capacity(3 * size * size * num_images), num_images: 0, size }
    }

    /// Appends an image like [`Self::push`], mirrored horizontally if `flip`.
    pub fn push_flipped(&mut self, image: &RgbImage, flip: bool) {
        if !flip || image.dimensions() != (self.size as u32, self.size as u32) {
            return match flip {
                true => self.push(&imageops::flip_horizontal(image)),
                false => self.push(image),
            };
        }
        for row in image.as_raw().chunks_exact(3 * self.size) {
            let start = self.values.len();
            self.values.extend_from_slice(row);
            let (pixels, _) = self.values[start..].as_chunks_mut::<3>();
            pixels.reverse();
        }
        self.num_images += 1;
    }

    /// Appends an image, scaled to `size` by area averaging if it has another size.
    pub fn push(&mut self, image: &RgbImage) {
        let size = self.size as u32;
        if image.dimensions() == (size, size) {
            self.values.extend_from_slice(image.as_raw());
        } else {
            self.values.extend(imageops::thumbnail(image, size, size).into_raw());
        }
        self.num_images += 1;
    }

    /// Appends the images of a batch of the same side.
    pub(crate) fn append(&mut self, mut other: Self) {
        debug_assert_eq!(self.size, other.size);
        self.values.append(&mut other.values);
        self.num_images += other.num_images;
    }

    /// Returns the images mirrored horizontally.
    pub(crate) fn mirrored(mut self) -> Self {
        for row in self.values.chunks_exact_mut((3 * self.size).max(1)) {
            row.as_chunks_mut::<3>().0.reverse();
        }
        self
    }

    /// Returns some images of the batch, by their indices.
    pub(crate) fn select(&self, images: impl IntoIterator<Item = usize>) -> Self {
        let images = images.into_iter();
        let mut selected = Self::with_capacity(self.size, images.size_hint().0);
        let of_image = 3 * self.size * self.size;
        for i in images {
            selected.values.extend_from_slice(&self.values[i * of_image..][..of_image]);
            selected.num_images += 1;
        }
        selected
    }

    /// Returns the images as network input with `preprocessing`: `(N, 3, size, size)`, f32.
    ///
    /// # Errors
    /// When the tensor cannot be created on `device`.
    pub fn to_tensor(&self, preprocessing: &Preprocessing, device: &Device) -> Result<Tensor> {
        let table = preprocessing.table();
        let order = match preprocessing.channels {
            Channels::Rgb => [0, 1, 2],
            Channels::Bgr => [2, 1, 0],
        };
        let mut values = Vec::with_capacity(self.values.len());
        for image in self.values.chunks_exact((3 * self.size * self.size).max(1)) {
            for channel in order {
                values.extend(image.iter().skip(channel).step_by(3).map(|&v| table[usize::from(v)]));
            }
        }
        Ok(Tensor::from_vec(values, (self.num_images, 3, self.size, self.size), device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_are_in_the_networks_order_and_range() -> Result<()> {
        let mut image = RgbImage::new(2, 2);
        image.put_pixel(1, 0, image::Rgb([255, 0, 51]));
        let mut pixels = Pixels::new(2);
        pixels.push(&image);
        let rgb = Preprocessing::default();
        let values = pixels.to_tensor(&rgb, &Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(values[..4], [-1.0, 1.0, -1.0, -1.0]);
        assert_eq!(values[4..8], [-1.0; 4]);
        assert!((values[9] - -0.6).abs() <= 1e-6);
        let bgr = Preprocessing { channels: Channels::Bgr, ..rgb };
        let swapped = pixels.to_tensor(&bgr, &Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!((&swapped[..4], &swapped[8..]), (&values[8..], &values[..4]));
        Ok(())
    }

    #[test]
    fn flipped_images_are_from_right_to_left() {
        let image = RgbImage::from_fn(5, 5, |x, y| image::Rgb([x as u8, y as u8, 7]));
        for size in [5, 3] {
            let [mut found, mut expected] = [Pixels::new(size), Pixels::new(size)];
            found.push_flipped(&image, true);
            found.push_flipped(&image, false);
            expected.push(&imageops::flip_horizontal(&image));
            expected.push(&image);
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn scaling_down_averages() {
        let image = RgbImage::from_fn(4, 4, |x, _| image::Rgb([if x % 2 == 0 { 0 } else { 200 }; 3]));
        let mut pixels = Pixels::new(2);
        pixels.push(&image);
        assert_eq!(pixels.num_images, 1);
        assert!(pixels.values.iter().all(|v| v.abs_diff(100) <= 1), "{:?}", pixels.values);
    }
}
