//! `maskinv calibrate`.

use std::path::PathBuf;
use std::sync::Arc;

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
use crate::data::{Dataset, FACE_SIZE, Subset, TestSet};
use crate::eval::{Comparisons, Scores, Setting, compare, compare_all_pairs};
use crate::models::{Arch, ComputedWith, Threshold};
use crate::train::{Config, Event, MaskHeadConfig, fit_mask_head};

/// False matches that a rate without a flag of its own should rest on.
const EXPECTED: f64 = 10.0;

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
    /// False match rate to choose thresholds for, a fraction such as 0.001; may be repeated [default: 0.1, 0.01 and so
    /// on, down to the lowest of which ten false matches are expected]
    #[arg(long, value_name = "RATE", value_parser = super::rate)]
    fmr: Vec<f64>,
    /// Who wears a mask in the calibration pairs, separated by commas: each gets thresholds of its own
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Worn::UU, Worn::UM, Worn::MM])]
    setting: Vec<Worn>,
    /// Compare all images with each other instead of the pairs of a list: many more impostor pairs, for low rates
    #[arg(long, conflicts_with = "pairs")]
    all_pairs: bool,
    /// Fit a new mask head, which says who wears a mask, on this many of the images; 0 fits none [default: 2000, if the
    /// model has none]
    #[arg(long, value_name = "N")]
    mask_head: Option<usize>,
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

impl Worn {
    fn setting(self) -> Setting {
        match self {
            Self::UU => Setting::UU,
            Self::UM => Setting::UM,
            Self::MU => Setting::MU,
            Self::MM => Setting::MM,
        }
    }
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
        let (images, test, description) = self.open(&config)?;
        let used = test.as_ref().map_or_else(|| (0..images.len()).collect(), TestSet::used_images);
        let mut progress = Progress::new();
        let cropper = self.photos.cropper(self.which.which, FACE_SIZE as usize, &self.hub)?;
        let count = |done| progress.count("crop", "images read", done, used.len());
        let Cropped { images, usable, unusable } = in_photos(&images, &used, &cropper, self.unusable, count)?;
        let faces: Arc<dyn Dataset> = Arc::new(Subset::of_images(images.clone(), &usable).context("no image is left")?);
        let test = test.map(|test| TestSet { images, ..test }.without(&unusable)).transpose()?;
        let description = test.as_ref().map_or(description, |test| test.description.clone());
        // Keep the data's local path out of the model: only its last component stays.
        let measured_on = match config.data.root.as_deref().and_then(|root| Some((root, root.file_name()?))) {
            Some((root, name)) => description.replace(&root.display().to_string(), &name.to_string_lossy()),
            None => description,
        };
        let of_head = match self.mask_head {
            None if model.mask_head().is_none() && model.config().arch != Arch::Onnx => {
                MaskHeadConfig::default().num_faces
            }
            num_faces => num_faces.unwrap_or(0),
        };
        let head = match of_head {
            0 => model.mask_head().cloned(),
            num_faces => {
                let of_head = MaskHeadConfig { num_faces, seed: config.eval.seed };
                let count = |done, total| progress.count("mask head", "faces", done, total);
                match fit_mask_head(&model, faces.as_ref(), &config.mask, &of_head, &measured_on, count) {
                    Ok(head) => {
                        print(&format!("mask head: {head}"))?;
                        Some(head)
                    }
                    Err(error) if self.mask_head.is_some() => return Err(error.into()),
                    Err(error) => {
                        tell(format_args!("{}: without a mask head: {error}", self.model));
                        None
                    }
                }
            }
        };
        let on = |done, total| progress.show(Event::Embedded { done, total });
        let (scores, measured_on) = match &test {
            None => {
                let found = compare_all_pairs(&model, faces.as_ref(), None, &config.eval, on)?;
                let scores = found.into_iter().map(|(setting, (_, comparisons))| (setting, comparisons)).collect();
                (scores, format!("all pairs of {measured_on}"))
            }
            Some(test) => (compare(&model, test, &config.eval, on)?, measured_on),
        };
        let measured = Measured {
            measured_on,
            photos: summary(&cropper),
            computed_with: model.computed_with()?,
            model: &self.model,
        };
        let mut thresholds: Vec<Threshold> = Vec::new();
        for setting in &self.setting {
            let setting = setting.setting();
            // All pairs of M-U are those of U-M.
            let comparisons = scores.get(&setting).or(scores.get(&Setting::UM).filter(|_| setting == Setting::MU));
            let comparisons = comparisons.with_context(|| format!("no pairs for --setting {}", setting.name()))?;
            thresholds.extend(measured.thresholds(setting, comparisons, &self.fmr)?);
        }
        let model = model.with_thresholds(thresholds).with_mask_head(head);
        file.write(&model, DType::F32)?;
        for threshold in model.thresholds() {
            print(&threshold.to_string())?;
        }
        tell(format_args!("{}", self.output.display()));
        Ok(())
    }
}

