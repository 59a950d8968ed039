//! Finds the faces of photos and writes each one aligned, as face recognition takes them: PHOTO-1.png, PHOTO-2.png, ...
//! with the surest face first, and the photo with boxes and landmarks, PHOTO-faces.png. Prints the photo, score, box
//! and landmarks of each, separated by tabs.
//!
//! ```text
//! cargo run --release --example align -- face_detection_yunet_2023mar.onnx OUT photo.jpg...
//! ```
//!
//! With `--as-it-is` before the photos they are searched once, at their own size; with `--once`, once at no more than
//! 640 pixels.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::{Rgb, RgbImage};
use maskinv::data::{align_face, read_image};
use maskinv::face::{DetectConfig, Detector, Face};

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let usage = "usage: align DETECTOR.onnx OUT PHOTO...";
    let detector = Detector::open(&args.next().filter(|arg| arg.as_os_str() != "--help").context(usage)?)?;
    let out = args.next().context(usage)?;
    let mut config = DetectConfig::default();
    std::fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    for photo in args {
        match photo.to_str() {
            Some("--as-it-is") => config = DetectConfig::AS_IT_IS,
            Some("--once") => config = DetectConfig { longer_side: Some(640), ..DetectConfig::AS_IT_IS },
            _ => write_faces(&detector, &config, &photo, &out).with_context(|| photo.display().to_string())?,
        }
    }
    Ok(())
}

fn write_faces(detector: &Detector, config: &DetectConfig, photo: &Path, out: &Path) -> Result<()> {
    let (mut image, name) = (read_image(photo)?, photo.file_stem().context("a photo has a name")?.to_string_lossy());
    let faces = detector.detect(&image, config)?;
    for (i, face) in faces.iter().enumerate() {
        let numbers = face.bounds.iter().chain(face.points()?.as_flattened()).map(|x| format!("{x:.2}"));
        println!("{}\t{:.4}\t{}", photo.display(), face.score, numbers.collect::<Vec<_>>().join("\t"));
        align_face(&image, face.points()?)?.save(out.join(format!("{name}-{}.png", i + 1)))?;
    }
    faces.iter().for_each(|face| draw(&mut image, face));
    Ok(image.save(out.join(format!("{name}-faces.png")))?)
}

/// Draws the box and the landmarks of a face.
fn draw(photo: &mut RgbImage, face: &Face) {
    let mut dot = |x: f32, y: f32, half: i64, colour: [u8; 3]| {
        for (dx, dy) in (-half..=half).flat_map(|dx| (-half..=half).map(move |dy| (dx, dy))) {
            let at = [x.round() as i64 + dx, y.round() as i64 + dy].map(|v| u32::try_from(v).ok());
            let [Some(x), Some(y)] = at else { continue };
            if let Some(pixel) = photo.get_pixel_mut_checked(x, y) {
                *pixel = Rgb(colour);
            }
        }
    };
    let [left, top, right, bottom] = face.bounds;
    for i in 0..=(right - left).max(bottom - top).clamp(0.0, 10_000.0) as u32 {
        let (x, y) = ((left + i as f32).min(right), (top + i as f32).min(bottom));
        [(x, top), (x, bottom), (left, y), (right, y)].iter().for_each(|&(x, y)| dot(x, y, 1, [0, 160, 70]));
    }
    face.landmarks.iter().flatten().for_each(|&[x, y]| dot(x, y, 2, [210, 30, 60]));
}
