//! `maskinv mask`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use clap::Args;
use image::{RgbImage, imageops};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::model::HubArgs;
use super::photos::{PhotoArgs, UnusableArgs};
use super::progress::Progress;
use super::threads::ThreadsArgs;
use super::{count_of, interrupt, list_images, tell, tell_if_anew};
use crate::data::mask::{MaskColour, MaskConfig, MaskKind, MaskMix, MaskProtocol, Masker, TemplateShift};
use crate::data::{ALIGNED_LANDMARKS, FACE_SIZE, Landmarks, mask_landmarks, output_format, read_image, write_image};
use crate::error::Error;
use crate::face::{Crop, Cropper, Which};
use crate::files::{NewFolders, StagedFolder, UnfinishedFolder, folder_of, hex, is_inside, sha256};
use crate::parallel;

/// Maximum number of faces on a contact sheet.
const SHEET_ROWS: usize = 12;

/// Size in pixels of the published template, to which the default points belong.
const PUBLISHED_TEMPLATE_SIZE: (u32, u32) = (1627, 1085);

/// Arguments of `maskinv mask`.
#[derive(Args, Debug)]
pub struct MaskArgs {
    /// Aligned 112x112 crop or photo, on all faces of which masks are drawn, or folder of them (searched recursively)
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Output image, or output folder in which images keep their names
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Kinds of mask, separated by commas, of which each face gets one at random: surgical, cloth, ffp2, low_worn,
    /// high_worn, patterned, respirator, gaiter [default: all]
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = parse_name::<MaskKind>)]
    kind: Vec<MaskKind>,
    /// Colours, separated by commas, of which each face gets one at random: white, light_blue, blue, navy, green, black,
    /// grey, pink, red, yellow, purple, brown [default: all]
    #[arg(long, value_name = "COLOUR", value_delimiter = ',', value_parser = parse_name::<MaskColour>)]
    colour: Vec<MaskColour>,
    /// How often kinds and colours are drawn: worn, as often as people wear them; or equal
    #[arg(long, value_name = "MIX", default_value = "worn", value_parser = parse_name::<MaskMix>)]
    mix: MaskMix,
    /// Draw masks as the published code does, from this RGBA image of a mask, with its errors: on aligned crops the
    /// mask sits 8 px too far left, and colours overflow modulo 256; not with --kind, --colour or --mix
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kind", "colour", "mix"])]
    reference: Option<PathBuf>,
    /// Landmarks of the template, ten numbers as in --landmarks; needed unless it is the published one
    #[arg(long, value_name = "POINTS", value_delimiter = ',', num_args = 1, requires = "reference")]
    template_points: Vec<f32>,
    /// Landmarks of the face instead of a detector's, ten numbers x1,y1,..,x5,y5 in pixels: left eye, right eye, nose,
    /// left and right corner of the mouth, with left and right as seen in the image
    #[arg(long, value_name = "POINTS", value_delimiter = ',', num_args = 1, allow_hyphen_values = true)]
    landmarks: Vec<f32>,
    /// Random seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Write a single picture instead: the largest faces of up to 12 images, each without a mask and with every kind
    #[arg(long, conflicts_with = "landmarks")]
    sheet: bool,
    #[command(flatten)]
    photos: PhotoArgs,
    #[command(flatten)]
    unusable: UnusableArgs,
    #[command(flatten)]
    threads: ThreadsArgs,
    /// Use only cached files of the Hugging Face hub; same as HF_HUB_OFFLINE=1
    #[arg(long)]
    offline: bool,
}

/// How masks are drawn.
struct Drawing {
    masker: Masker,
    protocol: MaskProtocol,
    cropper: Arc<Cropper>,
    /// Faces with a mask so far.
    num_faces: AtomicUsize,
}

/// An image to mask.
struct Job<'a> {
    /// Its place among the inputs, which determines its random numbers.
    number: usize,
    input: &'a Path,
    output: PathBuf,
}

fn parse_name<T: serde::de::DeserializeOwned>(name: &str) -> std::result::Result<T, String> {
    serde_json::from_value(serde_json::Value::String(name.to_owned())).map_err(|e| e.to_string())
}

