//! Flags for photos: the face detector, and which images are photos.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;

use super::model::HubArgs;
use super::{count_of, tell};
use crate::data::{Dataset, read_image};
use crate::error::Error;
use crate::face::{Crop, CropConfig, CropCounts, Cropper, DetectConfig, Detector, Face, ImageKind, Photos, Which};
use crate::weights::{ModelRef, manifest};

/// The detector where none is named.
const DEFAULT_DETECTOR: &str = "yunet";

/// Most images that an error names.
const NAMED: usize = 5;

/// Flags for photos.
#[derive(Args, Clone, Debug)]
pub(super) struct PhotoArgs {
    /// Face detector for photos: YuNet's or SCRFD's ONNX file, or, with the feature hub, a short name of `download
    /// --list` or hf://owner/repo/file [default: yunet, if `maskinv download yunet` has fetched it]
    #[arg(help_heading = "Photos", long, value_name = "FILE")]
    detector: Option<String>,
    /// Take every image as an aligned crop [default: square images of 112x112 pixels, and of the side of the crops that
    /// are made]
    #[arg(help_heading = "Photos", long, conflicts_with = "detect")]
    aligned: bool,
    /// Take every image as a photo, square ones too
    #[arg(help_heading = "Photos", long)]
    detect: bool,
    /// Least score of a face, 0 to 1
    #[arg(help_heading = "Photos", long, value_name = "SCORE", default_value_t = DetectConfig::default().min_score,
        value_parser = score)]
    min_score: f32,
    /// Look for faces down to this side, in pixels of the photo, in tiles, which takes longer; larger ones are found in
    /// any case [default: down to about a fortieth of the photo's longer side]
    #[arg(help_heading = "Photos", long, value_name = "PIXELS", value_parser = pixels)]
    min_face: Option<f32>,
}

/// Reads a score given as a flag.
fn score(text: &str) -> std::result::Result<f32, String> {
    let value = text.parse().ok().filter(|v| (0.0..=1.0).contains(v));
    value.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

/// Reads a side in pixels given as a flag.
fn pixels(text: &str) -> std::result::Result<f32, String> {
    let value = text.parse().ok().filter(|v: &f32| v.is_finite() && *v > 0.0);
    value.ok_or_else(|| "expected a number above 0".to_owned())
}

/// The flag for the face that is meant.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct WhichArgs {
    /// The face to take of a photo with several
    #[arg(help_heading = "Photos", long = "face", value_enum, value_name = "WHICH", default_value_t = Which::Largest)]
    pub which: Which,
}

/// What becomes of images that cannot be used.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct UnusableArgs {
    /// Leave out images that cannot be read or have no face, and list them, instead of stopping
    #[arg(help_heading = "Photos", long)]
    skip_unusable: bool,
}

impl UnusableArgs {
    /// Whether such images are left out.
    pub(super) fn are_left_out(self) -> bool {
        self.skip_unusable
    }

    /// Lists the unusable ones of `num_images` images.
    ///
    /// # Errors
    /// When they may not be left out, or no other image is left.
    pub(super) fn tell(self, unusable: Vec<(usize, Error)>, num_images: usize) -> Result<()> {
        if unusable.is_empty() {
            return Ok(());
        }
        if !self.skip_unusable || unusable.len() == num_images {
            return Err(refusal(unusable, num_images).into());
        }
        unusable.iter().for_each(|(_, error)| tell(format_args!("left out: {error}")));
        tell(format_args!("{} of {num_images} images left out", unusable.len()));
        Ok(())
    }
}

/// Returns one error for all unusable images.
fn refusal(mut unusable: Vec<(usize, Error)>, num_images: usize) -> Error {
    // Whether a face is lacking, and the exit code with it, is what the first says.
    unusable.sort_by_key(|(image, error)| (matches!(error, Error::Face { .. }), *image));
    if unusable.len() == 1 {
        return unusable.remove(0).1;
    }
    let more = if unusable.len() > NAMED { ", ..." } else { "" };
    let named: Vec<String> = unusable.iter().take(NAMED).map(|(_, error)| error.to_string()).collect();
    let path = PathBuf::from("images");
    let what = format!("{} of {num_images} cannot be used: {}{more}", unusable.len(), named.join(", "));
    match unusable[0].1 {
        Error::Face { .. } => Error::Face { path, what },
        _ => Error::Image { path, what },
    }
}

