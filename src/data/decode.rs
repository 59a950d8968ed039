//! Decodes image files by their content, within memory limits; truncated files are errors.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::exif::orientation;
use super::jpeg::{JpegLayout, MAX_DECODE_BYTES, SizeCheck, decode_odd, jpeg_layout};
use super::sample::FACE_SIZE;
use crate::error::{Error, Result};

/// File extensions of images, in lower case.
const EXTENSIONS: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "bmp", "webp", "pgm", "ppm", "pnm"];

/// Extensions of images in formats that are not read.
const OTHER_EXTENSIONS: [&str; 9] = ["gif", "tif", "tiff", "heic", "heif", "avif", "jp2", "jxl", "svg"];

/// Most bytes of an image file.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// Error of a truncated JPEG.
const NO_END: &str = "expected a complete JPEG, found no end marker: the file is truncated";

/// Returns whether a file name is that of an image; hidden files are not, whatever their extension.
pub fn is_image(name: &OsStr) -> bool {
    let is_hidden = name.as_encoded_bytes().starts_with(b".");
    let extension = Path::new(name).extension();
    !is_hidden && extension.is_some_and(|x| EXTENSIONS.iter().any(|e| x.eq_ignore_ascii_case(e)))
}

/// Returns whether a file name is that of an image in a format that is not read, such as HEIC.
pub fn is_other_image(name: &OsStr) -> bool {
    let is_hidden = name.as_encoded_bytes().starts_with(b".");
    let extension = Path::new(name).extension();
    !is_hidden && extension.is_some_and(|x| OTHER_EXTENSIONS.iter().any(|e| x.eq_ignore_ascii_case(e)))
}

/// Returns whether a field of a list names an image, in a format that is read or not.
pub(super) fn names_image(field: &str) -> bool {
    let name = field.rsplit(['/', '\\']).next().unwrap_or(field);
    is_image(name.as_ref()) || is_other_image(name.as_ref())
}

/// Reads the aligned crop in an image file, [`FACE_SIZE`] square.
///
/// # Errors
/// Same as [`read_image`], and when the image has another size.
pub fn read_face(path: &Path) -> Result<RgbImage> {
    decode_face(&read_image_file(path)?, || path.to_owned())
}

/// Decodes the aligned crop in the bytes of an image file; `name` returns its origin for error messages.
///
/// # Errors
/// Same as [`read_face`], apart from reading the file.
pub fn decode_face(bytes: &[u8], name: impl Fn() -> PathBuf) -> Result<RgbImage> {
    decode(bytes, &name, &|width, height| {
        if (width, height) == (FACE_SIZE, FACE_SIZE) {
            return Ok(());
        }
        Err(format!(
            "expected {FACE_SIZE}x{FACE_SIZE} pixels, found {width}x{height}: crops must be aligned to \
             {FACE_SIZE}x{FACE_SIZE} first"
        ))
    })
}

/// Reads an image file of any supported format as RGB, upright: turned as its EXIF orientation says. The format is
/// detected from the content, since extensions lie.
///
/// # Errors
/// When the file cannot be read, is not an image, is truncated, or would need more than 256 MiB decoded.
pub fn read_image(path: &Path) -> Result<RgbImage> {
    decode(&read_image_file(path)?, &|| path.to_owned(), &|_, _| Ok(()))
}

/// Decodes the bytes of an image file as [`read_image`] does; `name` returns its origin for error messages.
///
/// # Errors
/// Same as [`read_image`], apart from reading the file.
pub fn decode_image(bytes: &[u8], name: impl Fn() -> PathBuf) -> Result<RgbImage> {
    decode(bytes, &name, &|_, _| Ok(()))
}

/// Reads an image's file, of at most 128 MiB: no image is larger, and a device may have no end.
///
/// # Errors
/// When it is no file, is larger, or cannot be read.
pub fn read_image_file(path: &Path) -> Result<Vec<u8>> {
    // Opening a pipe would wait for somebody to write to it.
    if !path.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Error::Image { path: path.to_owned(), what: "expected an image file, found no file".to_owned() });
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let what = format!("expected an image file of at most {} MiB, found a larger one", MAX_FILE_BYTES >> 20);
        return Err(Error::Image { path: path.to_owned(), what });
    }
    Ok(bytes)
}

fn decode(bytes: &[u8], name: &dyn Fn() -> PathBuf, check_size: SizeCheck) -> Result<RgbImage> {
    let error = |what: String| Error::Image { path: name(), what };
    if bytes.starts_with(&[0xff, 0xd8, 0xff]) {
        match jpeg_layout(bytes) {
            JpegLayout::Usual => {}
            JpegLayout::Unread => {
                let what = "JPEG sampling factors of 2 beside 4, in one direction, are not supported";
                return Err(error(what.to_owned()));
            }
            JpegLayout::Odd { .. } if !jpeg_is_complete(bytes) => return Err(error(NO_END.to_owned())),
            JpegLayout::Odd { is_rgb } => return decode_odd(bytes, is_rgb, check_size).map_err(error),
        }
    }
    if let Some(image) = decode_colour_jpeg(bytes, check_size).map_err(error)? {
        return Ok(image);
    }
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| Error::Io { path: name(), source: e })?;
    let other = other_format(bytes);
    let format = reader.format().filter(|_| other.is_none()).ok_or_else(|| {
        let found = other.unwrap_or(if bytes.is_empty() { "an empty file" } else { "an unknown format" });
        error(format!("expected JPEG, PNG, WebP, BMP or PNM, found {found}"))
    })?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODE_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| error(e.to_string()))?;
    // Checked before any pixel is decoded, so that a forged header allocates nothing.
    let (width, height) = decoder.dimensions();
    check_size(width, height).map_err(error)?;
    if decoder.total_bytes() > MAX_DECODE_BYTES {
        let mib = MAX_DECODE_BYTES >> 20;
        return Err(error(format!("{width}x{height} pixels take more than {mib} MiB to decode: scale the image down")));
    }
    let exif = decoder.exif_metadata().map_err(|e| error(e.to_string()))?;
    let orientation = exif.and_then(|exif| orientation(&exif)).unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| error(e.to_string()))?;
    if format == ImageFormat::Jpeg && !jpeg_is_complete(bytes) {
        return Err(error(NO_END.to_owned()));
    }
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

