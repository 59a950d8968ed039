//! Photos of every layout decode to what other readers see.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::{DynamicImage, ImageEncoder, RgbImage};
use maskinv::data::read_image;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/jpeg")
}

/// libjpeg's default decoding smooths chroma that is half as wide, in other roundings than ours.
const MEAN: f64 = 1.0;
const LARGEST: u8 = 4;

#[test]
fn jpegs_of_every_layout_are_those_of_libjpeg_or_refused() -> Result<()> {
    let expected: serde_json::Value = serde_json::from_slice(&std::fs::read(fixtures().join("expected.json"))?)?;
    let (mut read, mut refused) = (0, Vec::new());
    for (name, pixels) in expected.as_object().context("names")? {
        let path = fixtures().join(name).with_extension("jpg");
        let found = match read_image(&path) {
            Ok(found) => found,
            Err(error) => {
                refused.push(format!("{name}: {error}"));
                continue;
            }
        };
        let expected = fixtures().join("expected").join(pixels["fancy"].as_str().context("decoded, not by libjpeg")?);
        let expected = image::open(expected)?.into_rgb8();
        assert_eq!(found.dimensions(), expected.dimensions(), "{name}");
        let off: Vec<u8> = found.as_raw().iter().zip(expected.as_raw()).map(|(a, b)| a.abs_diff(*b)).collect();
        let mean = off.iter().map(|&off| f64::from(off)).sum::<f64>() / off.len() as f64;
        let largest = off.into_iter().max().context("pixels")?;
        assert!(mean <= MEAN && largest <= LARGEST, "{name}: off by {mean:.1} on average, {largest} at most");
        read += 1;
    }
    // Arithmetic coding and 12 bits; 2 beside 4 in one direction.
    assert_eq!((read, refused.len()), (47, 4), "{refused:#?}");
    for (name, what) in [
        ("arithmetic_420", "ArithmeticEntropyCoding"),
        ("arithmetic_progressive_420", "ArithmeticEntropyCoding"),
        ("precision_12", "12 bits"),
        ("separate_4x2_2x1_1x2", "sampling factors of 2 beside 4"),
    ] {
        assert!(refused.iter().any(|error| error.starts_with(name) && error.contains(what)), "{name}: {refused:#?}");
    }
    Ok(())
}

#[test]
fn cut_jpegs_of_odd_layouts_are_errors() -> Result<()> {
    let root = tempfile::tempdir()?;
    let path = root.path().join("cut.jpg");
    for name in ["separate_420", "baseline_sample_chroma_high", "progressive_sample_chroma_high"] {
        let bytes = std::fs::read(fixtures().join(name).with_extension("jpg"))?;
        for len in 0..bytes.len() - 1 {
            std::fs::write(&path, &bytes[..len])?;
            assert!(read_image(&path).is_err(), "{name} of {len} bytes");
        }
    }
    Ok(())
}

/// EXIF data that says nothing but the orientation: in numbers of two bytes, or for the odd ones of four or one, as
/// some cameras write it; the least significant byte first, or last for every third.
fn exif(orientation: u8) -> Vec<u8> {
    let kind = [8, 4, 3, 9, 3, 1, 3, 4, 8][usize::from(orientation)];
    if orientation.is_multiple_of(3) {
        let value = if matches!(kind, 3 | 8) { [0, orientation, 0, 0] } else { [0, 0, 0, orientation] };
        let head = [b'M', b'M', 0, 42, 0, 0, 0, 8, 0, 1, 1, 0x12, 0, kind, 0, 0, 0, 1];
        assert!(!matches!(kind, 1 | 6), "one byte comes first in either order");
        return [&head[..], &value, &[0; 4]].concat();
    }
    let head = [b'I', b'I', 42, 0, 8, 0, 0, 0, 1, 0, 0x12, 1, kind, 0, 1, 0, 0, 0];
    [&head[..], &[orientation, 0, 0, 0], &[0; 4]].concat()
}

/// The picture as a file of each format whose EXIF data says that it is to be turned.
fn turned(picture: &RgbImage, orientation: u8) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let (width, height) = picture.dimensions();
    let kind = image::ExtendedColorType::Rgb8;
    let mut files = vec![("jpg", Vec::new()), ("png", Vec::new()), ("webp", Vec::new())];
    let mut jpeg = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut files[0].1, 100);
    jpeg.set_exif_metadata(exif(orientation))?;
    jpeg.write_image(picture, width, height, kind)?;
    let mut png = image::codecs::png::PngEncoder::new(&mut files[1].1);
    png.set_exif_metadata(exif(orientation))?;
    png.write_image(picture, width, height, kind)?;
    let mut webp = image::codecs::webp::WebPEncoder::new_lossless(&mut files[2].1);
    webp.set_exif_metadata(exif(orientation))?;
    webp.write_image(picture, width, height, kind)?;
    Ok(files)
}

#[test]
fn pictures_are_turned_as_their_exif_data_says() -> Result<()> {
    let root = tempfile::tempdir()?;
    let picture = RgbImage::from_fn(24, 16, |x, y| image::Rgb([10 * x as u8, 10 * y as u8, 90]));
    let plain = DynamicImage::ImageRgb8(picture.clone());
    let upright = [
        plain.clone(),
        plain.fliph(),
        plain.rotate180(),
        plain.flipv(),
        plain.rotate90().fliph(),
        plain.rotate90(),
        plain.rotate270().fliph(),
        plain.rotate270(),
    ];
    for (orientation, expected) in (1..).zip(upright) {
        for (extension, bytes) in turned(&picture, orientation)? {
            let path = root.path().join("turned").with_extension(extension);
            std::fs::write(&path, bytes)?;
            let found = read_image(&path)?;
            assert_eq!(found.dimensions(), (expected.width(), expected.height()), "{extension} {orientation}");
            let near = |(a, b): (&u8, &u8)| a.abs_diff(*b) <= 12;
            let is_same = found.as_raw().iter().zip(expected.to_rgb8().as_raw()).all(near);
            assert!(is_same, "{extension} {orientation}");
        }
    }
    Ok(())
}

#[test]
fn grey_transparent_and_deep_pictures_are_read() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let grey = DynamicImage::ImageRgb8(RgbImage::from_fn(40, 30, |x, y| image::Rgb([(4 * x + y) as u8; 3])));
    let path = folder.path().join("picture.png");
    for picture in [
        DynamicImage::ImageLuma8(grey.to_luma8()),
        DynamicImage::ImageLumaA8(grey.to_luma_alpha8()),
        DynamicImage::ImageRgba8(grey.to_rgba8()),
        DynamicImage::ImageLuma16(grey.to_luma16()),
        DynamicImage::ImageRgb16(grey.to_rgb16()),
        DynamicImage::ImageRgba16(grey.to_rgba16()),
    ] {
        picture.save(&path)?;
        assert_eq!(read_image(&path)?, grey.to_rgb8(), "{:?}", picture.color());
    }
    Ok(())
}

#[test]
fn formats_that_are_not_read_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("picture.jpg");
    for (bytes, name) in [
        (&b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"[..], "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "AVIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp41", "a video"),
        (b"GIF89a\x01\0\x01\0", "GIF"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"%PDF-1.7", "PDF"),
        (b"hello, this is text", "an unknown format"),
        (b"", "an empty file"),
    ] {
        std::fs::write(&path, bytes)?;
        let error = read_image(&path).unwrap_err().to_string();
        assert!(error.contains("expected JPEG, PNG, WebP, BMP or PNM, found ") && error.contains(name), "{error}");
    }
    Ok(())
}
