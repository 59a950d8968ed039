//! The camera: exposure, colour balance, loss of resolution, blur, compression and noise.

use image::RgbImage;

use super::canvas::SIDE;
use super::draw::Draw;
use super::nuisance::Sensor;
use super::shape::{Rgb, mix};

/// Mean radiance that automatic exposure aims at.
const GREY: f32 = 0.24;
/// `cos(k pi / 16)` for k = 0 to 8, over 2: the basis of the 8-point cosine transform.
const COS: [f32; 9] =
    [0.5, 0.490_392_64, 0.461_939_77, 0.415_734_8, 0.353_553_4, 0.277_785_1, 0.191_341_72, 0.097_545_16, 0.0];

/// Returns the photograph of `radiance` (linear, row by row).
pub(super) fn expose(mut radiance: Vec<Rgb>, sensor: &Sensor, noise: &mut Draw) -> RgbImage {
    let gain = sensor.exposure * auto_exposure(&radiance);
    for c in &mut radiance {
        for (v, balance) in c.iter_mut().zip(sensor.balance) {
            *v = tone(*v * gain * balance);
        }
        let luma = 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2];
        for v in c {
            let saturated = luma + (*v - luma) * sensor.saturation;
            *v = 255.0 * (0.5 + (saturated - 0.5) * sensor.contrast).clamp(0.0, 1.0);
        }
    }
    let mut scratch = vec![[0.0; 3]; SIDE * SIDE];
    blur(&mut radiance, &mut scratch, sensor.blur);
    if sensor.shrink > 1.0 {
        lose_resolution(&mut radiance, &mut scratch, sensor.shrink);
    }
    add_noise(&mut radiance, sensor.noise, noise);
    if sensor.quantiser > 0.0 {
        compress(&mut radiance, sensor.quantiser);
    }
    let bytes = radiance.iter().flatten().map(|v| (v + 0.5).clamp(0.0, 255.0) as u8).collect();
    RgbImage::from_raw(SIDE as u32, SIDE as u32, bytes).expect("three bytes for each pixel")
}

/// Square root of the factor that would bring the middle of the picture to [`GREY`], limited to `[0.4, 2.2]`.
fn auto_exposure(radiance: &[Rgb]) -> f32 {
    let (mut sum, mut count) = (0.0, 0.0);
    for row in radiance.chunks_exact(SIDE).skip(16).take(88).step_by(4) {
        for c in row[20..92].iter().step_by(4) {
            sum += 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2];
            count += 1.0;
        }
    }
    (GREY * count / f32::max(sum, 1e-3)).sqrt().clamp(0.4, 2.2)
}

/// Display value of a radiance, both in `[0, 1]` where not clipped: a gamma of 2 with a soft shoulder.
fn tone(c: f32) -> f32 {
    let v = c.max(0.0).sqrt();
    if v < 0.8 { v } else { 0.8 + 0.2 * (v - 0.8) / (v - 0.6) }
}

/// Blurs by passes of a three-tap kernel whose total variance is that of a Gaussian of `sigma` px.
fn blur(image: &mut [Rgb], scratch: &mut [Rgb], sigma: f32) {
    // A kernel (s, 1 - 2s, s) has the variance 2s; a variance of 0.6 or more takes several passes.
    let passes = ((sigma * sigma / 0.6) as usize + 1).min(6);
    let side = (0.5 * sigma * sigma / passes as f32).min(1.0 / 3.0);
    for _ in 0..passes {
        filter(image, scratch, side, 1, SIDE);
        filter(scratch, image, side, SIDE, 1);
    }
}

/// One pass along the axis with the given stride; `across` is the stride of the other axis.
fn filter(from: &[Rgb], to: &mut [Rgb], side: f32, along: usize, across: usize) {
    for line in 0..SIDE {
        for i in 0..SIDE {
            let at = |i: usize| from[line * across + i * along];
            let (a, b, c) = (at(i.saturating_sub(1)), at(i), at((i + 1).min(SIDE - 1)));
            let out = &mut to[line * across + i * along];
            for k in 0..3 {
                out[k] = b[k] + side * (a[k] + c[k] - 2.0 * b[k]);
            }
        }
    }
}

