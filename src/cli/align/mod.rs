//! `maskinv align`.

mod lists;
mod work;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use sha2::{Digest, Sha256};

use self::lists::lists;
use self::work::{Done, JOURNAL, Work};
use super::model::HubArgs;
use super::photos::PhotoArgs;
use super::progress::Progress;
use super::threads::ThreadsArgs;
use super::{count_of, interrupt, list_images, print, print_json, tell, tell_if_anew};
use crate::data::{Export, check_records, open_source, output_format, write_records, write_shards};
use crate::error::Error;
use crate::face::{Cropper, Which};
use crate::files::{UnfinishedFolder, hex, is_inside, write_atomic};

/// Crops, in the new folder.
const IMAGES: &str = "images";
/// Boxes, points and scores, in the new folder.
const FACES: &str = "faces.csv";
/// What has no crop, in the new folder.
const LEFT_OUT: &str = "left_out.csv";
/// Lists of LFW that are copied.
const LISTS: [&str; 2] = ["people.txt", "pairs.txt"];
/// Extensions of files that are not written.
const OTHER_TARGETS: [&str; 9] = ["tar", "parquet", "zip", "tgz", "gz", "npy", "csv", "bin", "onnx"];
/// Images in a shard of WebDataset.
const SHARD_SIZE: usize = 10_000;

