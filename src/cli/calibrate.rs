//! `maskinv calibrate`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use candle_core::DType;
use clap::Args;

use super::device::Work;
use super::model::HubArgs;
use super::model_file::ModelFile;
use super::photos::{Cropped, PhotoArgs, UnusableArgs, WhichArgs, in_photos, summary};
use super::print;
use super::progress::Progress;
use super::settings::SettingsArgs;
use crate::cli::tell;
use crate::data::{FACE_SIZE, TestSet};
use crate::eval::{Scores, Setting, compare};
use crate::models::Threshold;
use crate::train::Event;

/// Arguments of `maskinv calibrate`.
#[derive(Args, Debug)]
pub struct CalibrateArgs {
    /// Checkpoint (safetensors, .pth, ONNX or MXNet .params), folder of a trained arm (runs/NAME/ARM), or, with the
    /// feature hub, hf://owner/repo/file or a short name of `download --list`
    #[arg(value_name = "MODEL")]
    model: String,
    /// New .safetensors or .onnx file: the model with the new thresholds, which replace any it had
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// False match rate to choose a threshold for, a fraction such as 0.001; may be repeated
    #[arg(long, value_name = "RATE", default_values_t = [1e-3], value_parser = super::rate)]
    fmr: Vec<f64>,
    /// Who wears a mask in the calibration pairs
    #[arg(long, value_enum, default_value_t = Worn::UM)]
    setting: Worn,
    #[command(flatten)]
    which: WhichArgs,
    #[command(flatten)]
    photos: PhotoArgs,
    #[command(flatten)]
    unusable: UnusableArgs,
    #[command(flatten)]
    settings: SettingsArgs,
    #[command(flatten)]
    hub: HubArgs,
    /// List of image pairs from --data, in LFW's or MFR2's format or with two image files and 1 or 0 in a line, or a
    /// verification file (.bin)
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Worn {
    /// Nobody
    #[value(name = "U-U", alias = "u-u")]
    UU,
    /// The second image, the probe
    #[value(name = "U-M", alias = "u-m")]
    UM,
    /// The first image, the reference
    #[value(name = "M-U", alias = "m-u")]
    MU,
    /// Both images
    #[value(name = "M-M", alias = "m-m")]
    MM,
}

impl CalibrateArgs {
    /// Scores the pairs, chooses the thresholds, writes the model with them and prints them.
    ///
    /// # Errors
    /// When the model or the pairs cannot be read, there are too few pairs for a rate, or the output exists.
    pub fn run(self) -> Result<()> {
        let file = ModelFile::new(&self.output)?;
        self.settings.threads.start()?;
        let machine = self.settings.device.open(Work::Inference)?;
        let model = self.settings.device.place(self.hub.load_with_notes(&self.model)?.model, &machine);
        file.check(&model)?;
        let mut config = self.settings.chosen_or_beside(&self.model)?;
        if let Some(pairs) = &self.pairs {
            config.data.pairs = Some(pairs.clone());
        }
        self.settings.apply(&mut config, &self.hub)?;
        let test = config.data.open_test()?;
        // Said now rather than after every image went through the network.
        let num_impostor = test.pairs.iter().filter(|pair| !pair.is_same).count();
        if let Some(fmr) = self.fmr.iter().find(|&&fmr| 1.0 / num_impostor as f64 > fmr) {
            bail!(
                "--fmr {fmr}: expected at least {:.0} impostor pairs to measure it, found {num_impostor} in {}",
                (1.0 / fmr).ceil(),
                test.description
            );
        }
        let mut progress = Progress::new();
        let cropper = self.photos.cropper(self.which.which, FACE_SIZE as usize, &self.hub)?;
        let used = test.used_images();
        let count = |done| progress.count("crop", "images read", done, used.len());
        let Cropped { images, unusable, .. } = in_photos(&test.images, &used, &cropper, self.unusable, count)?;
        let test = TestSet { images, ..test }.without(&unusable)?;
        let on = |done, total| progress.show(Event::Embedded { done, total });
        let scores = compare(&model, &test, &config.eval, on)?;
        let setting = match self.setting {
            Worn::UU => Setting::UU,
            Worn::UM => Setting::UM,
            Worn::MU => Setting::MU,
            Worn::MM => Setting::MM,
        };
        let comparisons = &scores[&setting];
        if comparisons.is_constant() {
            bail!("{}: all pairs have one score: the network gives every image the same embedding", self.model);
        }
        let scores = Scores::from_labelled(comparisons.scores(), comparisons.is_same())?;
        // Keep the data's local path out of the model: only its last component stays.
        let measured_on = match config.data.root.as_deref().and_then(|root| Some((root, root.file_name()?))) {
            Some((root, name)) => test.description.replace(&root.display().to_string(), &name.to_string_lossy()),
            None => test.description.clone(),
        };
        let computed_with = model.computed_with()?;
        let choose = |&fmr: &f64| {
            let threshold = scores.threshold_at_fmr(fmr).context("--fmr")?;
            Ok(Threshold {
                fmr,
                threshold,
                fnmr: scores.fnmr_at_threshold(threshold),
                setting: setting.name().to_owned(),
                num_impostor: scores.impostor().len(),
                num_genuine: scores.genuine().len(),
                measured_on: measured_on.clone(),
                photos: summary(&cropper),
                computed_with: Some(computed_with.clone()),
            })
        };
        let mut thresholds = self.fmr.iter().map(choose).collect::<Result<Vec<_>>>()?;
        thresholds.sort_by(|a, b| b.fmr.total_cmp(&a.fmr));
        thresholds.dedup_by(|a, b| a.fmr == b.fmr);
        let model = model.with_thresholds(thresholds);
        file.write(&model, DType::F32)?;
        for threshold in model.thresholds() {
            print(&threshold.to_string())?;
        }
        tell(format_args!("{}", self.output.display()));
        Ok(())
    }
}
