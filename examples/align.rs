//! Finds the faces of photos and writes each one aligned, as face recognition takes them: PHOTO-1.png, PHOTO-2.png, ...
//! with the surest face first. Prints the photo, score, box and landmarks of each, separated by tabs.
//!
//! ```text
//! cargo run --release --example align -- face_detection_yunet_2023mar.onnx OUT photo.jpg...
//! ```
//!
//! With `--as-it-is` before the photos they are searched once, at their own size; with `--once`, once at no more than 640
//! pixels.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use maskinv::data::{align_face, read_image};
use maskinv::face::{DetectConfig, Detector};

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let usage = "usage: align DETECTOR.onnx OUT PHOTO...";
    let detector = Detector::open(&args.next().context(usage)?)?;
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
    let (image, name) = (read_image(photo)?, photo.file_stem().context("a photo has a name")?.to_string_lossy());
    for (i, face) in detector.detect(&image, config)?.iter().enumerate() {
        let numbers = face.bounds.iter().chain(face.points()?.as_flattened()).map(|x| format!("{x:.2}"));
        println!("{}\t{:.4}\t{}", photo.display(), face.score, numbers.collect::<Vec<_>>().join("\t"));
        align_face(&image, face.points()?)?.save(out.join(format!("{name}-{}.png", i + 1)))?;
    }
    Ok(())
}
