//! `maskinv quantize`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use candle_core::DType;
use clap::Args;
use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;

use super::model::HubArgs;
use super::model_file::ModelFile;
use super::photos::{Cropped, PhotoArgs, UnusableArgs, WhichArgs, in_photos};
use super::print;
use super::progress::Progress;
use super::threads::ThreadsArgs;
use crate::cli::tell;
use crate::data::FACE_SIZE;
use crate::models::{QuantiseConfig, Ranges};
use crate::parallel;
use crate::preprocessing::Pixels;
use crate::train::Config;

/// Images that go through the network together: all that its convolutions read is kept.
const BATCH: usize = 8;

/// Arguments of `maskinv quantize`.
#[derive(Args, Debug)]
pub struct QuantizeArgs {
    /// Checkpoint (safetensors, .pth, ONNX or MXNet .params), folder of a trained arm (runs/NAME/ARM), or, with the
    /// feature hub, hf://owner/repo/file or a short name of `download --list`
    #[arg(value_name = "MODEL")]
    model: String,
    /// New .safetensors file, or .onnx file with QuantizeLinear and DequantizeLinear
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Faces to take the ranges of activations from: folder of people, .rec, .tar or .parquet file, list of images, or
    /// hf://datasets/owner/name (feature hub). Take faces as the network will see them, with masks if they wear any
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Number of images, drawn from --data
    #[arg(long, value_name = "N", default_value = "512")]
    images: NonZeroUsize,
    /// How ranges are chosen: mse (the smallest mean squared error), percentile:X (X % of the values) or min-max
    #[arg(long, value_name = "HOW", default_value_t = Ranges::Mse)]
    ranges: Ranges,
    /// Layer or stage that stays in f32, such as layer1; may be repeated. The images' convolution and the fully
    /// connected layer stay in any case
    #[arg(long, value_name = "PREFIX")]
    keep: Vec<String>,
    /// Seed of the draw of images
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    which: WhichArgs,
    #[command(flatten)]
    photos: PhotoArgs,
    #[command(flatten)]
    unusable: UnusableArgs,
    #[command(flatten)]
    threads: ThreadsArgs,
    #[command(flatten)]
    hub: HubArgs,
}

impl QuantizeArgs {
    /// Quantises the model and writes it.
    ///
    /// # Errors
    /// When the model or the images cannot be read, the model cannot be quantised, or the output exists.
    pub fn run(self) -> Result<()> {
        let file = ModelFile::new(&self.output)?;
        self.threads.start()?;
        let model = self.hub.load_with_notes(&self.model)?.model;
        let mut config = Config::default();
        config.data.root = Some(self.hub.dataset(&self.data)?);
        let (images, _) = config.data.open_test_images()?;
        let num = self.images.get().min(images.len());
        if num < self.images.get() {
            tell(format_args!("{}: {num} images, all of them are used", self.data.display()));
        }
        let mut drawn = index::sample(&mut ChaCha8Rng::seed_from_u64(self.seed), images.len(), num).into_vec();
        drawn.sort_unstable();
        let mut progress = Progress::new();
        let cropper = self.photos.cropper(self.which.which, FACE_SIZE as usize, &self.hub)?;
        let count = |done| progress.count("crop", "images read", done, num);
        let Cropped { images, usable, .. } = in_photos(&images, &drawn, &cropper, self.unusable, count)?;
        let batches: Vec<&[usize]> = usable.chunks(BATCH).collect();
        if batches.is_empty() {
            bail!("{}: no image is left", self.data.display());
        }
        let name = self.data.file_name().map_or_else(|| "images".into(), |name| name.to_string_lossy());
        let settings = QuantiseConfig {
            ranges: self.ranges,
            keep: self.keep.clone(),
            calibrated_on: format!("{} faces of {name} ({})", usable.len(), self.ranges),
        };
        let mut done = 0;
        let quantised = model.quantise(batches.len(), &settings, |i| {
            let faces = parallel::try_map(batches[i].len(), |k| images.get(batches[i][k]))?;
            let mut pixels = Pixels::new(model.config().input_size);
            faces.iter().for_each(|face| pixels.push(&face.image));
            done += batches[i].len();
            progress.count("quantize", "images seen", done, 2 * usable.len());
            Ok(pixels)
        })?;
        if !model.thresholds().is_empty() || model.mask_head().is_some() {
            let what = "thresholds and mask head are dropped, they were measured in f32: calibrate the quantised model";
            tell(format_args!("{}: {what}", self.model));
        }
        file.write(&quantised, DType::F32)?;
        let facts = quantised.quantised().context("the network was quantised")?;
        print(&format!("int8: {facts}"))?;
        tell(format_args!("{}", self.output.display()));
        Ok(())
    }
}