/// Averages over cells `factor` px wide and interpolates between their centres.
fn lose_resolution(image: &mut [Rgb], scratch: &mut [Rgb], factor: f32) {
    let cells = ((SIDE as f32 / factor) as usize).clamp(8, SIDE);
    let cell = SIDE as f32 / cells as f32;
    for j in 0..cells {
        for i in 0..cells {
            let range = |c: usize| (c as f32 * cell) as usize..(((c + 1) as f32 * cell) as usize).min(SIDE);
            let (mut sum, mut count) = ([0.0; 3], 0.0);
            for row in image.chunks_exact(SIDE).take(range(j).end).skip(range(j).start) {
                for c in &row[range(i)] {
                    sum = [sum[0] + c[0], sum[1] + c[1], sum[2] + c[2]];
                    count += 1.0;
                }
            }
            scratch[j * cells + i] = sum.map(|s| s / count);
        }
    }
    let place = |x: usize| {
        let at = ((x as f32 + 0.5) / cell - 0.5).clamp(0.0, (cells - 1) as f32);
        (at as usize, (at as usize + 1).min(cells - 1), at - (at as usize) as f32)
    };
    for (y, row) in image.chunks_exact_mut(SIDE).enumerate() {
        let (j0, j1, ty) = place(y);
        for (x, c) in row.iter_mut().enumerate() {
            let (i0, i1, tx) = place(x);
            let at = |j: usize, i: usize| scratch[j * cells + i];
            *c = mix(mix(at(j0, i0), at(j0, i1), tx), mix(at(j1, i0), at(j1, i1), tx), ty);
        }
    }
}

/// Adds nearly normal noise. Each value is a sum of four bytes; 64 % of its variance is common to the channels.
fn add_noise(image: &mut [Rgb], sd: f32, noise: &mut Draw) {
    if sd <= 0.0 {
        return;
    }
    // A sum of four bytes has the mean 510 and the standard deviation 147.8.
    let mut bytes = [0; SIDE * 16];
    for row in image.chunks_exact_mut(SIDE) {
        noise.fill(&mut bytes);
        for (c, bytes) in row.iter_mut().zip(bytes.chunks_exact(16)) {
            let normal = |i: usize| (bytes[i..i + 4].iter().map(|&b| u32::from(b)).sum::<u32>() as f32 - 510.0) / 147.8;
            let grey = normal(0);
            for (k, v) in c.iter_mut().enumerate() {
                *v += sd * (0.8 * grey + 0.6 * normal(4 + 4 * k));
            }
        }
    }
}

/// Quantises 8x8 blocks of the cosine transform of luma and of the two colour differences, as JPEG does.
fn compress(image: &mut [Rgb], step: f32) {
    let forward: [[f32; 8]; 8] = std::array::from_fn(|f| std::array::from_fn(|x| basis(f, x)));
    let inverse = std::array::from_fn(|x| forward.map(|row| row[x]));
    let mut block = [[0.0; 64]; 3];
    for by in (0..SIDE).step_by(8) {
        for bx in (0..SIDE).step_by(8) {
            for i in 0..64 {
                let [r, g, b] = image[(by + i / 8) * SIDE + bx + i % 8];
                let luma = 0.3 * r + 0.59 * g + 0.11 * b;
                (block[0][i], block[1][i], block[2][i]) = (luma, r - luma, b - luma);
            }
            for (plane, values) in block.iter_mut().enumerate() {
                let coarse = if plane == 0 { 0.5 } else { 1.2 };
                transform(values, &forward);
                for (i, v) in values.iter_mut().enumerate() {
                    let q = step * coarse * (0.4 + 0.16 * (i / 8 + i % 8) as f32);
                    let scaled = *v / q;
                    // Rounds half away from zero.
                    *v = q * ((scaled + if scaled < 0.0 { -0.5 } else { 0.5 }) as i32) as f32;
                }
                transform(values, &inverse);
            }
            for i in 0..64 {
                let (luma, dr, db) = (block[0][i], block[1][i], block[2][i]);
                image[(by + i / 8) * SIDE + bx + i % 8] = [luma + dr, luma - (0.3 * dr + 0.11 * db) / 0.59, luma + db];
            }
        }
    }
}

/// Multiplies the rows and columns of an 8x8 block by `matrix`.
fn transform(block: &mut [f32; 64], matrix: &[[f32; 8]; 8]) {
    for (along, across) in [(1, 8), (8, 1)] {
        for line in 0..8 {
            let at = |i: usize| line * across + i * along;
            let mut input = [0.0; 8];
            for (i, x) in input.iter_mut().enumerate() {
                *x = block[at(i)];
            }
            for (i, row) in matrix.iter().enumerate() {
                let mut sum = 0.0;
                for (m, x) in row.iter().zip(&input) {
                    sum += m * x;
                }
                block[at(i)] = sum;
            }
        }
    }
}

/// Value at sample `x` of the cosine of frequency `f` in the orthonormal 8-point cosine transform.
fn basis(f: usize, x: usize) -> f32 {
    if f == 0 {
        return 0.353_553_4;
    }
    match (2 * x + 1) * f % 32 {
        k @ 0..=8 => COS[k],
        k @ 9..=16 => -COS[16 - k],
        k @ 17..=24 => -COS[k - 16],
        k => COS[32 - k],
    }
}
