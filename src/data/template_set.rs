//! Template sets, with several images of a person in a template: IJB-B and IJB-C as insightface packs them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use image::RgbImage;

use super::{Landmarks, align_face, read_image};
use crate::error::{Error, Result};
use crate::lists::{Row, Table};

/// One image of a template.
#[derive(Clone, Debug, PartialEq)]
pub struct TemplateImage {
    /// File name in the folder of images.
    pub name: String,
    /// Number of its template.
    pub template: u32,
    /// Number of the photo or video that it comes from; images of one video count as one.
    pub media: u32,
    /// Landmarks, in pixels of the file.
    pub landmarks: Landmarks,
    /// The detector's score of the face, which weights the image.
    pub quality: f32,
}

/// Two templates to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemplatePair {
    /// The first template.
    pub a: u32,
    /// The second template.
    pub b: u32,
    /// Whether both show the same person.
    pub is_same: bool,
}

/// A template and its person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PersonTemplate {
    /// The template's number.
    pub template: u32,
    /// The person's number.
    pub person: u32,
}

/// A gallery to search: known people with a template each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gallery {
    /// Name, such as `G1`.
    pub name: String,
    /// The templates and their people.
    pub templates: Vec<PersonTemplate>,
}

/// Images grouped into templates, the pairs of templates to compare, and the galleries to search.
#[derive(Clone, Debug, PartialEq)]
pub struct TemplateSet {
    folder: PathBuf,
    name: String,
    /// The images, in the set's order.
    pub images: Vec<TemplateImage>,
    /// The pairs of templates, in the protocol's order; empty in a set for identification only.
    pub pairs: Vec<TemplatePair>,
    /// The galleries; empty in a set for verification only.
    pub galleries: Vec<Gallery>,
    /// The probes, each searched for in every gallery.
    pub probes: Vec<PersonTemplate>,
}

impl TemplateSet {
    /// Reads the lists of a set: `meta/NAME_face_tid_mid.txt` (image, template, media), `NAME_name_5pts_score.txt`
    /// (image, five landmarks, detector's score), `NAME_template_pair_label.txt` (two templates, 1 or 0) and, for
    /// identification, `NAME_1N_gallery_*.csv` and `NAME_1N_probe_mixed.csv` (template, person). The images in
    /// `loose_crop/` are not opened.
    ///
    /// # Errors
    /// When a list is missing or malformed, lists contradict each other, or a template has no image.
    pub fn open(folder: &Path) -> Result<Self> {
        let meta = folder.join("meta");
        let data = |what: String| Error::Data { path: meta.clone(), what };
        if !meta.is_dir() {
            return Err(data("expected the folder of the lists of IJB-B or IJB-C, found none".to_owned()));
        }
        let mut files: Vec<String> = Vec::new();
        for entry in std::fs::read_dir(&meta).map_err(Error::io(&meta))? {
            let entry = entry.map_err(Error::io(&meta))?;
            files.push(entry.file_name().to_string_lossy().into_owned());
        }
        files.sort();
        let names: Vec<&str> = files.iter().filter_map(|file| file.strip_suffix("_face_tid_mid.txt")).collect();
        let &[name] = names.as_slice() else {
            return Err(data(format!("expected one file NAME_face_tid_mid.txt, found {names:?}")));
        };
        let path = |suffix: &str| meta.join(format!("{name}_{suffix}"));
        let images = read_images(&path("face_tid_mid.txt"), &path("name_5pts_score.txt"))?;
        let known: BTreeSet<u32> = images.iter().map(|image| image.template).collect();
        let has_images = |template: u32| match known.contains(&template) {
            true => Ok(template),
            false => Err(format!("template {template} has no image")),
        };
        let (pair_list, probe_list) = (path("template_pair_label.txt"), path("1N_probe_mixed.csv"));
        let pairs = if pair_list.is_file() { read_pairs(&pair_list, has_images)? } else { Vec::new() };
        let prefix = format!("{name}_1N_gallery_");
        let mut galleries = Vec::new();
        for file in &files {
            if let Some(name) = file.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".csv")) {
                let templates = read_people(&meta.join(file), has_images)?;
                galleries.push(Gallery { name: name.to_owned(), templates });
            }
        }
        let probes = if galleries.is_empty() { Vec::new() } else { read_people(&probe_list, has_images)? };
        if pairs.is_empty() && galleries.is_empty() {
            return Err(data(format!("expected {name}_template_pair_label.txt or {prefix}*.csv, found neither")));
        }
        Ok(Self { folder: folder.to_owned(), name: name.to_owned(), images, pairs, galleries, probes })
    }

    /// Name of the set, such as `ijbc`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads and aligns image `index`.
    ///
    /// # Errors
    /// When the image cannot be read or cannot be aligned by its landmarks.
    pub fn face(&self, index: usize) -> Result<RgbImage> {
        let image = &self.images[index];
        let path = self.folder.join("loose_crop").join(&image.name);
        align_face(&read_image(&path)?, &image.landmarks).map_err(|e| Error::Image { path, what: e.to_string() })
    }

    /// Returns the person of each template in the galleries and probes.
    ///
    /// # Errors
    /// When two lists name different people for one template.
    pub fn people(&self) -> Result<BTreeMap<u32, u32>> {
        let mut people = BTreeMap::new();
        let lists = self.galleries.iter().map(|gallery| &gallery.templates).chain([&self.probes]);
        for PersonTemplate { template, person } in lists.flatten().copied() {
            let before = people.insert(template, person).unwrap_or(person);
            if before != person {
                let what = format!("template {template} is of person {before} in one list and of {person} in another");
                return Err(Error::Data { path: self.folder.clone(), what });
            }
        }
        Ok(people)
    }
}

