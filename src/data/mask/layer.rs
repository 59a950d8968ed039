//! A drawn mask before it is blended into the image: planes of colour, coverage and shadow.

use image::RgbImage;

use super::warp::low_byte;

/// Planes: red, green and blue (multiplied by the coverage), the coverage in `[0, 1]`, and the factor on the skin
/// beside the mask.
const PLANES: usize = 5;
const COVER: usize = 3;
const SHADOW: usize = 4;
/// Largest distance of a blur's taps, in pixels; with smaller ones before, it reaches a variance of 10.5.
const MAX_APART: usize = 4;

/// A mask's layer over the rectangle of an image that the mask can reach.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Layer {
    origin: [u32; 2],
    size: [u32; 2],
    planes: [Vec<f32>; PLANES],
    /// A plane before a pass of the blur.
    before: Vec<f32>,
}

impl Layer {
    /// Resizes the layer to `size` pixels, the first of which is at `origin` of the image. Old values remain.
    pub fn reset(&mut self, origin: [u32; 2], size: [u32; 2]) {
        (self.origin, self.size) = (origin, size);
        for plane in &mut self.planes {
            plane.resize(size[0] as usize * size[1] as usize, 0.0);
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

    /// Blurs colour and coverage until an edge has this variance, in square pixels; border pixels are repeated. Each
    /// pass is `[weight, 1 - 2 weight, weight]`, across and then down, with taps twice as far apart as in the last.
    #[inline(always)]
    pub fn blur(&mut self, variance: f32) {
        let (width, height) = (self.size[0] as usize, self.size[1] as usize);
        if width == 0 || height == 0 {
            return;
        }
        let Self { planes, before, .. } = self;
        let (mut left, mut apart) = (variance, 1);
        while left > 0.0 && apart <= MAX_APART {
            let of_unit = 2.0 * (apart * apart) as f32;
            let weight = (left / of_unit).min(0.25);
            left -= of_unit * weight;
            for plane in &mut planes[..SHADOW] {
                before.clear();
                before.extend_from_slice(plane);
                for (row, before) in plane.chunks_exact_mut(width).zip(before.chunks_exact(width)) {
                    for x in (0..apart.min(width)).chain(width.saturating_sub(apart).max(apart)..width) {
                        let (a, b) = (before[x.saturating_sub(apart)], before[(x + apart).min(width - 1)]);
                        row[x] = weighted(before[x], a, b, weight);
                    }
                    for x in apart..width.saturating_sub(apart) {
                        row[x] = weighted(before[x], before[x - apart], before[x + apart], weight);
                    }
                }
                before.copy_from_slice(plane);
                for (y, row) in plane.chunks_exact_mut(width).enumerate() {
                    let line = |y: usize| &before[y * width..][..width];
                    let (here, above, below) =
                        (line(y), line(y.saturating_sub(apart)), line((y + apart).min(height - 1)));
                    for x in 0..width {
                        row[x] = weighted(here[x], above[x], below[x], weight);
                    }
                }
            }
            apart *= 2;
        }
    }

    /// Leaves the pixels that are `outside` as they are.
    pub fn clear(&mut self, outside: impl Fn([u32; 2]) -> bool) {
        let [width, height] = self.size;
        if width == 0 {
            return;
        }
        for (y, row) in (0..height).zip((0..).step_by(width as usize)) {
            for x in (0..width).filter(|x| outside([self.origin[0] + x, self.origin[1] + y])) {
                for (plane, value) in self.planes.iter_mut().zip([0.0, 0.0, 0.0, 0.0, 1.0]) {
                    plane[row + x as usize] = value;
                }
            }
        }
    }

    /// Blends the mask into the image it was drawn for; pixels without coverage or shadow keep their value.
    pub fn blend(&self, image: &mut RgbImage) {
        crate::vectors::arch().dispatch(Blend { layer: self, image });
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

#[inline(always)]
fn weighted(here: f32, a: f32, b: f32, weight: f32) -> f32 {
    (1.0 - 2.0 * weight) * here + weight * (a + b)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blur_spreads_a_point_by_its_variance() {
        let (width, at) = (61, 30);
        for variance in [0.0, 0.3, 0.5, 1.7, 2.5, 6.0, 10.5] {
            let mut layer = Layer::default();
            layer.reset([0, 0], [width, width]);
            layer.planes[COVER][(at * width + at) as usize] = 1.0;
            layer.blur(variance);
            let (mut sum, mut moments) = (0.0, [0.0; 2]);
            for y in 0..width {
                for x in 0..width {
                    let value = layer.cover(x, y);
                    sum += value;
                    for (moment, place) in moments.iter_mut().zip([x, y]) {
                        *moment += value * (place as f32 - at as f32).powi(2);
                    }
                }
            }
            assert!((sum - 1.0).abs() < 1e-4, "{variance}: {sum}");
            assert!(moments.iter().all(|moment| (moment - variance).abs() < 1e-3), "{variance}: {moments:?}");
        }
        // Narrower than the taps are apart.
        let mut layer = Layer::default();
        layer.reset([0, 0], [2, 3]);
        layer.planes[COVER].fill(1.0);
        layer.blur(10.5);
        assert!(layer.planes[COVER].iter().all(|value| (value - 1.0).abs() < 1e-5));
    }
}