impl MaskArgs {
    /// Draws the masks and writes the images.
    ///
    /// # Errors
    /// When an image or the template is missing or broken, or the output exists or cannot be written.
    pub fn run(self) -> Result<()> {
        self.threads.start()?;
        if self.input.is_dir() && !self.landmarks.is_empty() {
            bail!("--landmarks applies to one image, but {} is a folder", self.input.display());
        }
        if !self.landmarks.is_empty() {
            parse_points("--landmarks", &self.landmarks)?;
        }
        let is_folder = self.input.is_dir() && !self.sheet;
        if is_folder {
            self.check_folders()?;
        }
        if !is_folder {
            // What is wrong with the output is said before any image is read.
            output_format(&self.output)?;
            if self.output.exists() {
                bail!("{}: exists already", self.output.display());
            }
        }
        let config = self.config()?;
        let inputs = list_images(&self.input)?;
        if self.sheet {
            return self.write_sheet(&inputs, config);
        }
        let masker = Masker::new(&config)?;
        let num_faces = AtomicUsize::new(0);
        let drawing = Drawing { masker, protocol: config.protocol, cropper: self.cropper()?, num_faces };
        let mut num_left_out = 0;
        if !is_folder {
            let image = self.masked(&inputs[0], 0, &drawing)?;
            save(&image, &self.output)?;
        } else if self.output.exists() {
            // Beside other files: the images get their places once all are complete.
            if let Some(there) = self.jobs(&inputs, &self.output)?.iter().find(|job| job.output.exists()) {
                bail!("{}: exists already", there.output.display());
            }
            let staged = StagedFolder::new(&self.output)?;
            num_left_out = self.mask_all(&self.jobs(&inputs, staged.path())?, &drawing)?;
            staged.finish()?;
        } else {
            let key = self.key(&inputs, &config, &drawing.cropper)?;
            self.jobs(&inputs, &self.output)?;
            let unfinished = UnfinishedFolder::open(&self.output, &key)?;
            tell_if_anew(&unfinished);
            let jobs = self.jobs(&inputs, unfinished.path())?;
            match self.mask_all(&jobs, &drawing) {
                Ok(num) => num_left_out = num,
                Err(error) if error.downcast_ref::<Error>().is_some_and(Error::is_interruption) => {
                    return Err(unfinished.interrupted().into());
                }
                Err(error) => {
                    unfinished.discard();
                    return Err(error);
                }
            }
            unfinished.finish()?;
        }
        let num_faces = drawing.num_faces.load(Ordering::Relaxed);
        let masked = count_of(inputs.len() - num_left_out, "image");
        tell(format_args!("{masked} masked, {}", count_of(num_faces, "face")));
        Ok(())
    }

    /// Checks that the output is no picture, and does not lie among the input's people.
    fn check_folders(&self) -> Result<()> {
        let out = self.output.display();
        if !self.output.exists() && output_format(&self.output).is_ok() {
            bail!("{out}: expected a folder, for {} is one; --sheet writes one picture", self.input.display());
        }
        if is_inside(&self.output, &self.input) {
            bail!("{out}: expected a folder outside of {}, whose images are masked", self.input.display());
        }
        Ok(())
    }

    /// Describes what is masked and how: an interrupted command goes on only if nothing of it has changed.
    fn key(&self, inputs: &[PathBuf], config: &MaskConfig, cropper: &Cropper) -> Result<String> {
        let mut hasher = Sha256::new();
        let digests = parallel::try_map(inputs.len(), |i| sha256(&inputs[i]))?;
        for (path, digest) in inputs.iter().zip(digests) {
            hasher.update(path.strip_prefix(&self.input)?.as_os_str().as_encoded_bytes());
            hasher.update([0]);
            hasher.update(digest);
        }
        let (version, seed, images) = (env!("CARGO_PKG_VERSION"), self.seed, hex(&hasher.finalize()));
        let (detector, crops) = (self.photos.detector_key(), cropper.config());
        Ok(format!("maskinv {version}: mask images {images} with seed {seed}, {config:?}, {detector}, {crops:?}"))
    }