impl PhotoArgs {
    /// Returns a flag that was given, for commands whose images are cropped otherwise.
    pub(super) fn first_given(&self) -> Option<&'static str> {
        let default = DetectConfig::default();
        let flags = [
            ("--detector", self.detector.is_some()),
            ("--aligned", self.aligned),
            ("--detect", self.detect),
            ("--min-score", self.min_score != default.min_score),
            ("--min-face", self.min_face.is_some()),
        ];
        flags.into_iter().find_map(|(flag, is_given)| is_given.then_some(flag))
    }

    /// Describes the detector, for commands that go on after an interruption: its name, and the length and time of its
    /// file.
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
            true => format!("`maskinv download {DEFAULT_DETECTOR}` fetches one, or name a file (--detector)"),
            false => {
                format!("name a file (--detector), such as {} of https://huggingface.co/{}", entry.file, entry.repo)
            }
        };
        Error::Detection(format!("photos need a face detector: {fetch}"))
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
        "images": match kind {
            ImageKind::BySize => "by-size",
            ImageKind::Crops => "crops",
            ImageKind::Photos => "photos",
        },
        "face": format!("{which:?}").to_lowercase(),
        // As it was written: the nearest f32 has more digits.
        "min_score": detect.min_score.to_string().parse::<f64>().unwrap_or_default(),
        "min_face": detect.min_face,
        "side": side,
        "num_crops": crops,
        "num_photos": photos + several,
        "num_photos_with_several_faces": several,
    })
}

/// Says how faces were found in photos, for a threshold; none if there was no photo.
pub(super) fn summary(cropper: &Cropper) -> Option<String> {
    let CropCounts { photos, several, .. } = cropper.counts();
    let detector = cropper.opened().filter(|_| photos + several > 0)?;
    let CropConfig { which, detect, .. } = cropper.config();
    let (which, name) = (format!("{which:?}").to_lowercase(), detector.sha256().unwrap_or("of unknown SHA-256"));
    Some(format!("the {which} face by detector {name}, score {} or more", detect.min_score))
}

/// Says how many images were crops and photos, if any was a photo.
pub(super) fn tell_counts(counts: CropCounts) {
    let CropCounts { crops, photos, several } = counts;
    if photos + several > 0 {
        let taken = if several > 0 { format!(", {several} of them with several faces") } else { String::new() };
        let beside = if crops > 0 { format!("; {}", count_of(crops, "aligned crop")) } else { String::new() };
        tell(format_args!("{}{taken}{beside}", count_of(photos + several, "photo")));
    }
}

/// A set's images as crops of the face that is meant.
pub(super) struct Cropped {
    pub images: Arc<dyn Dataset>,
    /// The images that are used and can be, ascending.
    pub usable: Vec<usize>,
    /// The images that are used and cannot be, ascending.
    pub unusable: Vec<usize>,
}

/// Returns the images of a set as crops of the face that is meant. Those that are `used`, in ascending order, are
/// searched; `progress` receives the number of images done.
///
/// # Errors
/// When an image has no face or cannot be read, and may not be left out, or none is left.
pub(super) fn in_photos(
    images: &Arc<dyn Dataset>,
    used: &[usize],
    cropper: &Arc<Cropper>,
    args: UnusableArgs,
    progress: impl FnMut(usize) + Send,
) -> Result<Cropped> {
    let photos = Photos::new(images.clone(), cropper.clone());
    let failures = photos.search(used, progress)?;
    let unusable: Vec<usize> = failures.iter().map(|(image, _)| *image).collect();
    args.tell(failures, used.len())?;
    tell_counts(cropper.counts());
    let usable = used.iter().copied().filter(|image| unusable.binary_search(image).is_err()).collect();
    Ok(Cropped { images: Arc::new(photos), usable, unusable })
}
