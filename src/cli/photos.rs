//! Flags for photos: the face detector, and which images are photos.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use super::model::HubArgs;
use super::tell;
use crate::data::{Dataset, read_image};
use crate::error::Error;
use crate::face::{Crop, CropConfig, CropCounts, Cropper, DetectConfig, Detector, Face, ImageKind, Photos, Which};
use crate::weights::{ModelRef, manifest};

/// The detector where none is named.
const DEFAULT_DETECTOR: &str = "yunet";

/// Flags for photos.
#[derive(Args, Clone, Debug)]
pub(super) struct PhotoArgs {
    /// Face detector for photos: YuNet's or SCRFD's ONNX file, or, with the feature hub, a short name of `download
    /// --list` or hf://owner/repo/file [default: yunet, if `maskinv download yunet` has fetched it]
    #[arg(help_heading = "Photos", long, value_name = "FILE")]
    detector: Option<String>,
    /// Take every image as an aligned crop [default: square images of the network's input size and of 112x112]
    #[arg(help_heading = "Photos", long, conflicts_with = "detect")]
    aligned: bool,
    /// Take every image as a photo, square ones too
    #[arg(help_heading = "Photos", long)]
    detect: bool,
    /// Least score of a face, 0 to 1
    #[arg(help_heading = "Photos", long, value_name = "SCORE", default_value_t = DetectConfig::default().min_score)]
    min_score: f32,
    /// Side of the smallest face to be found, in pixels of the photo; a small one takes longer [default: about a
    /// fortieth of the photo's longer side]
    #[arg(help_heading = "Photos", long, value_name = "PIXELS")]
    min_face: Option<f32>,
}

/// The flag for the face that is meant.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct WhichArgs {
    /// The face to take of a photo with several
    #[arg(help_heading = "Photos", long, value_enum, value_name = "WHICH", default_value_t = WhichFace::Largest)]
    face: WhichFace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WhichFace {
    /// The largest
    Largest,
    /// The one nearest to the middle
    Central,
    /// The one with the highest score
    Surest,
    /// The only one; several are an error
    Only,
}

impl WhichArgs {
    /// The face that is meant.
    pub(super) fn which(self) -> Which {
        match self.face {
            WhichFace::Largest => Which::Largest,
            WhichFace::Central => Which::Central,
            WhichFace::Surest => Which::Surest,
            WhichFace::Only => Which::Only,
        }
    }
}

impl PhotoArgs {
    /// Describes the detector, for commands that go on after an interruption: its name, and the length and time of its file.
    pub(super) fn detector_key(&self) -> String {
        let name = self.detector.as_deref().unwrap_or(DEFAULT_DETECTOR);
        let data = std::fs::metadata(name).ok();
        format!("{name} {:?} {:?}", data.as_ref().map(|data| data.len()), data.and_then(|data| data.modified().ok()))
    }

    /// Returns what makes crops of `side` pixels.
    ///
    /// # Errors
    /// When a setting is out of range, or the named detector cannot be opened.
    pub(super) fn cropper(&self, which: Which, side: usize, hub: &HubArgs) -> Result<Arc<Cropper>> {
        let kind = match (self.aligned, self.detect) {
            (true, _) => ImageKind::Crops,
            (_, true) => ImageKind::Photos,
            _ => ImageKind::BySize,
        };
        let (min_score, min_face) = (self.min_score, self.min_face);
        let detect = DetectConfig { min_score, min_face, ..DetectConfig::default() };
        detect.validate()?;
        let config = CropConfig { kind, which, detect, side: side as u32 };
        let cached = hub.clone();
        let cropper = Cropper::new(config, move || cached_detector(&cached));
        // What is wrong with a detector that is named is said before any photo is read.
        let cropper = match &self.detector {
            Some(name) => cropper.with_detector(open_detector(name, hub)?),
            None => cropper,
        };
        Ok(Arc::new(cropper))
    }
}

/// Opens the detector of a name.
pub(super) fn open_detector(name: &str, hub: &HubArgs) -> Result<Detector> {
    let open = || -> Result<Detector> {
        let file = hub.fetch(&ModelRef::parse(name)?)?;
        let path = file.path().context("expected a face detector, found a network for faces")?;
        Ok(Detector::open(path)?)
    };
    open().with_context(|| format!("--detector {name}: expected YuNet or SCRFD as ONNX"))
}