    /// Returns what is to be written to a folder.
    fn jobs<'a>(&self, inputs: &'a [PathBuf], folder: &Path) -> Result<Vec<Job<'a>>> {
        let mut inputs_of = BTreeMap::new();
        let mut jobs = Vec::with_capacity(inputs.len());
        for (number, input) in inputs.iter().enumerate() {
            let name = input.strip_prefix(&self.input)?;
            // Its own format, or PNG for what is not written.
            let output = match output_format(name) {
                Ok(_) => folder.join(name),
                Err(_) => folder.join(name).with_extension("png"),
            };
            if let Some(other) = inputs_of.insert(output.clone(), input) {
                let [a, b] = [other, input].map(|path| path.display());
                bail!("{a} and {b} would both be written to one file, {}", output.display());
            }
            jobs.push(Job { number, input, output });
        }
        Ok(jobs)
    }

    /// Masks images whose outputs are not there yet; returns the number of those that are left out.
    fn mask_all(&self, jobs: &[Job], drawing: &Drawing) -> Result<usize> {
        let stop = interrupt::flag()?;
        let mut progress = Progress::new();
        let mut unusable = Vec::new();
        for job in jobs {
            if stop.load(Ordering::Relaxed) {
                return Err(crate::Error::io(&self.output)(std::io::ErrorKind::Interrupted.into()).into());
            }
            if !job.output.exists() {
                match self.masked(job.input, job.number, drawing) {
                    Ok(image) => save(&image, &job.output)?,
                    Err(error) => match error.downcast::<Error>()? {
                        error if error.is_of_image() && self.unusable.are_left_out() => {
                            unusable.push((job.number, error));
                        }
                        error => return Err(error.into()),
                    },
                }
            }
            progress.count("mask", "images masked", job.number + 1, jobs.len());
        }
        let num = unusable.len();
        self.unusable.tell(unusable, jobs.len())?;
        Ok(num)
    }

    /// Reads image `number` of the inputs and draws a mask onto each face.
    fn masked(&self, path: &Path, number: usize, drawing: &Drawing) -> Result<RgbImage> {
        let mut image = read_image(path)?;
        let faces = self.landmarks_of(path, &image, drawing)?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(number as u64);
        let (num_faces, mut failures) = (faces.len(), Vec::new());
        for landmarks in faces {
            failures.extend(drawing.masker.apply(&mut image, &landmarks, &mut rng).err());
        }
        drawing.num_faces.fetch_add(num_faces - failures.len(), Ordering::Relaxed);
        // A face in profile takes no mask, which is no reason to leave out the others of a photo.
        match (failures.len(), failures.pop()) {
            (num, Some(error)) if num == num_faces => {
                Err(Error::Image { path: path.to_owned(), what: error.to_string() }.into())
            }
            (num, Some(error)) => {
                tell(format_args!("{}: {num} of {num_faces} faces without a mask: {error}", path.display()));
                Ok(image)
            }
            _ => Ok(image),
        }
    }

    /// Returns what finds the faces of photos; masks need no choice among them.
    fn cropper(&self) -> Result<Arc<Cropper>> {
        self.photos.cropper(Which::Largest, FACE_SIZE as usize, &HubArgs::of_data(self.offline))
    }

    fn config(&self) -> Result<MaskConfig> {
        let mut config = MaskConfig { mix: self.mix, ..MaskConfig::default() };
        if !self.kind.is_empty() {
            config.kinds.clone_from(&self.kind);
        }
        if !self.colour.is_empty() {
            config.colours.clone_from(&self.colour);
        }
        if let Some(template) = &self.reference {
            config.protocol = MaskProtocol::Reference;
            config.template = Some(template.clone());
            config.template_shift = TemplateShift::None;
            if !self.template_points.is_empty() {
                config.template_points = parse_points("--template-points", &self.template_points)?;
            } else if read_image(template).is_ok_and(|image| image.dimensions() != PUBLISHED_TEMPLATE_SIZE) {
                bail!("{}: not the published template, so --template-points is required", template.display());
            }
        }
        Ok(config)
    }

    /// Returns the landmarks of each face in an image, at least one.
    fn landmarks_of(&self, path: &Path, image: &RgbImage, drawing: &Drawing) -> Result<Vec<Landmarks>> {
        if !self.landmarks.is_empty() {
            let points = parse_points("--landmarks", &self.landmarks)?;
            let (w, h) = image.dimensions();
            let is_inside = |[x, y]: &[f32; 2]| (0.0..w as f32).contains(x) && (0.0..h as f32).contains(y);
            if let Some([x, y]) = points.iter().find(|point| !is_inside(point)) {
                bail!("--landmarks: expected points inside {}, {w}x{h} pixels, found {x},{y}", path.display());
            }
            return Ok(vec![points]);
        }
        let Drawing { cropper, protocol, .. } = drawing;
        if cropper.is_crop(image, path)? {
            return Ok(vec![mask_landmarks(*protocol, &ALIGNED_LANDMARKS)]);
        }
        let faces = cropper.faces(image, path)?;
        if faces.is_empty() {
            return Err(cropper.no_face(path).into());
        }
        // Where faces overlap, the nearer one is drawn last: the larger.
        let mut faces = faces.iter().map(|face| face.points().copied()).collect::<crate::Result<Vec<_>>>()?;
        let eyes = |[a, b, ..]: &Landmarks| (a[0] - b[0]).hypot(a[1] - b[1]);
        faces.sort_by(|a, b| eyes(a).total_cmp(&eyes(b)));
        Ok(faces)
    }

    fn write_sheet(&self, inputs: &[PathBuf], base: MaskConfig) -> Result<()> {
        let protocol = base.protocol;
        // One masker per column; the reference protocol has a single kind.
        let columns: Vec<MaskConfig> = match protocol {
            MaskProtocol::Reference => vec![base],
            MaskProtocol::Corrected => {
                base.kinds.iter().map(|&kind| MaskConfig { kinds: vec![kind], ..base.clone() }).collect()
            }
        };
        let maskers = columns.iter().map(Masker::new).collect::<crate::Result<Vec<_>>>()?;
        // Rows are spread over the folder, so that they are not all of the first identity.
        let step = inputs.len().div_ceil(SHEET_ROWS).max(1);
        let (cropper, mut rows, mut unusable) = (self.cropper()?, Vec::new(), Vec::new());
        for (number, path) in inputs.iter().enumerate().step_by(step) {
            match read_image(path).and_then(|image| cropper.crop(image, path)) {
                Ok(crop) => rows.push((path, crop)),
                Err(error) if error.is_of_image() => unusable.push((number, error)),
                Err(error) => return Err(error.into()),
            }
        }
        self.unusable.tell(unusable, inputs.len().div_ceil(step))?;
        let mut sheet = RgbImage::new(FACE_SIZE * (1 + maskers.len() as u32), FACE_SIZE * rows.len() as u32);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let num_rows = rows.len();
        for (row, (path, Crop { image, landmarks, .. })) in rows.into_iter().enumerate() {
            let landmarks = mask_landmarks(protocol, &landmarks);
            let y = i64::from(FACE_SIZE) * row as i64;
            imageops::replace(&mut sheet, &image, 0, y);
            for (column, masker) in maskers.iter().enumerate() {
                let mut image = image.clone();
                masker.apply(&mut image, &landmarks, &mut rng).with_context(|| path.display().to_string())?;
                imageops::replace(&mut sheet, &image, i64::from(FACE_SIZE) * (1 + column as i64), y);
            }
        }
        save(&sheet, &self.output)?;
        tell(format_args!(
            "{} of {} in {}",
            count_of(num_rows, "face"),
            count_of(inputs.len(), "image"),
            self.output.display()
        ));
        Ok(())
    }
}

fn parse_points(flag: &str, numbers: &[f32]) -> Result<Landmarks> {
    let points: Vec<[f32; 2]> = numbers.chunks_exact(2).map(|p| [p[0], p[1]]).collect();
    match Landmarks::try_from(points) {
        Ok(points) if numbers.len() == 10 => Ok(points),
        _ => bail!("{flag}: expected 10 numbers, found {}", numbers.len()),
    }
}

/// Writes a new image in the format of its extension.
fn save(image: &RgbImage, path: &Path) -> Result<()> {
    if path.exists() {
        bail!("{}: exists already", path.display());
    }
    // Removed again if the image cannot be written.
    let _created = NewFolders::create(folder_of(path))?;
    write_image(image, path).map_err(Into::into)
}
