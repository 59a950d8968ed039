//! Measures of how usable a crop is.

use image::RgbImage;

/// Returns the sharpness of a crop: the variance of the Laplacian of its luma (Pech-Pacheco et al., ICPR 2000), in
/// squared grey levels. It depends on the crop's size; 0 for crops of fewer than 3 pixels a side.
pub fn sharpness(crop: &RgbImage) -> f32 {
    let (width, height) = (crop.width() as usize, crop.height() as usize);
    if width < 3 || height < 3 {
        return 0.0;
    }
    let luma =
        |rgb: &[u8]| (299.0 * f64::from(rgb[0]) + 587.0 * f64::from(rgb[1]) + 114.0 * f64::from(rgb[2])) / 1000.0;
    let luma: Vec<f64> = crop.as_raw().chunks_exact(3).map(luma).collect();
    let (mut sum, mut squares) = (0.0, 0.0);
    for y in 1..height - 1 {
        for x in 1..width - 1 {
            let at = y * width + x;
            let laplacian = luma[at - width] + luma[at + width] + luma[at - 1] + luma[at + 1] - 4.0 * luma[at];
            sum += laplacian;
            squares += laplacian * laplacian;
        }
    }
    let num = ((width - 2) * (height - 2)) as f64;
    (squares / num - (sum / num).powi(2)).max(0.0) as f32
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    #[test]
    fn sharpness_is_the_variance_of_the_laplacian() {
        assert_eq!(sharpness(&RgbImage::from_pixel(20, 20, Rgb([90, 20, 200]))), 0.0);
        assert_eq!(sharpness(&RgbImage::new(2, 40)), 0.0);
        // A checkerboard of 0 and 100: the Laplacian is 400 or -400 everywhere.
        let grey = |x: u32, y: u32| Rgb([100 * ((x + y) % 2) as u8; 3]);
        let board = RgbImage::from_fn(10, 10, grey);
        assert!((sharpness(&board) - 160_000.0).abs() < 1.0, "{}", sharpness(&board));
        let blurred = image::imageops::blur(&board, 1.0);
        assert!(sharpness(&blurred) < 1000.0);
    }
}