/// Opens the detector that was downloaded earlier.
fn cached_detector(hub: &HubArgs) -> crate::Result<Detector> {
    let entry = manifest::find_detector(DEFAULT_DETECTOR).expect("the manifest has it: a test looks for it");
    let cached = hub.cached(&ModelRef::Detector(entry));
    let missing = || {
        let fetch = match cfg!(feature = "hub") {
            true => format!("`maskinv download {DEFAULT_DETECTOR}` fetches one"),
            false => format!("`maskinv download {DEFAULT_DETECTOR}` fetches one in a build with the feature hub"),
        };
        Error::Detection(format!("photos need a face detector: {fetch}, or name a file (--detector)"))
    };
    Detector::open(cached.as_ref().and_then(|file| file.path()).ok_or_else(missing)?)
}

/// Reads an image and crops the face that is meant.
pub(super) fn read_crop(cropper: &Cropper, path: &Path) -> crate::Result<Crop> {
    cropper.crop(read_image(path)?, path)
}

/// Describes the face that was taken of a photo.
pub(super) fn describe(crop: &Crop) -> String {
    let Some(face) = &crop.face else { return "an aligned crop".to_owned() };
    let of = if crop.num_faces > 1 { format!("one of {} faces, ", crop.num_faces) } else { String::new() };
    format!("{of}{}", describe_face(face))
}

/// Describes a face: its size, place and score.
pub(super) fn describe_face(Face { bounds: [x0, y0, x1, y1], score, .. }: &Face) -> String {
    format!("{:.0}x{:.0} pixels at {x0:.0},{y0:.0}, score {score:.2}", x1 - x0, y1 - y0)
}

/// Returns what was found in an image, for machines; null for an aligned crop.
pub(super) fn record(crop: &Crop) -> serde_json::Value {
    let face = |face: &Face| {
        let Face { bounds, landmarks, score } = face;
        serde_json::json!({ "bounds": bounds, "landmarks": landmarks, "score": score, "num_faces": crop.num_faces })
    };
    crop.face.as_ref().map_or(serde_json::Value::Null, face)
}

/// Returns how faces were found in photos, for a report; null if there was no photo.
pub(super) fn provenance(cropper: &Cropper) -> serde_json::Value {
    let CropCounts { crops, photos, several } = cropper.counts();
    let (Some(detector), 1..) = (cropper.opened(), photos + several) else { return serde_json::Value::Null };
    let CropConfig { kind, which, detect, side } = cropper.config();
    serde_json::json!({
        "detector": detector.path().display().to_string(),
        "detector_sha256": detector.sha256(),
        "images": format!("{kind:?}").to_lowercase(),
        "face": format!("{which:?}").to_lowercase(),
        "min_score": detect.min_score,
        "min_face": detect.min_face,
        "side": side,
        "num_crops": crops,
        "num_photos": photos + several,
        "num_photos_with_several_faces": several,
    })
}

/// Says how many images were crops and photos, if any was a photo.
pub(super) fn tell_counts(counts: CropCounts) {
    let CropCounts { crops, photos, several } = counts;
    if photos + several > 0 {
        let taken = if several > 0 { format!(", {several} of them with several faces") } else { String::new() };
        let beside = if crops > 0 { format!("; {crops} aligned crops") } else { String::new() };
        tell(format_args!("{} photos{taken}{beside}", photos + several));
    }
}

/// Returns the images of a set as crops of the face that is meant. Those that are `used` are searched, and counted on
/// stderr.
///
/// # Errors
/// When an image that is used has no face or cannot be read.
pub(super) fn in_photos(
    images: &Arc<dyn Dataset>,
    used: &[usize],
    cropper: &Arc<Cropper>,
    progress: impl FnMut(usize) + Send,
) -> Result<Arc<dyn Dataset>> {
    let photos = Photos::new(images.clone(), cropper.clone());
    photos.search(used, progress)?;
    tell_counts(cropper.counts());
    Ok(Arc::new(photos))
}
