//! `maskinv data check`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use super::open;
use crate::cli::model::HubArgs;
use crate::cli::photos::open_detector;
use crate::cli::progress::Progress;
use crate::cli::{print, print_json, tell};
use crate::data::{Dataset, Findings, LandmarkAlignment, Landmarks, check, read_landmarks, rows_without_images};
use crate::face::{DetectConfig, Detector, Which};
use crate::parallel;

/// Maximum number of printed lines for each kind of finding; `--json` prints all.
const SHOWN: usize = 20;

/// Arguments of `maskinv data check`.
#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    /// Folder of people, .rec, .tar or .parquet file, or list of images
    #[arg(value_name = "DATA")]
    data: PathBuf,
    /// Landmarks in pixels of the crops, a CSV with the columns file (PERSON/IMAGE), lex, ley, rex, rey, nx, ny, lmx,
    /// lmy, rmx and rmy; without it, alignment is judged from the mean face
    #[arg(long, value_name = "CSV")]
    landmarks: Option<PathBuf>,
    /// Find the landmarks of each crop by this face detector, an ONNX file or a short name of `download --list`, and
    /// say which crops are misaligned or have no face
    #[arg(long, value_name = "FILE", conflicts_with = "landmarks")]
    detector: Option<String>,
    /// Print all findings as JSON
    #[arg(long)]
    json: bool,
}

impl CheckArgs {
    pub(super) fn run(self, hub: &HubArgs) -> Result<()> {
        let source = open(&self.data, hub)?;
        let images = source.images.as_ref();
        let (landmarks, without_face) = match &self.detector {
            Some(name) => detected(images, &open_detector(name, hub)?)?,
            None => (self.landmarks_of(images)?, Vec::new()),
        };
        let mut progress = Progress::new();
        let findings = check(images, |done| progress.count("check", "images checked", done, images.len()));
        let mut warnings = findings.warnings();
        warnings.extend(landmarks.iter().flat_map(|found| found.warnings(findings.mean_face.as_ref())));
        if !without_face.is_empty() {
            let (num, share) = (without_face.len(), 100.0 * without_face.len() as f64 / images.len() as f64);
            warnings.push(format!("{num} images ({share:.1} %) have no face that the detector finds"));
        }
        if self.json {
            print_json(&serde_json::json!({
                "path": source.path,
                "findings": findings,
                "landmarks": landmarks,
                "without_face": without_face,
                "warnings": warnings,
            }))?;
        } else {
            print(&describe(&findings, landmarks.as_ref()))?;
            without_face.iter().take(SHOWN).try_for_each(|name| print(&format!("  {name}: no face")))?;
            warnings.iter().try_for_each(|warning| print(&format!("warning: {warning}")))?;
        }
        match warnings.len() {
            0 => Ok(()),
            1 => bail!("{}: 1 warning", source.path.display()),
            num => bail!("{}: {num} warnings", source.path.display()),
        }
    }

    fn landmarks_of(&self, images: &dyn Dataset) -> Result<Option<LandmarkAlignment>> {
        let Some(path) = &self.landmarks else { return Ok(None) };
        let known = read_landmarks(path)?;
        if let Some(left_out) = rows_without_images(&known, images) {
            tell(format_args!("{}: {left_out}", path.display()));
        }
        let named = (0..images.len()).filter_map(|index| {
            let name = images.person_and_file(index)?;
            known.get(&name).map(|&points| (name, points))
        });
        match LandmarkAlignment::measure(named) {
            Some(found) => Ok(Some(found)),
            None => bail!("{}: expected rows for files PERSON/IMAGE of the data set, found none", path.display()),
        }
    }
}

/// Returns how the faces that a detector finds in crops lie to the template, and the names of crops without one. Images
/// that cannot be read are left to the check.
fn detected(images: &dyn Dataset, detector: &Detector) -> Result<(Option<LandmarkAlignment>, Vec<String>)> {
    let mut progress = Progress::new();
    let config = DetectConfig::default();
    let find = |index: usize| -> crate::Result<Option<Option<Landmarks>>> {
        let Ok(sample) = images.get(index) else { return Ok(None) };
        // The face in the middle is the crop's.
        let face = Which::Central.choose(detector.detect(&sample.image, &config)?, &sample.image);
        Ok(Some(face.map(|face| face.points().copied()).transpose()?))
    };
    let count = |num| progress.count("detect", "images searched", num, images.len());
    let found = parallel::try_map(images.len(), parallel::counted(find, count))?;
    let mut without_face = Vec::new();
    let mut named = Vec::new();
    for (index, points) in found.into_iter().enumerate() {
        match points {
            Some(Some(points)) => named.push((images.name(index), points)),
            Some(None) => without_face.push(images.name(index)),
            None => {}
        }
    }
    Ok((LandmarkAlignment::measure(named.into_iter()), without_face))
}

fn describe(findings: &Findings, landmarks: Option<&LandmarkAlignment>) -> String {
    let mut lines = vec![format!("{} images, {} broken", findings.num_images, findings.broken.len())];
    lines.extend(findings.broken.iter().take(SHOWN).map(|(_, what)| format!("  {what}")));
    if !findings.damaged.is_empty() {
        lines.push(format!("{} damaged", findings.damaged.len()));
        lines.extend(findings.damaged.iter().take(SHOWN).map(|(name, what)| format!("  {name}: {what}")));
    }
    lines.push(format!("{} copies of other images", findings.num_duplicates()));
    for group in findings.duplicates.iter().take(SHOWN) {
        let people = if group.is_across_people { "several people: " } else { "" };
        lines.push(format!("  {people}{}", group.images.join(" = ")));
    }
    if let Some(face) = &findings.mean_face {
        let (axis, eyes) = (face.axis_px, face.eyes_px);
        lines.push(format!("mean face: centred on column {axis:.1}, eyes at row {eyes:.1}"));
    }
    if let Some(found) = landmarks {
        let [left, right, nose, left_corner, right_corner] = found.mean_offset_px;
        let mean = |a: [f64; 2], b: [f64; 2]| [0.5 * (a[0] + b[0]), 0.5 * (a[1] + b[1])];
        let (eyes, mouth) = (mean(left, right), mean(left_corner, right_corner));
        let shown = |offset: [f64; 2]| format!("{:+.1}, {:+.1}", offset[0], offset[1]);
        lines.push(format!(
            "landmarks of {} images: {:.1} px from the template; mean offset (x, y): eyes {}, nose {}, mouth {}",
            found.num_images,
            found.mean_distance_px,
            shown(eyes),
            shown(nose),
            shown(mouth)
        ));
        lines.extend(found.misaligned.iter().take(SHOWN).map(|(name, px)| format!("  {name}: {px:.1} px away")));
    }
    lines.join("\n")
}
