//! `maskinv enrol`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use sha2::{Digest, Sha256};

use super::EnrolArgs;
use super::faces::{BATCH, Embedded, Tools};
use crate::cli::progress::Progress;
use crate::cli::{count_of, list_images, print, tell};
use crate::data::{decode_image, read_image_file};
use crate::error::Error;
use crate::gallery::{Added, Gallery, NewFace, person_of};

/// A photo to enrol.
struct Photo {
    path: PathBuf,
    person: String,
}

/// Adds the faces of photos to a gallery, a few at a time: what was added stays if it is interrupted, and the same
/// command goes on.
pub(super) fn run(args: &EnrolArgs) -> Result<()> {
    let photos = photos(args)?;
    let there = args.gallery.exists().then(|| Gallery::open(&args.gallery)).transpose()?;
    let tools = Tools::open(&args.common, there.as_ref())?;
    let model = tools.gallery_model()?;
    let mut gallery = match there {
        Some(gallery) => gallery.check_model(&model).map(|()| gallery)?,
        None => Gallery::open_or_create(&args.gallery, &model)?,
    };
    let (mut progress, total) = (Progress::new(), photos.len());
    let (mut num_new, mut num_known, mut unusable) = (0, 0, Vec::new());
    for (first, photos) in (0..).step_by(BATCH).zip(photos.chunks(BATCH)) {
        let mut new = Vec::new();
        for (i, photo) in photos.iter().enumerate() {
            match read_image_file(&photo.path) {
                Err(error) => unusable.push((first + i, error)),
                Ok(bytes) => {
                    let digest: [u8; 32] = Sha256::digest(&bytes).into();
                    if gallery.has(&photo.person, &digest)? { num_known += 1 } else { new.push((i, digest, bytes)) }
                }
            }
        }
        let crop = |k: usize| {
            let (i, _, bytes) = &new[k];
            let path = &photos[*i].path;
            tools.cropper.crop(decode_image(bytes, || path.clone())?, path)
        };
        let (embedded, failed) = tools.embed(new.len(), crop)?;
        unusable.extend(failed.into_iter().map(|(k, error)| (first + new[k].0, error)));
        let of = |face: Embedded| {
            let (i, digest, _) = new[face.image];
            new_face(&photos[i], digest, face)
        };
        let faces: Vec<NewFace> = embedded.into_iter().map(of).collect();
        for added in gallery.enrol(&faces)? {
            match added {
                Added::New(_) => num_new += 1,
                Added::Known(_) => num_known += 1,
            }
        }
        if !unusable.is_empty() && !args.unusable.are_left_out() {
            break;
        }
        progress.count("enrol", "photos", (first + BATCH).min(total), total);
    }
    let known = if num_known > 0 { format!(", {num_known} were there before") } else { String::new() };
    let info = gallery.info()?;
    let (people, faces) = (info.num_people, count_of(info.num_faces, "face"));
    let summary = format!(
        "{}: {} enrolled{known}; {faces} of {people} people in all",
        args.gallery.display(),
        count_of(num_new, "face")
    );
    let failed = args.unusable.tell(unusable, total);
    match failed {
        Ok(()) => print(&summary),
        Err(error) => {
            tell(format_args!("{summary}"));
            Err(error)
        }
    }
}

fn new_face(photo: &Photo, image: [u8; 32], face: Embedded) -> NewFace {
    let Embedded { face, sharpness, mask, embedding, .. } = face;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    let side = face.as_ref().map(|face| {
        let [x0, y0, x1, y1] = face.bounds;
        (x1 - x0).max(y1 - y0)
    });
    NewFace {
        person: photo.person.clone(),
        embedding,
        image,
        source: photo.path.to_string_lossy().into_owned(),
        enrolled: now,
        score: face.as_ref().map(|face| face.score),
        side,
        sharpness,
        mask,
    }
}

/// Returns the photos and whom they show.
fn photos(args: &EnrolArgs) -> Result<Vec<Photo>> {
    let mut photos = Vec::new();
    // People who are named by a file, and its folder.
    let mut by_file: BTreeMap<String, PathBuf> = BTreeMap::new();
    for root in &args.images {
        for path in list_images(root)? {
            let person = match &args.person {
                Some(person) => person.clone(),
                None => person_of(&path, root)?,
            };
            let is_by_file = args.person.is_none() && path.file_stem().is_some_and(|stem| stem == person.as_str());
            if let Some(folder) = path.parent().filter(|_| is_by_file) {
                let first = by_file.entry(person.clone()).or_insert_with(|| folder.to_owned());
                if first != folder {
                    bail!(
                        "person {person}: expected one, found files of this name in {} and {}; name the folder above \
                         them, or the person (--person)",
                        first.display(),
                        folder.display()
                    );
                }
            }
            photos.push(Photo { path, person });
        }
    }
    if photos.is_empty() {
        return Err(Error::Data { path: args.images[0].clone(), what: "expected images, found none".to_owned() }.into());
    }
    Ok(photos)
}