/// Calls `each` with the number and the fields of every line of a list; empty lines are skipped.
fn for_each_line(path: &Path, mut each: impl FnMut(usize, &[&str]) -> Result<(), String>) -> Result<()> {
    let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let (mut text, mut line) = (String::new(), 0);
    while reader.read_line(&mut text).map_err(Error::io(path))? > 0 {
        line += 1;
        let fields: Vec<&str> = text.split_ascii_whitespace().collect();
        if !fields.is_empty() {
            each(line, &fields).map_err(|what| Error::Line { path: path.to_owned(), line, what })?;
        }
        text.clear();
    }
    Ok(())
}

fn number<T: FromStr>(field: &str, what: &str) -> Result<T, String> {
    field.parse().map_err(|_| format!("expected {what}, found {field:?}"))
}

fn read_images(templates: &Path, landmarks: &Path) -> Result<Vec<TemplateImage>> {
    let mut images = Vec::new();
    for_each_line(templates, |_, fields| {
        let &[name, template, media] = fields else {
            return Err(format!("expected an image, a template and a media, found {} fields", fields.len()));
        };
        let (template, media) = (number(template, "a template's number")?, number(media, "a media's number")?);
        images.push(TemplateImage { name: name.to_owned(), template, media, landmarks: [[0.0; 2]; 5], quality: 0.0 });
        Ok(())
    })?;
    let mut next = 0;
    for_each_line(landmarks, |_, fields| {
        let &[name, ref points @ .., score] = fields else {
            return Err(format!("expected an image, ten coordinates and a score, found {} fields", fields.len()));
        };
        let image = images.get_mut(next).filter(|image| image.name == name);
        let image = image.ok_or_else(|| format!("expected image {next} of {}, found {name:?}", templates.display()))?;
        if points.len() != 10 {
            return Err(format!("expected ten coordinates, found {}", points.len()));
        }
        for (value, field) in image.landmarks.iter_mut().flatten().zip(points) {
            *value = number(field, "a coordinate")?;
        }
        image.quality = number(score, "a score")?;
        if !(image.quality.is_finite() && image.quality >= 0.0) {
            return Err(format!("expected a score of at least 0, found {score:?}"));
        }
        next += 1;
        Ok(())
    })?;
    if next != images.len() || images.is_empty() {
        let what = format!("expected {} images as in {}, found {next}", images.len(), templates.display());
        return Err(Error::Data { path: landmarks.to_owned(), what });
    }
    Ok(images)
}

fn read_pairs(path: &Path, has_images: impl Fn(u32) -> Result<u32, String>) -> Result<Vec<TemplatePair>> {
    let mut pairs = Vec::new();
    for_each_line(path, |_, fields| {
        let &[a, b, label] = fields else {
            return Err(format!("expected two templates and a label, found {} fields", fields.len()));
        };
        let template = |field| has_images(number(field, "a template's number")?);
        let is_same = match label {
            "1" => true,
            "0" => false,
            other => return Err(format!("expected 1 or 0, found {other:?}")),
        };
        pairs.push(TemplatePair { a: template(a)?, b: template(b)?, is_same });
        Ok(())
    })?;
    Ok(pairs)
}

/// Reads templates and their people; a template may occur once for each of its images.
fn read_people(path: &Path, has_images: impl Fn(u32) -> Result<u32, String>) -> Result<Vec<PersonTemplate>> {
    let table = Table::open(path)?;
    let mut people: BTreeMap<u32, u32> = BTreeMap::new();
    for row in table.rows() {
        let Row { line, fields } = row?;
        let field = |column: usize, what: &str| number::<u32>(fields.get(column).map_or("", String::as_str), what);
        let template = field(0, "a template's number").and_then(&has_images).map_err(|what| table.error(line, what))?;
        let person = field(1, "a person's number").map_err(|what| table.error(line, what))?;
        let before = people.insert(template, person).unwrap_or(person);
        if before != person {
            let what = format!("expected template {template} to be of person {before} as above, found {person}");
            return Err(table.error(line, what));
        }
    }
    if people.is_empty() {
        return Err(Error::Data { path: path.to_owned(), what: "expected templates, found none".to_owned() });
    }
    Ok(people.into_iter().map(|(template, person)| PersonTemplate { template, person }).collect())
}
