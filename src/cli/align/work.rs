//! The photos of an alignment, one after the other, with a journal of those that are done.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{AlignArgs, Faces, IMAGES};
use crate::cli::progress::Progress;
use crate::cli::tell;
use crate::data::{read_image, write_image};
use crate::error::Error;
use crate::face::{Crop, Cropper, Face};
use crate::files::{folder_of, write_atomic};
use crate::parallel;

/// Photos between two entries of the journal.
const PHOTOS_AT_ONCE: usize = 64;
/// What is known of the photos that are done, one in a line, in the unfinished folder.
pub(super) const JOURNAL: &str = ".maskinv-journal";

/// A photo that is done.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Done {
    /// Its place among the inputs.
    pub photo: usize,
    pub num_faces: usize,
    /// The crops' names and what was found; none for an image that was a crop already.
    pub crops: Vec<(String, Option<Face>)>,
    /// Why there is no crop.
    pub left_out: Option<String>,
    /// Whether that is because it has no face, or several.
    pub lacks_face: bool,
}

/// The photos and the place for their crops.
pub(super) struct Work<'a> {
    pub args: &'a AlignArgs,
    pub inputs: &'a [PathBuf],
    pub names: &'a [String],
    pub folder: &'a Path,
    pub cropper: &'a Cropper,
}

impl Work<'_> {
    /// Crops all photos that are not done yet; returns what is known of each, in their order.
    pub fn run(&self, stop: &AtomicBool) -> Result<Vec<Done>> {
        let (path, total) = (self.folder.join(JOURNAL), self.inputs.len());
        let mut done = read_journal(&path)?;
        let mut progress = Progress::new();
        if !done.is_empty() {
            tell(format_args!("going on after {} of {total} photos", done.len()));
        }
        let left: Vec<usize> = (0..total).filter(|photo| !done.contains_key(photo)).collect();
        let mut journal =
            OpenOptions::new().append(true).create(true).open(&path).with_context(|| path.display().to_string())?;
        for photos in left.chunks(PHOTOS_AT_ONCE) {
            let num_done = done.len();
            let count = |num| progress.count("align", "photos read", num_done + num, total);
            let photo = parallel::counted(|i| self.photo(photos[i]), count);
            let results =
                parallel::map(photos.len(), |i| if stop.load(Ordering::Relaxed) { None } else { Some(photo(i)) });
            // The crops are there before the journal says so.
            let mut lines = String::new();
            for photo in results.into_iter().flatten() {
                let photo = photo?;
                lines += &(serde_json::to_string(&photo)? + "\n");
                done.insert(photo.photo, photo);
            }
            append(&mut journal, &lines).with_context(|| path.display().to_string())?;
            if stop.load(Ordering::Relaxed) {
                return Err(Error::io(self.folder)(std::io::ErrorKind::Interrupted.into()).into());
            }
        }
        Ok(done.into_values().collect())
    }

    /// Crops a photo. One that cannot be read or has no face is left out; that a crop cannot be written is an error.
    fn photo(&self, photo: usize) -> Result<Done> {
        let path = &self.inputs[photo];
        let mut num_faces = 0;
        let crops = match self.crops(path, &mut num_faces) {
            Ok(crops) => crops,
            Err(error) if error.is_of_image() => {
                let what = error.to_string();
                let what = what.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&what).to_owned();
                let lacks_face = matches!(error, Error::Face { .. });
                return Ok(Done { photo, num_faces, crops: Vec::new(), left_out: Some(what), lacks_face });
            }
            Err(error) => return Err(error.into()),
        };
        let is_numbered = self.args.face == Faces::All;
        let mut written = Vec::with_capacity(crops.len());
        for (i, crop) in crops.into_iter().enumerate() {
            let number = if is_numbered { format!("_{}", i + 1) } else { String::new() };
            let name = format!("{}{number}.{}", self.names[photo], self.args.extension());
            let place = self.folder.join(IMAGES).join(&name);
            std::fs::create_dir_all(folder_of(&place)).map_err(Error::io(&place))?;
            write_image(&crop.image, &place)?;
            written.push((name, crop.face));
        }
        Ok(Done { photo, num_faces, crops: written, left_out: None, lacks_face: false })
    }

    /// Returns the crops of a photo's faces and sets their number.
    fn crops(&self, path: &Path, num_faces: &mut usize) -> crate::Result<Vec<Crop>> {
        let image = read_image(path)?;
        // One of 112 pixels is no crop of another size.
        if self.cropper.is_crop(&image, path)? && image.width() == u32::from(self.args.size) {
            *num_faces = 1;
            return Ok(vec![self.cropper.crop(image, path)?]);
        }
        let faces = self.cropper.faces(&image, path)?;
        *num_faces = faces.len();
        let chosen = match self.args.face {
            Faces::All if !faces.is_empty() => faces,
            _ => vec![self.cropper.chosen(faces, &image, path)?],
        };
        chosen.iter().map(|face| self.cropper.of_face(&image, face, *num_faces)).collect()
    }
}

fn append(journal: &mut File, lines: &str) -> std::io::Result<()> {
    journal.write_all(lines.as_bytes())?;
    journal.sync_data()
}

/// Returns the photos that an interrupted command has done; the last line may be cut.
fn read_journal(path: &Path) -> Result<BTreeMap<usize, Done>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if whole < bytes.len() {
        write_atomic(path, &bytes[..whole])?;
    }
    let text = std::str::from_utf8(&bytes[..whole]).with_context(|| path.display().to_string())?;
    let lines = text.lines();
    lines.map(|line| serde_json::from_str::<Done>(line).map(|photo| (photo.photo, photo)).map_err(Into::into)).collect()
}
