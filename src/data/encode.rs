//! Encodes images to the formats that [`super::decode`] reads.

use std::io::Cursor;
use std::path::Path;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::pnm::{PnmEncoder, PnmSubtype, SampleEncoding};
use image::{ExtendedColorType, ImageEncoder, ImageFormat, RgbImage};

use crate::error::{Error, Result};
use crate::files::write_atomic;

/// Quality of JPEGs, high enough that compression adds little to the difference that a mask makes.
const JPEG_QUALITY: u8 = 95;

/// Returns the format of an image file to be written, by its extension, so that a wrong name fails before the work.
///
/// # Errors
/// When the extension is not that of a format that is written.
pub fn output_format(path: &Path) -> Result<ImageFormat> {
    let extension = path.extension().map(|x| x.to_string_lossy().to_lowercase()).unwrap_or_default();
    match extension.as_str() {
        "jpg" | "jpeg" | "jpe" | "jfif" => Ok(ImageFormat::Jpeg),
        "png" => Ok(ImageFormat::Png),
        "bmp" => Ok(ImageFormat::Bmp),
        "webp" => Ok(ImageFormat::WebP),
        "ppm" | "pnm" => Ok(ImageFormat::Pnm),
        _ => {
            let what = format!("expected an image to write (.jpg, .png, .bmp, .webp or .ppm), found {extension:?}");
            Err(Error::Image { path: path.to_owned(), what })
        }
    }
}

/// Returns the bytes of an image file; JPEG at quality 95.
///
/// # Errors
/// When the format cannot hold the image.
pub fn encode_image(image: &RgbImage, format: ImageFormat) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let written = match format {
        ImageFormat::Jpeg => JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY).encode_image(image),
        ImageFormat::Pnm => {
            let encoder = PnmEncoder::new(&mut bytes).with_subtype(PnmSubtype::Pixmap(SampleEncoding::Binary));
            encoder.write_image(image, image.width(), image.height(), ExtendedColorType::Rgb8)
        }
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
    write_atomic(path, &encode_image(image, output_format(path)?).map_err(wrong)?)
}
