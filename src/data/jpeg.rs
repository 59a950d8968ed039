//! JPEGs that the usual decoder gets wrong: their detection by the header, and another decoder for them.
//!
//! zune-jpeg 0.5.15, which `image` uses, decodes some valid files to garbage without an error (zune-image issue 422):
//! baseline files with a scan for each component, and files whose first component is not sampled the finest.

use image::RgbImage;
use image::metadata::Orientation;
use jpeg_decoder::{ColorTransform, Decoder, PixelFormat};

use super::exif::orientation;

/// Most bytes that a decoder may allocate: a photo of 89 megapixels.
pub(super) const MAX_DECODE_BYTES: u64 = 256 << 20;

/// Says what is wrong with a width and height, before any pixel is decoded.
pub(super) type SizeCheck<'a> = &'a dyn Fn(u32, u32) -> Result<(), String>;

/// Which of two decoders reads a JPEG, by its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JpegLayout {
    /// What zune-jpeg decodes, or no valid JPEG, for which it has the error.
    Usual,
    /// What zune-jpeg 0.5.15 cannot decode or silently decodes to garbage (zune-image issue 422).
    Odd {
        /// Whether the three components are red, green and blue though named 1, 2, 3, which jpeg-decoder misses.
        is_rgb: bool,
    },
    /// What both decode to garbage: in one direction, factors of 2 beside 4, and odd for zune-jpeg.
    Unread,
}

/// Reads the segments of a JPEG up to its first scan. Never fails: whatever is broken is [`JpegLayout::Usual`].
pub(super) fn jpeg_layout(bytes: &[u8]) -> JpegLayout {
    read_layout(bytes).unwrap_or(JpegLayout::Usual)
}

/// Decodes a JPEG of layout [`JpegLayout::Odd`].
pub(super) fn decode_odd(bytes: &[u8], is_rgb: bool, check_size: SizeCheck) -> Result<RgbImage, String> {
    let mut decoder = Decoder::new(bytes);
    decoder.read_info().map_err(|e| e.to_string())?;
    let info = decoder.info().ok_or("expected the size of the image, found none")?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    check_size(width, height)?;
    // A file of several scans keeps its coefficients, two bytes a sample, beside the samples and the pixels.
    let num_bytes = (3 * info.pixel_format.pixel_bytes() as u64 + 3) * u64::from(width) * u64::from(height);
    if num_bytes > MAX_DECODE_BYTES {
        let mib = MAX_DECODE_BYTES >> 20;
        return Err(format!("{width}x{height} pixels of this kind of JPEG take more than {mib} MiB to decode"));
    }
    if is_rgb {
        decoder.set_color_transform(ColorTransform::RGB);
    }
    let pixels = decoder.decode().map_err(|e| e.to_string())?;
    let rgb: Vec<u8> = match info.pixel_format {
        PixelFormat::RGB24 => pixels,
        PixelFormat::L8 => pixels.iter().flat_map(|&v| [v; 3]).collect(),
        PixelFormat::L16 => pixels.chunks_exact(2).flat_map(|v| [v[1]; 3]).collect(),
        PixelFormat::CMYK32 => {
            let ink = |c: u8, k: u8| (u32::from(255 - c) * u32::from(255 - k) / 255) as u8;
            pixels.chunks_exact(4).flat_map(|v| [ink(v[0], v[3]), ink(v[1], v[3]), ink(v[2], v[3])]).collect()
        }
    };
    let image = RgbImage::from_raw(width, height, rgb).ok_or("expected a value for every pixel, found fewer")?;
    let orientation = decoder.exif_data().and_then(orientation);
    let mut image = image::DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation.unwrap_or(Orientation::NoTransforms));
    Ok(image.into_rgb8())
}

fn read_layout(bytes: &[u8]) -> Option<JpegLayout> {
    let (mut is_jfif, mut has_rgb_mark) = (false, false); // APP0; Adobe's APP14, "no transform"
    let mut frame = None;
    let mut rest = bytes.get(2..)?; // after the start-of-image marker
    loop {
        rest = rest.get(rest.iter().position(|&b| b == 0xff)?..)?;
        // A marker may have several 0xff before its code.
        let (&marker, after) = rest.get(rest.iter().position(|&b| b != 0xff)?..)?.split_first()?;
        rest = after;
        if matches!(marker, 0x00 | 0x01 | 0xd0..=0xd8) {
            continue; // has no segment
        }
        let length = usize::from(u16::from_be_bytes([*rest.first()?, *rest.get(1)?]));
        let segment = rest.get(2..length)?;
        rest = rest.get(length..)?;
        match marker {
            0xc0..=0xc2 => frame = Some((marker == 0xc2, segment)),
            // Lossless, which jpeg-decoder reads; hierarchical and arithmetic, for which it has the better error.
            0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => return Some(JpegLayout::Odd { is_rgb: false }),
            0xe0 => is_jfif |= segment.starts_with(b"JFIF\0"),
            0xee if segment.starts_with(b"Adobe") => has_rgb_mark = segment.get(11) == Some(&0),
            0xd9 => return None,
            0xda => {
                let (is_progressive, frame) = frame?;
                let num_components = *frame.get(5)?;
                let components = frame.get(6..6 + 3 * usize::from(num_components))?;
                let factors = || components.chunks_exact(3).map(|c| (c[1] >> 4, c[1] & 15));
                // One scan for each component: rows of blocks are put in the wrong place, the last ones lost.
                let has_whole_scan = is_progressive || *segment.first()? == num_components;
                // The first component's rows get the width that its own factor gives, too little if another's is
                // larger. A grey image has one component and its factors mean nothing.
                let (first_width, first_height) = factors().next()?;
                let is_first_finest = factors().all(|(w, h)| w <= first_width && h <= first_height);
                let is_power_of_two = factors().all(|(w, _)| matches!(w, 1 | 2 | 4));
                let is_usual = has_whole_scan && is_first_finest && is_power_of_two;
                let is_mixed = has_two_and_four(factors().map(|f| f.0)) || has_two_and_four(factors().map(|f| f.1));
                if !is_usual && is_mixed {
                    return Some(JpegLayout::Unread);
                }
                let is_rgb = num_components == 3 && has_rgb_mark && !is_jfif;
                return Some(if is_usual { JpegLayout::Usual } else { JpegLayout::Odd { is_rgb } });
            }
            _ => {}
        }
    }
}

fn has_two_and_four(factors: impl Iterator<Item = u8>) -> bool {
    let (has_two, has_four) = factors.fold((false, false), |(two, four), f| (two | (f == 2), four | (f == 4)));
    has_two && has_four
}