/// Arguments of `maskinv align`.
#[derive(Args, Debug)]
pub struct AlignArgs {
    /// Folder of photos (searched recursively), or a photo
    #[arg(value_name = "PHOTOS")]
    input: PathBuf,
    /// New folder: images/ with the crops under the photos' names, faces.csv with boxes, points and scores,
    /// left_out.csv with the photos that have no crop; or a new .rec file, or shards by --to, with these lists beside
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Output format [default: from the extension of OUT]
    #[arg(long, value_enum)]
    to: Option<Target>,
    /// Side of the crops in pixels, 32 to 512
    #[arg(long, value_name = "PIXELS", default_value_t = 112, value_parser = clap::value_parser!(u16).range(32..=512))]
    size: u16,
    /// Format of the crops; JPEG at quality 95
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = CropFormat::Jpg)]
    format: CropFormat,
    /// The faces to take of a photo with several
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Faces::Largest)]
    face: Faces,
    #[command(flatten)]
    photos: PhotoArgs,
    #[command(flatten)]
    threads: ThreadsArgs,
    /// Use only cached files of the Hugging Face hub; same as HF_HUB_OFFLINE=1
    #[arg(long)]
    offline: bool,
    /// Print the counts as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// A folder with images/ in the photos' folders
    Folder,
    /// MXNet's RecordIO in insightface's layout: .rec, .idx, .lst and property
    Recordio,
    /// Tar files with labels in .cls files
    Webdataset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum CropFormat {
    Jpg,
    Png,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Faces {
    /// The largest
    Largest,
    /// The one nearest to the middle
    Central,
    /// The one with the highest score
    Surest,
    /// The only one; photos with several are left out
    Only,
    /// Each in a crop of its own, NAME_1, NAME_2, ..., the surest first
    All,
}

impl AlignArgs {
    /// Aligns the faces of the photos and writes the crops.
    ///
    /// # Errors
    /// When no photo is there, none has a face, two crops would have one name, or the output exists or cannot be
    /// written.
    pub fn run(self) -> Result<()> {
        let target = self.target()?;
        if self.output.symlink_metadata().is_ok() {
            bail!("{}: exists already", self.output.display());
        }
        let root = self.root();
        let inputs = list_images(&root)?;
        if root.is_dir() && is_inside(&self.output, &root) {
            bail!("{}: expected a place outside of {}", self.output.display(), root.display());
        }
        let names = self.names(&root, &inputs)?;
        if target != Target::Folder {
            self.check_set(target, &names)?;
        }
        self.threads.start()?;
        let cropper = self.photos.cropper(self.which(), self.size.into(), &HubArgs::of_data(self.offline))?;
        let stop = interrupt::flag()?;
        // Records and shards are made of a folder of crops, which has a name of its own.
        let folder = match target {
            Target::Folder => self.output.clone(),
            Target::Recordio | Target::Webdataset => {
                let mut name = self.output.clone().into_os_string();
                name.push(".crops");
                name.into()
            }
        };
        let unfinished = UnfinishedFolder::open(&folder, &self.key(&inputs, &cropper)?)?;
        tell_if_anew(&unfinished);
        let work = Work { args: &self, inputs: &inputs, names: &names, folder: unfinished.path(), cropper: &cropper };
        let done = match work.run(&stop) {
            Ok(done) => done,
            Err(error) if error.downcast_ref::<Error>().is_some_and(Error::is_interruption) => {
                return Err(unfinished.interrupted().into());
            }
            Err(error) => {
                unfinished.discard();
                return Err(error);
            }
        };
        let num_crops: usize = done.iter().map(|photo| photo.crops.len()).sum();
        if num_crops == 0 {
            let first = done.iter().find_map(|photo| photo.left_out.clone()).unwrap_or_default();
            unfinished.discard();
            let what = format!("none of {} photos has a crop, the first: {first}", inputs.len());
            return Err(match done.iter().any(|photo| photo.lacks_face) {
                true => Error::Face { path: root, what }.into(),
                false => Error::Image { path: root, what }.into(),
            });
        }
        self.finish(target, unfinished, &root, &inputs, &done, &stop)?;
        self.tell(&inputs, &done, num_crops)
    }

    fn target(&self) -> Result<Target> {
        let has = |extension: &str| self.output.extension().is_some_and(|x| x.eq_ignore_ascii_case(extension));
        let is_rec = has("rec");
        if output_format(&self.output).is_ok() || OTHER_TARGETS.into_iter().any(has) {
            bail!(
                "{}: expected a new folder or NAME.rec; shards are a folder too (--to webdataset)",
                self.output.display()
            );
        }
        match (self.to, is_rec) {
            (None | Some(Target::Recordio), true) => Ok(Target::Recordio),
            (Some(Target::Recordio), false) => bail!("{}: expected NAME.rec", self.output.display()),
            (Some(_), true) => bail!("{}: the extension does not match --to", self.output.display()),
            (to, false) => Ok(to.unwrap_or(Target::Folder)),
        }
    }

    /// Checks what records and shards need, before any photo is searched.
    fn check_set(&self, target: Target, names: &[String]) -> Result<()> {
        if self.size != 112 {
            bail!("--size {}: records and shards are data sets, whose crops have 112x112 pixels", self.size);
        }
        if let Some(name) = names.iter().find(|name| name.split('/').count() != 2) {
            bail!(
                "{}: expected photos as PERSON/IMAGE, from which the people of {} follow, found {name}",
                self.input.display(),
                self.output.display()
            );
        }
        if target == Target::Recordio {
            check_records(&self.output)?;
        }
        let beside = |name: &str| self.output.with_extension(name);
        let others = ["idx", "lst", FACES, LEFT_OUT].map(beside);
        match others.iter().find(|path| path.exists()) {
            Some(path) => bail!("{}: exists already", path.display()),
            None => Ok(()),
        }
    }

    fn which(&self) -> Which {
        match self.face {
            Faces::Largest | Faces::All => Which::Largest,
            Faces::Central => Which::Central,
            Faces::Surest => Which::Surest,
            Faces::Only => Which::Only,
        }
    }

    /// Returns the folder of the photos: that of a data set is its `images/`, beside lists.
    fn root(&self) -> PathBuf {
        let images = self.input.join(IMAGES);
        if images.is_dir() { images } else { self.input.clone() }
    }

    /// Returns the name of each photo's crop, without its extension.
    fn names(&self, root: &Path, inputs: &[PathBuf]) -> Result<Vec<String>> {
        let mut names = Vec::with_capacity(inputs.len());
        let mut inputs_of = BTreeMap::new();
        for input in inputs {
            let inside = if root.is_dir() {
                input.strip_prefix(root)?
            } else {
                Path::new(input.file_name().unwrap_or_default())
            };
            let name = inside.with_extension("");
            let name =
                name.to_str().with_context(|| format!("{}: expected a name in UTF-8", input.display()))?.to_owned();
            if let Some(other) = inputs_of.insert(name.clone(), input) {
                let [a, b] = [other, input].map(|path| path.display());
                bail!("{a} and {b} would both be written to {name}.{}", self.extension());
            }
            names.push(name);
        }
        Ok(names)
    }

    fn extension(&self) -> &'static str {
        match self.format {
            CropFormat::Jpg => "jpg",
            CropFormat::Png => "png",
        }
    }

    /// Describes what is aligned and how: an interrupted command goes on only if nothing of it has changed.
    fn key(&self, inputs: &[PathBuf], cropper: &Cropper) -> Result<String> {
        let mut hasher = Sha256::new();
        for path in inputs {
            let data = std::fs::metadata(path).with_context(|| path.display().to_string())?;
            let modified = data.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
            hasher.update(format!("{}\0{}\0{modified:?}\0", path.display(), data.len()));
        }
        let photos = hex(&hasher.finalize());
        let (version, format, face) = (env!("CARGO_PKG_VERSION"), self.format, self.face);
        let detector = self.photos.detector_key();
        Ok(format!("maskinv {version}: align {photos} {format:?} {face:?} {detector} {:?}", cropper.config()))
    }

    /// Gives the crops and their lists their places.
    fn finish(
        &self,
        target: Target,
        unfinished: UnfinishedFolder,
        root: &Path,
        inputs: &[PathBuf],
        done: &[Done],
        stop: &Arc<AtomicBool>,
    ) -> Result<()> {
        let (faces, left_out) = lists(root, inputs, done)?;
        let beside = |name: &str| self.output.with_extension(name);
        let places = match target {
            Target::Folder => [unfinished.path().join(FACES), unfinished.path().join(LEFT_OUT)],
            Target::Recordio => [beside(FACES), beside(LEFT_OUT)],
            Target::Webdataset => [self.output.join(FACES), self.output.join(LEFT_OUT)],
        };
        let write = || -> Result<()> {
            write_atomic(&places[0], &faces)?;
            Ok(write_atomic(&places[1], &left_out)?)
        };
        if target == Target::Folder {
            write()?;
            // A pair that has lost an image, or has got two, would be an error of every evaluation.
            let is_whole = self.face != Faces::All && done.iter().all(|photo| photo.left_out.is_none());
            let lists =
                LISTS.iter().filter(|_| is_whole).map(|name| (self.input.join(name), unfinished.path().join(name)));
            for (from, to) in lists.filter(|(from, _)| root != self.input && from.is_file()) {
                write_atomic(&to, &std::fs::read(&from).with_context(|| from.display().to_string())?)?;
            }
            std::fs::remove_file(unfinished.path().join(JOURNAL))?;
            return Ok(unfinished.finish()?);
        }
        let source = open_source(&unfinished.path().join(IMAGES))?;
        let mut progress = Progress::new();
        let mut on = |written| progress.count("write", "images written", written, source.images.len());
        let mut export = Export::new(source.images.as_ref(), &mut on).stopped_by(stop);
        let written = match target {
            Target::Recordio => write_records(&mut export, &self.output),
            _ => write_shards(&mut export, &self.output, SHARD_SIZE),
        };
        match written {
            Err(error) if error.is_interruption() => return Err(unfinished.interrupted().into()),
            other => other?,
        }
        write()?;
        unfinished.discard();
        Ok(())
    }

    /// Says what was done.
    fn tell(&self, inputs: &[PathBuf], done: &[Done], num_crops: usize) -> Result<()> {
        let left_out: Vec<&Done> = done.iter().filter(|photo| photo.left_out.is_some()).collect();
        let num_without = left_out.iter().filter(|photo| photo.num_faces == 0).count();
        let num_several = done.iter().filter(|photo| photo.num_faces > 1).count();
        if self.json {
            return print_json(&serde_json::json!({
                "photos": inputs.len(),
                "crops": num_crops,
                "left_out": left_out.len(),
                "several_faces": num_several,
                "out": self.output.display().to_string(),
            }));
        }
        let several = if num_several > 0 { format!(", {num_several} with several faces") } else { String::new() };
        let (photos, crops) = (count_of(inputs.len(), "photo"), count_of(num_crops, "crop"));
        print(&format!("{photos}{several}: {crops} in {}", self.output.display()))?;
        let num_as_they_are = done.iter().flat_map(|photo| &photo.crops).filter(|(_, found)| found.is_none()).count();
        if num_as_they_are > 0 {
            let size = self.size;
            tell(format_args!(
                "{num_as_they_are} images of {size}x{size} pixels are taken as crops; --detect searches them too"
            ));
        }
        if !left_out.is_empty() {
            tell(format_args!(
                "{} left out, {num_without} without a face or unreadable: {LEFT_OUT} says why",
                count_of(left_out.len(), "photo")
            ));
            if LISTS.iter().any(|name| self.input.join(name).is_file()) {
                tell(format_args!(
                    "{} are not copied: pairs of those photos could not be compared",
                    LISTS.join(" and ")
                ));
            }
        }
        Ok(())
    }
}
