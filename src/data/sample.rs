//! Aligned face images with a label and five landmarks.

use image::RgbImage;

/// Side of an aligned face crop, in pixels.
pub const FACE_SIZE: u32 = 112;

/// Five landmarks `[x, y]` in pixels: two eyes, the nose tip, two mouth corners. Of each pair, the one on the image's
/// left (the person's right) comes first.
pub type Landmarks = [[f32; 2]; 5];

/// Landmarks of an aligned 112x112 crop (Deng et al., ArcFace; insightface's template).
pub const ALIGNED_LANDMARKS: Landmarks =
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]];

/// One face image.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The aligned crop, RGB, 8 bits, [`FACE_SIZE`] square.
    pub image: RgbImage,
    /// Label of the person, in `0 .. num_identities`.
    pub label: u32,
    /// Landmarks in pixels of `image`.
    pub landmarks: Landmarks,
}