/// Names the format of a picture that is not read; none for one that is, or that is unknown.
fn other_format(bytes: &[u8]) -> Option<&'static str> {
    let brand = bytes.get(4..12).and_then(|bytes| bytes.strip_prefix(b"ftyp"));
    let heic = [b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"];
    let is_heic = brand.is_some_and(|brand| heic.iter().any(|known| brand == *known));
    match bytes {
        _ if brand.is_some_and(|brand| [b"avif", b"avis"].iter().any(|known| brand == *known)) => {
            Some("AVIF: convert it to JPEG or PNG")
        }
        _ if is_heic => Some("HEIC, as phones write it: convert it to JPEG or PNG"),
        _ if brand.is_some() => Some("a video or a camera's raw file: convert it to JPEG or PNG"),
        [b'G', b'I', b'F', b'8', ..] => Some("GIF: convert it to PNG"),
        [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => Some("TIFF or a camera's raw file: convert it to PNG"),
        [0xff, 0x0a, ..] | [0, 0, 0, 12, b'J', b'X', b'L', b' ', ..] => Some("JPEG XL: convert it to JPEG"),
        [0, 0, 0, 12, b'j', b'P', b' ', b' ', ..] => Some("JPEG 2000: convert it to JPEG"),
        [b'%', b'P', b'D', b'F', ..] => Some("PDF"),
        _ => None,
    }
}

/// Says what is damaged in the data of a JPEG that decodes all the same, to something else than it was; none if nothing
/// is found, or if it is no JPEG. Only codes that no JPEG has are found: other damage is a valid image.
pub(super) fn jpeg_damage(bytes: &[u8]) -> Option<String> {
    if !bytes.starts_with(&[0xff, 0xd8, 0xff]) || jpeg_layout(bytes) != JpegLayout::Usual {
        return None;
    }
    let options = DecoderOptions::default().set_strict_mode(true);
    JpegDecoder::new_with_options(ZCursor::new(bytes), options).decode().err().map(|e| e.to_string())
}

/// Decodes a complete colour JPEG with the decoder that `image` uses, but reads its header only once and decodes
/// straight into the result. Returns `None` for anything else, for files with EXIF data, which may say to turn them,
/// and for broken files, for which `image` has the better error.
fn decode_colour_jpeg(bytes: &[u8], check_size: SizeCheck) -> std::result::Result<Option<RgbImage>, String> {
    if !bytes.starts_with(&[0xff, 0xd8, 0xff]) || !jpeg_is_complete(bytes) {
        return Ok(None);
    }
    // The options that `image` sets.
    let options = DecoderOptions::default().set_strict_mode(false).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut decoder =
        JpegDecoder::new_with_options(ZCursor::new(bytes), options.jpeg_set_out_colorspace(ColorSpace::RGB));
    let is_plain = decoder.decode_headers().is_ok() && decoder.exif().is_none();
    if !is_plain || decoder.input_colorspace() != Some(ColorSpace::YCbCr) {
        return Ok(None);
    }
    let size = decoder.dimensions().and_then(|(w, h)| Some((u32::try_from(w).ok()?, u32::try_from(h).ok()?)));
    let Some((width, height)) = size else { return Ok(None) };
    check_size(width, height)?;
    let num_bytes = 3 * u64::from(width) * u64::from(height);
    if num_bytes > MAX_DECODE_BYTES {
        return Ok(None);
    }
    let mut pixels = vec![0; num_bytes as usize];
    Ok(decoder.decode_into(&mut pixels).ok().and_then(|()| RgbImage::from_raw(width, height, pixels)))
}

/// Whether a JPEG has its end-of-image marker; the decoder silently fills missing data with grey.
fn jpeg_is_complete(bytes: &[u8]) -> bool {
    let mut at = 2; // after the start-of-image marker
    while let Some(offset) = bytes.get(at..).and_then(|rest| rest.iter().position(|&b| b == 0xff)) {
        let marker_at = at + offset + 1;
        match bytes.get(marker_at) {
            Some(0xd9) => return true,
            // A stuffed 0xff in entropy-coded data, a restart marker, or another marker without a segment.
            Some(0x00 | 0x01 | 0xd0..=0xd8) => at = marker_at + 1,
            Some(0xff) => at = marker_at,
            // A segment is skipped by its length, since it may hold a thumbnail with an end marker of its own.
            Some(_) => match bytes.get(marker_at + 1..marker_at + 3) {
                Some(&[high, low]) => at = marker_at + 1 + usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
            None => return false,
        }
    }
    false
}
