//! `maskinv verify`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use super::device::{DeviceArgs, Work};
use super::model::HubArgs;
use super::photos::{PhotoArgs, WhichArgs, describe, read_crop, record, summary};
use super::threads::ThreadsArgs;
use super::{print, print_json, tell};
use crate::eval::{EmbedConfig, dot, embed};
use crate::models::Threshold;

/// Arguments of `maskinv verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// Checkpoint (safetensors, .pth, ONNX or MXNet .params), folder of a trained arm (runs/NAME/ARM), or, with the
    /// feature hub, hf://owner/repo/file or a short name of `download --list`
    #[arg(value_name = "MODEL")]
    model: String,
    /// First face, a photo or an aligned crop
    #[arg(value_name = "IMAGE")]
    a: PathBuf,
    /// Second face, a photo or an aligned crop
    #[arg(value_name = "IMAGE")]
    b: PathBuf,
    /// Use the model's threshold for this false match rate, a fraction such as 0.001 [default: its lowest rate]
    #[arg(long, value_name = "RATE", conflicts_with = "threshold")]
    fmr: Option<f64>,
    /// Lowest cosine that counts as a match, -1 to 1, overriding the model's thresholds; without either, only the
    /// cosine is printed
    #[arg(long, value_name = "COSINE", allow_negative_numbers = true, value_parser = cosine)]
    threshold: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    which: WhichArgs,
    #[command(flatten)]
    photos: PhotoArgs,
    #[command(flatten)]
    threads: ThreadsArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    hub: HubArgs,
}

fn cosine(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|v| (-1.0..=1.0).contains(v));
    value.ok_or_else(|| "expected a number from -1 to 1".to_owned())
}

impl VerifyArgs {
    /// Compares the two faces and prints the score and, if there is a threshold, the decision.
    ///
    /// # Errors
    /// When the model or an image cannot be read, or the model has no threshold for the rate.
    pub fn run(self) -> Result<()> {
        self.threads.start()?;
        let machine = self.device.open(Work::Inference)?;
        let mut model = self.device.place(self.hub.load_with_notes(&self.model)?.model, &machine);
        // On a GPU, the precision may be another.
        if let Some(note) = model.drop_stale_thresholds()? {
            tell(format_args!("{}: {note}", self.model));
        }
        let measured = self.measured(model.thresholds())?;
        let images = [&self.a, &self.b];
        let cropper = self.photos.cropper(self.which.which, model.config().input_size, &self.hub)?;
        let crops = images.map(|path| read_crop(&cropper, path));
        let [a, b] = crops;
        let crops = [a?, b?];
        for (path, crop) in images.iter().zip(&crops).filter(|(_, crop)| crop.face.is_some()) {
            tell(format_args!("{}: {}", path.display(), describe(crop)));
        }
        let image = |i: usize| Ok(crops[i].image.clone());
        let embeddings = embed(&model, images.len(), image, EmbedConfig::default(), |_| {})?;
        let score = dot(&embeddings[0], &embeddings[1]);
        let threshold = self.threshold.or(measured.map(|t| t.threshold));
        let (now, described) = (summary(&cropper), |photos: &Option<String>| match photos {
            Some(how) => format!("photos with {how}"),
            None => "aligned crops".to_owned(),
        });
        if let Some(measured) = measured.filter(|measured| measured.photos != now) {
            let [before, now] = [&measured.photos, &now].map(described);
            tell(format_args!("the threshold was measured on {before}, and these are {now}: its rates may be others"));
        }
        let is_match = threshold.map(|threshold| score >= threshold);
        if self.json {
            return print_json(&serde_json::json!({
                "score": score,
                "threshold": threshold,
                "is_match": is_match,
                "measured": measured,
                "faces": crops.each_ref().map(record),
            }));
        }
        let decision = match is_match {
            Some(true) => "same person",
            Some(false) => "different people",
            None => "no threshold: see maskinv calibrate, or pass --threshold",
        };
        let by = match (self.threshold, measured) {
            (Some(threshold), _) => format!(", at --threshold {threshold}"),
            (None, Some(measured)) => format!(", at threshold {measured}"),
            (None, None) => String::new(),
        };
        print(&format!("cosine {score:.4}: {decision}{by}"))
    }

    /// Returns the model's threshold to use: that of `--fmr`, or the strictest; none with `--threshold`.
    fn measured<'a>(&self, thresholds: &'a [Threshold]) -> Result<Option<&'a Threshold>> {
        if self.threshold.is_some() {
            return Ok(None);
        }
        let Some(fmr) = self.fmr else { return Ok(thresholds.iter().min_by(|a, b| a.fmr.total_cmp(&b.fmr))) };
        let found = thresholds.iter().find(|t| (t.fmr - fmr).abs() <= 1e-9 * fmr);
        if found.is_none() {
            let rates: Vec<String> = thresholds.iter().map(|t| t.fmr.to_string()).collect();
            let rates = if rates.is_empty() { "none".to_owned() } else { format!("those for {}", rates.join(", ")) };
            bail!("{}: expected a threshold for FMR {fmr}, found {rates}; see maskinv calibrate", self.model);
        }
        Ok(found)
    }
}
