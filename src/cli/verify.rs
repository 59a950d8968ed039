//! `maskinv verify`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::decision::{Decision, DecisionArgs, describe_mask};
use super::device::{DeviceArgs, Work};
use super::model::HubArgs;
use super::photos::{PhotoArgs, WhichArgs, describe, read_crop, record, summary};
use super::threads::ThreadsArgs;
use super::{print, print_json, tell};
use crate::eval::{EmbedConfig, dot, embed_with_masks};

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
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    decision: DecisionArgs,
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
        if let Some(note) = model.drop_stale()? {
            tell(format_args!("{}: {note}", self.model));
        }
        let images = [&self.a, &self.b];
        let cropper = self.photos.cropper(self.which.which, model.config().input_size, &self.hub)?;
        let crops = images.map(|path| read_crop(&cropper, path));
        let [a, b] = crops;
        let crops = [a?, b?];
        for (path, crop) in images.iter().zip(&crops).filter(|(_, crop)| crop.face.is_some()) {
            tell(format_args!("{}: {}", path.display(), describe(crop)));
        }
        let image = |i: usize| Ok(crops[i].image.clone());
        let (embeddings, masks) = embed_with_masks(&model, images.len(), image, EmbedConfig::default(), |_| {})?;
        let masks = masks.map(|masks| [masks[0], masks[1]]);
        let score = dot(&embeddings[0], &embeddings[1]);
        let decision = self.decision.choose(&self.model, model.thresholds(), masks)?;
        let (now, described) = (summary(&cropper), |photos: &Option<String>| match photos {
            Some(how) => format!("photos with {how}"),
            None => "aligned crops".to_owned(),
        });
        if let Decision::Measured(measured) = &decision
            && measured.photos != now
        {
            let [before, now] = [&measured.photos, &now].map(described);
            tell(format_args!("the threshold was measured on {before}, and these are {now}: its rates may be others"));
        }
        let is_match = decision.threshold().map(|threshold| score >= threshold);
        if self.json {
            let measured = if let Decision::Measured(measured) = &decision { Some(measured) } else { None };
            return print_json(&serde_json::json!({
                "score": score,
                "threshold": decision.threshold(),
                "is_match": is_match,
                "measured": measured,
                "faces": crops.each_ref().map(record),
                "masks": masks,
            }));
        }
        if let Some(masks) = masks {
            for (path, mask) in images.iter().zip(masks) {
                print(&format!("{}: {}", path.display(), describe_mask(mask)))?;
            }
        }
        let said = match is_match {
            Some(true) => "same person",
            Some(false) => "different people",
            None => "no threshold: see maskinv calibrate, or pass --threshold",
        };
        let by = match decision {
            Decision::Given(threshold) => format!(", at --threshold {threshold}"),
            Decision::Measured(measured) => format!(", at threshold {measured}"),
            Decision::None => String::new(),
        };
        print(&format!("cosine {score:.4}: {said}{by}"))
    }
}
