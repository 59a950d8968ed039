//! `maskinv data check`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use super::open;
use crate::cli::model::HubArgs;
use crate::cli::progress::Progress;
use crate::cli::{print, print_json, tell};
use crate::data::{Dataset, Findings, LandmarkAlignment, check, read_landmarks, rows_without_images};

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
    /// Print all findings as JSON
    #[arg(long)]
    json: bool,
}

impl CheckArgs {
    pub(super) fn run(self, hub: &HubArgs) -> Result<()> {
        let source = open(&self.data, hub)?;
        let images = source.images.as_ref();
        let landmarks = self.landmarks_of(images)?;
        let mut progress = Progress::new();
        let findings = check(images, |done| progress.count("check", "images checked", done, images.len()));
        let mut warnings = findings.warnings();
        warnings.extend(landmarks.iter().flat_map(|found| found.warnings(findings.mean_face.as_ref())));
        if self.json {
            print_json(&serde_json::json!({
                "path": source.path,
                "findings": findings,
                "landmarks": landmarks,
                "warnings": warnings,
            }))?;
        } else {
            print(&describe(&findings, landmarks.as_ref()))?;
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
