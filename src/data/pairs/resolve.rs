//! Finds the images that a list of pairs names in a data set.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::Pair;
use super::entry::{ImageId, PairEntry};
use super::list::PairList;
use crate::data::Dataset;
use crate::error::Result;
use crate::lists::{person_and_file, plain_path};

impl PairList {
    /// Finds the images of every pair in a data set, in the list's order.
    ///
    /// Identities are matched by name. Numbered images are matched by file name: `<identity>_NNNN.<extension>` with any
    /// number of leading zeros, `<identity>_NNNN_N.<extension>` or `NNNN.<extension>`; if the data set has no file
    /// names, by their position among the identity's images. In a list that [counts from 0](Self::counts_from_zero),
    /// they are matched by position. Files are matched by their paths, or the ends of them; by person and file name if
    /// all people of the list lie in one folder; by a file name that is unique if the list gives no folder, or if none
    /// of its folders and files are those of the data set.
    ///
    /// # Errors
    /// [`Error::Line`](crate::Error::Line) at the first pair with an image that the data set lacks or has twice, of an
    /// image with itself that is said to show two people, or that contradicts an earlier one or the data set's labels.
    pub fn resolve(&self, images: &dyn Dataset) -> Result<Vec<Pair>> {
        let known = Known::of(self, images);
        let find = |id: &ImageId, entry: &PairEntry| known.find(id, images).map_err(|what| self.error(entry, what));
        let mut seen: BTreeMap<(usize, usize), &PairEntry> = BTreeMap::new();
        let mut pairs = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            let (a, b) = (find(&entry.a, entry)?, find(&entry.b, entry)?);
            if a == b && !entry.is_same {
                let what = format!("expected different people, found {} and {}, which are one image", entry.a, entry.b);
                return Err(self.error(entry, what));
            }
            match seen.entry((a.min(b), a.max(b))) {
                Entry::Occupied(before) if before.get().is_same != entry.is_same => {
                    let kind = if entry.is_same { "the same person" } else { "different people" };
                    let line = before.get().line;
                    let what = format!("expected {} and {} as in line {line}, found {kind}", entry.a, entry.b);
                    return Err(self.error(entry, what));
                }
                Entry::Occupied(_) => {}
                Entry::Vacant(free) => drop(free.insert(entry)),
            }
            let (label_a, label_b) = (images.label(a), images.label(b));
            let is_file = matches!(entry.a, ImageId::File(_));
            if is_file && a != b && images.num_identities() > 1 && (label_a == label_b) != entry.is_same {
                let [said, found] =
                    if entry.is_same { ["one person", "two people"] } else { ["two people", "one person"] };
                let [a, b] = [a, b].map(|index| images.name(index));
                let what = format!("expected images of {said}, found {a} and {b}, of {found} in the data set");
                return Err(self.error(entry, what));
            }
            pairs.push(Pair { a, b, is_same: entry.is_same, fold: entry.fold });
        }
        Ok(pairs)
    }

    /// Whether the list counts a person's images from 0: it names an image 0, and no image of the data set has that
    /// number.
    pub fn counts_from_zero(&self, images: &dyn Dataset) -> bool {
        let of_zero = |entry: &PairEntry| {
            let is_zero = |id: &ImageId| matches!(id, ImageId::Numbered { number: 0, .. });
            is_zero(&entry.a) || is_zero(&entry.b)
        };
        self.entries.iter().any(of_zero) && {
            let names = self.identities();
            let has_zero = |index: usize| {
                let identity = images.identity_name(images.label(index));
                let number = images.file_name(index).and_then(|name| image_number(&name, &identity));
                number == Some(0) && names.contains(identity.as_str())
            };
            !(0..images.len()).any(has_zero)
        }
    }

    fn identities(&self) -> BTreeSet<&str> {
        let names = self.entries.iter().flat_map(|e| [&e.a, &e.b]).filter_map(|id| match id {
            ImageId::Numbered { identity, .. } => Some(identity.as_str()),
            ImageId::File(_) => None,
        });
        names.collect()
    }
}

/// The images of a data set that a list may mean.
struct Known<'a> {
    /// By identity and number: the image, and a second one of the same number.
    numbered: BTreeMap<(&'a str, u32), (usize, Option<usize>)>,
    /// By `PERSON/IMAGE`; several may have that in common.
    files: BTreeMap<String, Vec<usize>>,
    /// By file name; none if several have it.
    unique: BTreeMap<String, Option<usize>>,
    /// Whether the list's folders are the data set's people: then `zoe/1.jpg` must not be taken for `ann/1.jpg`.
    has_people: bool,
    /// Whether the list has files in several folders of people: then `masked/ann/1.jpg` must not be taken for
    /// `clean/ann/1.jpg`.
    has_folders: bool,
}