impl CalibrateArgs {
    /// Opens the images, the pairs unless all images are compared, and their description.
    fn open(&self, config: &Config) -> Result<(Arc<dyn Dataset>, Option<TestSet>, String)> {
        if self.all_pairs {
            let (images, source) = config.data.open_test_images()?;
            return Ok((images, None, source));
        }
        let test = config.data.open_test()?;
        // Said now rather than after every image went through the network.
        if let Some(&lowest) = self.fmr.iter().min_by(|a, b| a.total_cmp(b)) {
            check_rate(lowest, test.pairs.iter().filter(|pair| !pair.is_same).count(), &test.description)?;
        }
        let (images, description) = (test.images.clone(), test.description.clone());
        Ok((images, Some(test), description))
    }
}

/// Checks that a rate can be measured on a number of impostor pairs.
fn check_rate(fmr: f64, num_impostor: usize, description: &str) -> Result<()> {
    if 1.0 / num_impostor as f64 > fmr {
        bail!(
            "--fmr {fmr}: expected at least {:.0} impostor pairs to measure it, found {num_impostor} in {description}; \
             --all-pairs compares all images",
            (1.0 / fmr).ceil()
        );
    }
    Ok(())
}

/// How thresholds were measured.
struct Measured<'a> {
    measured_on: String,
    photos: Option<String>,
    computed_with: ComputedWith,
    model: &'a str,
}

impl Measured<'_> {
    /// Returns the thresholds of a setting, the highest rate first: for the given rates, or for the powers of ten of
    /// which ten false matches are expected.
    fn thresholds(&self, setting: Setting, comparisons: &Comparisons, rates: &[f64]) -> Result<Vec<Threshold>> {
        if comparisons.is_constant() {
            bail!("{}: all pairs have one score: the network gives every image the same embedding", self.model);
        }
        let scores = Scores::from_labelled(comparisons.scores(), comparisons.is_same())?;
        let (num_impostor, num_genuine) = (scores.impostor().len(), scores.genuine().len());
        let mut rates = rates.to_vec();
        rates.iter().try_for_each(|fmr| check_rate(*fmr, num_impostor, &self.measured_on))?;
        if rates.is_empty() {
            rates =
                (1..10).map(|k| 0.1f64.powi(k)).filter(|fmr| fmr * num_impostor as f64 >= EXPECTED - 1e-6).collect();
            // Rounded as they are written: 0.001 rather than 0.0010000000000000002.
            rates.iter_mut().for_each(|fmr| *fmr = format!("{fmr:.0e}").parse().unwrap_or(*fmr));
            if rates.is_empty() {
                bail!("{}: expected 100 impostor pairs or more, found {num_impostor}", self.measured_on);
            }
        }
        rates.sort_by(|a, b| b.total_cmp(a));
        rates.dedup();
        let of_rate = |fmr: f64| {
            let threshold = scores.threshold_at_fmr(fmr).context("--fmr")?;
            Ok(Threshold {
                fmr,
                threshold,
                fnmr: scores.fnmr_at_threshold(threshold),
                setting: setting.name().to_owned(),
                num_impostor,
                num_genuine,
                measured_on: self.measured_on.clone(),
                photos: self.photos.clone(),
                computed_with: Some(self.computed_with.clone()),
            })
        };
        rates.into_iter().map(of_rate).collect()
    }
}
