//! `maskinv embed`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use clap::Args;

use super::device::{DeviceArgs, Work};
use super::model::HubArgs;
use super::photos::{Cropped, PhotoArgs, UnusableArgs, WhichArgs, in_photos, tell_counts};
use super::progress::Progress;
use super::threads::ThreadsArgs;
use super::{list_images, print};
use crate::data::{Dataset, ImageFiles};
use crate::eval::{EmbedConfig, Embeddings, embed, embed_with_masks};
use crate::face::Photos;
use crate::files::{check_writable, remove_if_there, write_atomic};
use crate::npy;
use crate::train::Event;

/// Arguments of `maskinv embed`.
#[derive(Args, Debug)]
pub struct EmbedArgs {
    /// Checkpoint (safetensors, .pth, ONNX or MXNet .params), folder of a trained arm (runs/NAME/ARM), or, with the
    /// feature hub, hf://owner/repo/file or a short name of `download --list`
    #[arg(value_name = "MODEL")]
    model: String,
    /// Photos or aligned crops, or folders of them (searched recursively)
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// New .npy file, f32 of shape (images, elements), with the image names in a .txt file beside it, or new .csv file
    /// [default: CSV on stdout]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Embed the image alone, without adding the embedding of its mirror image before normalisation
    #[arg(long)]
    no_flip: bool,
    /// Images per batch, 1 to 4096
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    batch_size: u16,
    #[command(flatten)]
    which: WhichArgs,
    #[command(flatten)]
    photos: PhotoArgs,
    #[command(flatten)]
    unusable: UnusableArgs,
    #[command(flatten)]
    threads: ThreadsArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    hub: HubArgs,
}

impl EmbedArgs {
    /// Embeds the images and writes the embeddings, each normalised to length 1.
    ///
    /// # Errors
    /// When the model or an image cannot be read, or the output exists or cannot be written.
    pub fn run(self) -> Result<()> {
        let destination = self.destination()?;
        self.threads.start()?;
        let machine = self.device.open(Work::Inference)?;
        let model = self.device.place(self.hub.load_with_notes(&self.model)?.model, &machine);
        let mut paths = Vec::new();
        for image in &self.images {
            paths.extend(list_images(image)?);
        }
        let has_breaks = |path: &&PathBuf| path.to_string_lossy().contains(['\n', '\r']);
        if let (Destination::Npy { list, .. }, Some(path)) = (&destination, paths.iter().find(has_breaks)) {
            bail!("{}: expected names without line breaks, found {path:?}; write a .csv", list.display());
        }
        let cropper = self.photos.cropper(self.which.which, model.config().input_size, &self.hub)?;
        let images: Arc<dyn Dataset> = Arc::new(ImageFiles::new(Path::new(""), paths));
        let all: Vec<usize> = (0..images.len()).collect();
        let mut progress = Progress::new();
        let (images, usable) = match self.unusable.are_left_out() {
            true => {
                let count = |done| progress.count("crop", "images cropped", done, all.len());
                let Cropped { images, usable, .. } = in_photos(&images, &all, &cropper, self.unusable, count)?;
                (images, usable)
            }
            // Each image is read once, just before it is embedded.
            false => (Arc::new(Photos::new(images, cropper.clone())) as Arc<dyn Dataset>, all),
        };
        let config = EmbedConfig { batch_size: self.batch_size.into(), flip: !self.no_flip, ..EmbedConfig::default() };
        let on = |done| progress.show(Event::Embedded { done, total: usable.len() });
        let image = |i: usize| Ok(images.get(usable[i])?.image);
        let (embeddings, masks) = match destination.shows_masks() {
            true => embed_with_masks(&model, usable.len(), image, config, on)?,
            false => (embed(&model, usable.len(), image, config, on)?, None),
        };
        if !self.unusable.are_left_out() {
            tell_counts(cropper.counts());
        }
        let names: Vec<String> = usable.iter().map(|&i| images.name(i)).collect();
        destination.write(&names, &embeddings, masks.as_deref())
    }

    /// Returns the output's destination, checked before any image is embedded.
    fn destination(&self) -> Result<Destination> {
        let Some(out) = self.out.clone() else { return Ok(Destination::Stdout) };
        let exists = |path: &Path| if path.exists() { bail!("{}: exists already", path.display()) } else { Ok(()) };
        exists(&out)?;
        check_writable(&out)?;
        match out.extension().and_then(|e| e.to_str()) {
            Some("csv") => Ok(Destination::Csv(out)),
            Some("npy") => {
                let list = out.with_extension("txt");
                exists(&list)?;
                Ok(Destination::Npy { out, list })
            }
            _ => bail!("{}: expected .npy or .csv", out.display()),
        }
    }
}

enum Destination {
    Stdout,
    Csv(PathBuf),
    Npy { out: PathBuf, list: PathBuf },
}

impl Destination {
    /// Whether there is a column for the scores of the model's mask head.
    fn shows_masks(&self) -> bool {
        !matches!(self, Self::Npy { .. })
    }

    fn write(&self, names: &[String], embeddings: &Embeddings, masks: Option<&[f32]>) -> Result<()> {
        match self {
            Self::Stdout => print(csv(names, embeddings, masks)?.trim_end()),
            Self::Csv(out) => Ok(write_atomic(out, csv(names, embeddings, masks)?.as_bytes())?),
            Self::Npy { out, list } => {
                let shape = [names.len(), embeddings.dim()];
                let values = embeddings.values().iter().flat_map(|v| v.to_le_bytes());
                write_atomic(out, &npy::encode("<f4", &shape, values))?;
                // Without the list the numbers are of no use.
                write_atomic(list, (names.join("\n") + "\n").as_bytes()).inspect_err(|_| {
                    let _ = remove_if_there(out);
                })?;
                Ok(())
            }
        }
    }
}

/// Formats one CSV row per image: its name, the score of the model's mask head if it has one, and its elements, which
/// parse back to the same f32.
fn csv(names: &[String], embeddings: &Embeddings, masks: Option<&[f32]>) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let elements = (0..embeddings.dim()).map(|i| format!("e{i}"));
    let mask = masks.map(|_| "mask".to_owned());
    writer.write_record(std::iter::once("image".to_owned()).chain(mask).chain(elements))?;
    for (i, name) in names.iter().enumerate() {
        let mask = masks.map(|masks| masks[i].to_string());
        let elements = embeddings[i].iter().map(f32::to_string);
        writer.write_record(std::iter::once(name.clone()).chain(mask).chain(elements))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}
