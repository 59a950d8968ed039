//! `maskinv gallery info`, `list`, `remove`, `compact` and `check`.

use std::path::Path;

use anyhow::{Result, bail};

use super::{FileArgs, ListArgs, RemoveArgs};
use crate::cli::decision::describe_mask;
use crate::cli::{count_of, print, print_json, tell};
use crate::gallery::{Gallery, GalleryInfo, Removed, StoredFace};

pub(super) fn info(args: &FileArgs) -> Result<()> {
    let info = Gallery::open(&args.gallery)?.info()?;
    if args.json {
        return print_json(&info);
    }
    let GalleryInfo { model, num_people, num_faces, num_masked, bytes, free_bytes, version, .. } = &info;
    print(&format!("{} of {num_people} people", count_of(*num_faces, "face")))?;
    if let Some(num_masked) = num_masked {
        print(&format!("{num_masked} with a mask"))?;
    }
    print(&format!("model {}, {} elements", model.name, model.embedding_size))?;
    print(&format!("weights {}, {}", model.computed_with.weights, model.computed_with.preprocessing))?;
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    print(&format!("{:.1} MB, {:.1} MB of them free; version {version}", megabytes(*bytes), megabytes(*free_bytes)))
}

pub(super) fn list(args: &ListArgs) -> Result<()> {
    let gallery = Gallery::open(&args.file.gallery)?;
    if args.people.is_empty() {
        let people = gallery.people()?;
        if args.file.json {
            return print_json(&people);
        }
        return people.iter().try_for_each(|person| print(&format!("{}\t{}", person.name, person.num_faces)));
    }
    let mut faces = Vec::new();
    for person in &args.people {
        faces.extend(gallery.faces(Some(person))?);
    }
    match args.file.json {
        true => print_json(&faces),
        false => faces.iter().try_for_each(|face| print(&describe(face))),
    }
}

/// Describes a face in a line.
fn describe(face: &StoredFace) -> String {
    let StoredFace { id, person, source, score, side, sharpness, mask, .. } = face;
    let found = match (score, side) {
        (Some(score), Some(side)) => format!("{side:.0} pixels, score {score:.2}"),
        _ => "an aligned crop".to_owned(),
    };
    let mask = mask.map(|mask| format!(", {}", describe_mask(mask))).unwrap_or_default();
    format!("{id}\t{person}\t{source}\t{found}, sharpness {sharpness:.0}{mask}")
}

pub(super) fn remove(args: &RemoveArgs) -> Result<()> {
    let mut gallery = Gallery::open(&args.gallery)?;
    let Removed { num_faces, is_log_empty } = match args.people.is_empty() {
        true => gallery.remove_faces(&args.face)?,
        false => gallery.remove_people(&args.people)?,
    };
    tell_of_log(&args.gallery, is_log_empty);
    print(&format!("{} removed", count_of(num_faces, "face")))
}

/// Says so if the log of changes still holds what was removed.
fn tell_of_log(gallery: &Path, is_log_empty: bool) {
    if !is_log_empty {
        let what = "another process is reading it: its log holds what was removed until `gallery compact` runs alone";
        tell(format_args!("{}: {what}", gallery.display()));
    }
}

pub(super) fn compact(gallery: &Path) -> Result<()> {
    let (freed, is_log_empty) = Gallery::open(gallery)?.compact()?;
    tell_of_log(gallery, is_log_empty);
    print(&format!("smaller by {:.1} MB", freed as f64 / 1e6))
}

pub(super) fn check(args: &FileArgs) -> Result<()> {
    let gallery = Gallery::open(&args.gallery)?;
    let wrong = gallery.check()?;
    if args.json {
        print_json(&wrong)?;
    } else {
        wrong.iter().for_each(|what| tell(format_args!("{}: {what}", args.gallery.display())));
    }
    if !wrong.is_empty() {
        bail!("{}: {} found", args.gallery.display(), count_of(wrong.len(), "fault"));
    }
    if !args.json {
        let info = gallery.info()?;
        print(&format!("{} of {} people, all whole", count_of(info.num_faces, "face"), info.num_people))?;
    }
    Ok(())
}
