//! Writes a training's `report.html` from its records.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use image::{ImageFormat, RgbImage};

use super::results::{conclusion, tables};
use crate::cli::tell;
use crate::data::{Pixels, encode_image};
use crate::records::{read_evaluations, read_steps};
use crate::report::{ArmCurves, SampleRow, TrainingReport};
use crate::train::{Arm, ArmOutcome, Config, Experiment, Progressed, REPORT_PAGE, Run};

/// Number of sample images shown per batch.
const NUM_SAMPLES: usize = 12;

/// Writes the report of the training in `folder`, with samples of its first batch if its data can be read. Pass
/// `experiment` if the training is already open; otherwise its data set is opened from the saved settings.
pub(super) fn write(folder: &Path, experiment: Option<&Experiment>, notices: Vec<String>) -> Result<()> {
    let run = Run::read(folder)?;
    let mut arms = Vec::new();
    for (arm, progressed) in &run.arms {
        let steps = read_steps(&folder.join(arm.name()))?;
        let evaluations = read_evaluations(&folder.join(arm.name()))?;
        if steps.is_empty() && evaluations.is_empty() {
            continue;
        }
        arms.push(ArmCurves {
            name: arm.title().to_owned(),
            distills: arm.distills(),
            is_finished: matches!(progressed, Progressed::Finished(_)),
            steps,
            evaluations,
            notices: Vec::new(),
        });
    }
    if let Some(arm) = arms.first_mut() {
        arm.notices = notices;
    }
    let outcomes: BTreeMap<Arm, ArmOutcome> = run.finished().map(|(arm, outcome)| (arm, outcome.clone())).collect();
    let report = TrainingReport {
        title: folder.display().to_string(),
        provenance: provenance(&run)?,
        arms,
        samples: samples(&run.config, experiment).unwrap_or_else(|error| {
            tell(format_args!("{REPORT_PAGE}: no sample images: {error:#}"));
            Vec::new()
        }),
        tables: tables(&outcomes),
        conclusion: if outcomes.is_empty() { String::new() } else { conclusion(&outcomes, &run.paired_tests) },
    };
    Ok(report.write(folder)?)
}

/// Returns the version, commit, device and test set, and every setting that differs from its default.
fn provenance(run: &Run) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    if let Some(p) = &run.provenance {
        let pairs = [("version", &p.version), ("commit", &p.commit), ("device", &p.device), ("tested on", &p.test_set)];
        all.extend(pairs.map(|(name, what)| (name.to_owned(), what.clone())));
    }
    all.extend(run.config.entries_unlike(&Config::default())?);
    Ok(all)
}

/// Returns the first images of the first batch, as teacher and student see them.
fn samples(config: &Config, experiment: Option<&Experiment>) -> Result<Vec<SampleRow>> {
    let arm = config.train.arms.iter().find(|arm| **arm != Arm::Teacher).or(config.train.arms.first());
    let arm = *arm.context("train.arms: expected at least one")?;
    let opened;
    let experiment = match experiment {
        Some(experiment) => experiment,
        None => {
            opened = Experiment::new(config.clone())?;
            &opened
        }
    };
    let Some(batch) = experiment.loader(arm)?.epoch(0).next() else { return Ok(Vec::new()) };
    let batch = batch?;
    let row = |caption: &str, pixels: &Pixels| -> Result<SampleRow> {
        let images = pixels.values.chunks_exact((3 * pixels.size * pixels.size).max(1)).take(NUM_SAMPLES);
        let images = images.map(|rgb| png(rgb, pixels.size)).collect::<Result<_>>()?;
        Ok(SampleRow { caption: caption.to_owned(), images })
    };
    Ok(vec![row("teacher", &batch.teacher)?, row("student", &batch.student)?])
}

fn png(rgb: &[u8], size: usize) -> Result<Vec<u8>> {
    let image = RgbImage::from_raw(size as u32, size as u32, rgb.to_vec()).context("unexpected image size")?;
    encode_image(&image, ImageFormat::Png).map_err(anyhow::Error::msg)
}
