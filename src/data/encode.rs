//! Encodes images to the formats that [`super::decode`] reads.

use std::io::Cursor;
use std::path::Path;

use image::codecs::jpeg::JpegEncoder;
use image::{ImageFormat, RgbImage};

use crate::error::{Error, Result};
use crate::files::write_atomic;

/// Quality of JPEGs, high enough that compression adds little to the difference that a mask makes.
const JPEG_QUALITY: u8 = 95;

/// Returns the bytes of an image file; JPEG at quality 95.
///
/// # Errors
/// When the format cannot hold the image.
pub fn encode_image(image: &RgbImage, format: ImageFormat) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let written = match format {
        ImageFormat::Jpeg => JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).encode_image(image),
        _ => image.write_to(&mut Cursor::new(&mut bytes), format),
    };
    written.map(|()| bytes).map_err(|e| e.to_string())
}

/// Writes an image in the format of the file's extension, atomically; JPEG at quality 95.
///
/// # Errors
/// When the extension is not that of an image format, or the file cannot be written.
pub fn write_image(image: &RgbImage, path: &Path) -> Result<()> {
    let wrong = |what: String| Error::Image { path: path.to_owned(), what };
    let format = ImageFormat::from_path(path).map_err(|e| wrong(e.to_string()))?;
    write_atomic(path, &encode_image(image, format).map_err(wrong)?)
}
