//! A drawn mask before it is blended into the image: planes of colour, coverage and shadow.

use image::RgbImage;

use super::warp::low_byte;

/// Planes: red, green and blue (multiplied by the coverage), the coverage in `[0, 1]`, and the factor on the skin
/// beside the mask.
const PLANES: usize = 5;
const COVER: usize = 3;
const SHADOW: usize = 4;

/// A mask's layer over the rectangle of an image that the mask can reach.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Layer {
    origin: [u32; 2],
    size: [u32; 2],
    planes: [Vec<f32>; PLANES],
    /// Rows before the blur, kept while it runs.
    before: [Vec<f32>; 2],
}

impl Layer {
    /// Resizes the layer to `size` pixels, the first of which is at `origin` of the image. Old values remain.
    pub fn reset(&mut self, origin: [u32; 2], size: [u32; 2]) {
        (self.origin, self.size) = (origin, size);
        for plane in &mut self.planes {
            plane.resize(size[0] as usize * size[1] as usize, 0.0);
        }
        for row in &mut self.before {
            row.resize(size[0] as usize + 2, 0.0);
        }
    }

    /// Stores the first `num` of these pixels, from `column` of `row` on.
    #[inline(always)]
    pub fn store(&mut self, [column, row]: [usize; 2], num: usize, values: [&[f32]; PLANES]) {
        let at = row * self.size[0] as usize + column;
        for (plane, values) in self.planes.iter_mut().zip(values) {
            plane[at..at + num].copy_from_slice(&values[..num]);
        }
    }

    /// Blurs colour and coverage with `[weight, 1 - 2 weight, weight]` across, then down; border pixels are repeated.
    #[inline(always)]
    pub fn blur(&mut self, weight: f32) {
        let (width, height) = (self.size[0] as usize, self.size[1] as usize);
        if width == 0 || height == 0 {
            return;
        }
        let middle = 1.0 - 2.0 * weight;
        let [above, here] = &mut self.before;
        for plane in &mut self.planes[..SHADOW] {
            for row in plane.chunks_exact_mut(width) {
                here[1..=width].copy_from_slice(row);
                (here[0], here[width + 1]) = (row[0], row[width - 1]);
                let (left, right) = (&here[..width], &here[2..width + 2]);
                for x in 0..width {
                    row[x] = middle * row[x] + weight * (left[x] + right[x]);
                }
            }
            above[..width].copy_from_slice(&plane[..width]);
            for y in 0..height {
                let (done, below) = plane.split_at_mut((y + 1) * width);
                let row = &mut done[y * width..];
                here[..width].copy_from_slice(row);
                let below = if y + 1 < height { &below[..width] } else { &here[..width] };
                let above_row = &above[..width];
                for x in 0..width {
                    row[x] = middle * row[x] + weight * (above_row[x] + below[x]);
                }
                std::mem::swap(above, here);
            }
        }
    }

    /// Blends the mask into the image it was drawn for; pixels without coverage or shadow keep their value.
    pub fn blend(&self, image: &mut RgbImage) {
        pulp::Arch::new().dispatch(Blend { layer: self, image });
    }

    /// Coverage of the mask at a pixel, `[0, 1]`.
    #[cfg(test)]
    pub fn cover(&self, x: u32, y: u32) -> f32 {
        self.index(x, y).map_or(0.0, |at| self.planes[COVER][at])
    }

    /// Whether blending can change a pixel.
    #[cfg(test)]
    pub fn touches(&self, x: u32, y: u32) -> bool {
        self.index(x, y).is_some_and(|at| self.planes[COVER][at] > 0.0 || self.planes[SHADOW][at] < 1.0)
    }

    #[cfg(test)]
    fn index(&self, x: u32, y: u32) -> Option<usize> {
        let (column, row) = (x.wrapping_sub(self.origin[0]), y.wrapping_sub(self.origin[1]));
        (column < self.size[0] && row < self.size[1]).then(|| (row * self.size[0] + column) as usize)
    }
}

struct Blend<'a> {
    layer: &'a Layer,
    image: &'a mut RgbImage,
}

impl pulp::NullaryFnOnce for Blend<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { layer: Layer { origin, size, planes, .. }, image } = self;
        let (width, height) = (size[0] as usize, size[1] as usize);
        let row_bytes = 3 * image.width() as usize;
        let start = origin[1] as usize * row_bytes + 3 * origin[0] as usize;
        let bytes: &mut [u8] = image;
        for y in 0..height {
            let (row, _) = bytes[start + y * row_bytes..][..3 * width].as_chunks_mut::<3>();
            let (cover, shadow) = (&planes[COVER][y * width..][..width], &planes[SHADOW][y * width..][..width]);
            for channel in 0..3 {
                let mask = &planes[channel][y * width..][..width];
                for x in 0..width {
                    let skin = f32::from(row[x][channel]) * shadow[x] * (1.0 - cover[x]);
                    row[x][channel] = low_byte((skin + mask[x] + 0.5).clamp(0.0, 255.0));
                }
            }
        }
    }
}