impl<'a> Known<'a> {
    fn of(list: &'a PairList, images: &dyn Dataset) -> Self {
        let (identities, by_position) = (list.identities(), list.counts_from_zero(images));
        let wanted: BTreeSet<&str> = list
            .entries
            .iter()
            .flat_map(|entry| [&entry.a, &entry.b])
            .filter_map(|id| match id {
                ImageId::File(path) => Some(file_name(path)),
                ImageId::Numbered { .. } => None,
            })
            .collect();
        let (numbered, files, unique) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut known = Self { numbered, files, unique, has_people: false, has_folders: false };
        let of_label = |name: String| identities.get(name.as_str()).copied();
        let of_label: Vec<Option<&str>> = images.identity_names().into_iter().map(of_label).collect();
        for (index, counted) in count_images(images).into_iter().enumerate() {
            if let Some(name) = images.file_name(index).filter(|name| wanted.contains(name.as_str())) {
                known.unique.entry(name).and_modify(|several| *several = None).or_insert(Some(index));
                if let Some(path) = images.person_and_file(index) {
                    known.files.entry(path).or_default().push(index);
                }
            }
            let Some(identity) = of_label[images.label(index) as usize] else { continue };
            let number = match by_position {
                true => Some(counted - 1),
                false => list_number(images, index, identity, counted),
            };
            if let Some(number) = number {
                let second = |(_, second): &mut (usize, Option<usize>)| *second = second.or(Some(index));
                known.numbered.entry((identity, number)).and_modify(second).or_insert((index, None));
            }
        }
        let ids = list.entries.iter().flat_map(|entry| [&entry.a, &entry.b]);
        let paths: Vec<&str> = ids
            .filter_map(|id| match id {
                ImageId::File(path) => Some(path.as_str()),
                ImageId::Numbered { .. } => None,
            })
            .collect();
        known.has_people =
            paths.iter().filter_map(|path| person_and_file(path)).any(|path| known.files.contains_key(&path));
        let folder = |path: &&str| Some(plain_path(path).rsplit_once('/')?.0.rsplit_once('/')?.0.to_owned());
        let mut folders = paths.iter().filter_map(folder);
        let first = folders.next();
        known.has_folders = folders.any(|folder| Some(folder) != first);
        known
    }

    /// Returns the image of a path whose last two parts are `of_person`; none of several that it may mean.
    fn of_person(&self, of_person: &str, path: &str, images: &dyn Dataset) -> Option<Option<usize>> {
        let all = self.files.get(of_person)?;
        let path = plain_path(path);
        // The path itself, or the end of one.
        let is_end = |name: &str| {
            let before = name.strip_suffix(&path);
            before.is_some_and(|before| path.starts_with('/') || before.is_empty() || before.ends_with(['/', ' ']))
        };
        let exact: Vec<usize> = all.iter().copied().filter(|&i| is_end(&plain_path(&images.name(i)))).collect();
        match (&exact[..], &all[..]) {
            (&[index], _) => Some(Some(index)),
            // A list from elsewhere, whose people lie in one folder.
            ([], &[index]) if !self.has_folders => Some(Some(index)),
            ([], [_]) => None,
            _ => Some(None),
        }
    }

    fn find(&self, id: &ImageId, images: &dyn Dataset) -> std::result::Result<usize, String> {
        match id {
            ImageId::Numbered { identity, number } => match self.numbered.get(&(identity.as_str(), *number)) {
                Some(&(index, None)) => Ok(index),
                Some(&(first, Some(second))) => {
                    let [first, second] = [first, second].map(|index| images.name(index));
                    Err(format!("expected one {id} in the data set, found {first} and {second}"))
                }
                None => {
                    let hint = match identity.is_ascii() {
                        true => String::new(),
                        false => " (accented letters may be written as one character or as two)".to_owned(),
                    };
                    Err(format!("expected {id} in the data set, found none{hint}"))
                }
            },
            ImageId::File(path) => {
                let of_person = person_and_file(path);
                let by_name = || self.unique.get(file_name(path)).copied();
                let is_by_name = of_person.is_none() || !self.has_people;
                let known = of_person.and_then(|of_person| self.of_person(&of_person, path, images));
                match known.or_else(|| by_name().filter(|_| is_by_name)) {
                    Some(Some(index)) => Ok(index),
                    Some(None) => Err(format!("expected one image {path} in the data set, found several")),
                    None if !images.is_empty() && images.file_name(0).is_none() => {
                        Err(format!("expected {path} in the data set, whose images have no names"))
                    }
                    None => Err(format!("expected an image {path} in the data set, found none")),
                }
            }
        }
    }
}

/// Returns the last component of a path with slashes of either kind.
fn file_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

/// Returns the number by which lists refer to an image of `identity`: from its file name, or `counted` if the data set
/// has no file names.
pub(in crate::data) fn list_number(images: &dyn Dataset, index: usize, identity: &str, counted: u32) -> Option<u32> {
    match images.file_name(index) {
        Some(name) => image_number(&name, identity),
        None => Some(counted),
    }
}

/// Returns 7 for `Jane_Doe_0007.jpg`, `Jane_Doe_7_0.jpg` and `7.jpg` of identity `Jane_Doe`.
fn image_number(file_name: &str, identity: &str) -> Option<u32> {
    let stem = Path::new(file_name).file_stem()?.to_str()?;
    let digits = stem.strip_prefix(identity).and_then(|rest| rest.strip_prefix('_')).unwrap_or(stem);
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // Some detectors number the faces that they cut from a photo.
    let digits = match digits.split_once('_') {
        Some((number, face)) if digits.len() < stem.len() && is_number(face) => number,
        _ => digits,
    };
    if is_number(digits) { digits.parse().ok() } else { None }
}

/// Returns each image's number among those of its identity, from 1, in the order of the set.
pub(in crate::data) fn count_images(images: &dyn Dataset) -> Vec<u32> {
    let mut counts = vec![0; images.num_identities()];
    let number = |index: usize| {
        let count = &mut counts[images.label(index) as usize];
        *count += 1;
        *count
    };
    (0..images.len()).map(number).collect()
}
