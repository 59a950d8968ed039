//! The faces of a `.rec` file.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::index::Index;
use super::record::{Header, read_header, read_record, skip_record};
use crate::data::dataset::Dataset;
use crate::data::formats::classes::{Classes, Paths};
use crate::data::formats::file::RandomFile;
use crate::error::{Error, Result};
use crate::lists::{Separator, Text, plain_path};
use crate::parallel;

/// Keys in labels are f32, which is exact for whole numbers up to here.
const MAX_EXACT: u64 = 1 << 24;

/// The faces of a RecordIO file as a [`Dataset`], in the order of their keys.
///
/// Memory is 12 bytes per image, plus the images' names if a list of them lies beside the file. Every image has
/// [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS).
pub struct RecordFaces {
    file: RandomFile,
    /// Offset of each image's record.
    offsets: Vec<u64>,
    classes: Classes,
    paths: Option<Paths>,
    note: Option<String>,
}

impl RecordFaces {
    /// Opens `NAME.rec`, with `NAME.idx` if it exists, otherwise by scanning the file. Names come from `NAME.lst` if it
    /// exists and fits: key, label, path, as MXNet's `im2rec` writes it, or insightface's 1, path, label.
    ///
    /// Both of insightface's layouts are read. One has a first record that says which keys are images, then the images,
    /// then one record per person with the keys of that person's images. The other has images only; of several labels,
    /// the first counts.
    ///
    /// # Errors
    /// When a file cannot be read, is not RecordIO, is truncated, or index and records contradict each other.
    pub fn open(path: &Path) -> Result<Self> {
        let file = RandomFile::open(path)?;
        let index_path = path.with_extension("idx");
        let mut index = if index_path.is_file() { Index::read(&index_path, &file)? } else { Index::scan(&file)? };
        if index.keys.is_empty() {
            let empty = if index_path.is_file() { index_path } else { path.to_owned() };
            return Err(Error::Data { path: empty, what: "expected records, found none".to_owned() });
        }
        // Packers write the record with key 0 first or last.
        let first = index.keys.iter().position(|&key| key == 0).map(|at| read_header(&file, index.offsets[at]));
        let numbers = match first.transpose()?.and_then(|(header, is_image)| people_keys(&header, is_image)) {
            Some(people) => {
                index.sort();
                labels_by_people(&file, &mut index, people)?
            }
            None => labels_of(&file, &index.offsets)?,
        };
        let Index { keys, offsets } = index;
        let signed: Vec<i64> = numbers.iter().map(|&number| number as i64).collect();
        let mut classes = Classes::from_numbers(&signed, path)?;
        let list_path = path.with_extension("lst");
        let list = list_path.is_file().then(|| read_list(&list_path, &keys, &numbers)).transpose();
        let (paths, note) = match list {
            Ok(paths) => (paths, None),
            Err(what) => (None, Some(format!("{} does not fit and is not used: {what}", list_path.display()))),
        };
        if let Some(paths) = &paths {
            classes = classes.with_folders(paths);
        }
        Ok(Self { file, offsets, classes, paths, note })
    }

    /// Returns what the user should know: why the list beside the file is not used.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }
}

impl Dataset for RecordFaces {
    fn len(&self) -> usize {
        self.classes.num_images()
    }

    fn num_identities(&self) -> usize {
        self.classes.num_identities()
    }

    fn label(&self, index: usize) -> u32 {
        self.classes.label(index)
    }

    fn name(&self, index: usize) -> String {
        let (rec, at) = (self.file.path().display(), self.offsets[index]);
        match &self.paths {
            Some(paths) => format!("{rec}, {}", paths.get(index)),
            None => format!("{rec}, the record at byte {at}"),
        }
    }

    fn identity_name(&self, label: u32) -> String {
        self.classes.name(label)
    }

    fn file_name(&self, index: usize) -> Option<String> {
        self.paths.as_ref().map(|paths| paths.file_name(index).to_owned())
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        let offset = self.offsets[index];
        let (mut record, _) = read_record(&self.file, offset)?;
        let (_, used) = Header::parse(&record).map_err(|what| self.file.error(offset + 8, what))?;
        record.drain(..used);
        Ok(Some(record))
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        let offset = self.offsets[index];
        skip_record(&self.file, offset).ok().map(|end| end - offset)
    }
}

/// Returns the keys `from .. to` of the people's records, if this is the record that states them. The keys of the
/// images lie between this record's key and those.
fn people_keys(header: &Header, is_image: bool) -> Option<[u64; 2]> {
    match header.labels[..] {
        // The casts saturate.
        [from, to] if header.is_list && !is_image && 1.0 <= from && from <= to => Some([from as u64, to as u64]),
        _ => None,
    }
}

/// Reduces `index` to the images and returns their labels, if possible from the people's records.
fn labels_by_people(file: &RandomFile, index: &mut Index, [from, to]: [u64; 2]) -> Result<Vec<u64>> {
    let position = |key: u64| index.keys.partition_point(|&k| k < key);
    let (mut middle, end) = (position(from), position(to));
    // The key is an f32, which is not exact above 16 million: look for the boundary nearby.
    let is_image = |at: usize| index.offsets.get(at).map_or(Ok(false), |&o| Ok::<_, Error>(read_header(file, o)?.1));
    while middle > 1 && !is_image(middle - 1)? {
        middle -= 1;
    }
    while is_image(middle)? {
        middle += 1;
    }
    let people: Vec<u64> = index.offsets[middle.min(end)..end].to_vec();
    // If keys are exact, the counts must match.
    let (expected, found) = ([from - 1, to - from], [middle - 1, people.len()].map(|num| num as u64));
    if to < MAX_EXACT && expected != found {
        let what = format!(
            "expected {} images and {} people, as the first record says, found {} and {}: the file is truncated, or the \
             index is another file's",
            expected[0], expected[1], found[0], found[1]
        );
        return Err(Error::Data { path: file.path().to_owned(), what });
    }
    index.keys.truncate(middle);
    index.offsets.truncate(middle);
    index.keys.remove(0);
    index.offsets.remove(0);
    match labels_of_ranges(file, index, &people)? {
        Some(labels) => Ok(labels),
        None => labels_of(file, &index.offsets),
    }
}

/// Returns the labels of all images from the people's records, reading only each person's first and last image; `None`
/// if these records do not cover all images.
fn labels_of_ranges(file: &RandomFile, index: &Index, people: &[u64]) -> Result<Option<Vec<u64>>> {
    let range = |&offset: &u64| -> Result<Option<(usize, usize, u64)>> {
        let (header, _) = read_header(file, offset)?;
        let [from, to] = header.labels[..] else { return Ok(None) };
        let position = |key: f32| index.keys.partition_point(|&k| k < key as u64);
        let (from, to) = (position(from), position(to));
        if from >= to {
            return Ok(None);
        }
        let [first, last] = [from, to - 1].map(|at| label_of(file, index.offsets[at]));
        let first = first?;
        Ok((first == last?).then_some((from, to, first)))
    };
    let ranges: Option<Vec<_>> = parallel::try_map(people.len(), |i| range(&people[i]))?.into_iter().collect();
    let Some(mut ranges) = ranges else { return Ok(None) };
    ranges.sort_unstable();
    let mut labels = Vec::with_capacity(index.keys.len());
    for (from, to, label) in ranges {
        if from != labels.len() {
            return Ok(None);
        }
        labels.resize(to, label);
    }
    Ok((labels.len() == index.keys.len()).then_some(labels))
}

fn labels_of(file: &RandomFile, offsets: &[u64]) -> Result<Vec<u64>> {
    parallel::try_map(offsets.len(), |i| label_of(file, offsets[i]))
}

/// Returns the label of the image at an offset.
fn label_of(file: &RandomFile, offset: u64) -> Result<u64> {
    let (header, is_image) = read_header(file, offset)?;
    let label = header.labels[0];
    if !is_image {
        return Err(file.error(offset, "expected an image after the header, found none"));
    }
    // From there on, two people would have one label.
    if !(0.0..MAX_EXACT as f32).contains(&label) || label.fract() != 0.0 {
        let what = format!("expected the number of a person below {MAX_EXACT} as label, found {label}");
        return Err(file.error(offset, what));
    }
    Ok(label as u64)
}

/// Reads the paths from a list, in the order of `keys`: MXNet's lines of key, labels and path, by their keys, if the
/// first labels agree; or insightface's of 1, path and label, by their order, if there are as many and the labels
/// agree.
///
/// # Errors
/// Says why the list does not fit the records.
fn read_list(path: &Path, keys: &[u64], numbers: &[u64]) -> std::result::Result<Paths, String> {
    let text = Text::read(path).map_err(|e| e.to_string())?;
    let mut lines: Vec<ListLine> = Vec::new();
    for line in text.lines() {
        let fields = line.fields(Separator::Tab).map_err(|what| line_error(line.number, &what))?;
        if fields.len() < 3 {
            return Err(line_error(line.number, "expected key, label and path between tabs"));
        }
        lines.push((line.number, fields));
    }
    if lines.len() < keys.len() {
        return Err(format!("expected a line for each of {} images, found {}", keys.len(), lines.len()));
    }
    // In insightface's lists the first field says whether faces are aligned, and the label is last.
    let is_insightface = |(_, fields): &ListLine| {
        matches!(&*fields[0], "0" | "1") && fields[1].parse::<f64>().is_err() && fields[2].parse::<f64>().is_ok()
    };
    let paths = match lines.iter().all(is_insightface) {
        true => paths_by_order(&lines, numbers)?,
        false => paths_by_key(&lines, keys, numbers)?,
    };
    let mut sorted: Vec<String> = paths.iter().map(plain_path).collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("expected a path of its own for each image, found {} twice", pair[0])),
        None => Ok(paths),
    }
}

/// A line's number and its fields.
type ListLine<'a> = (usize, Vec<Cow<'a, str>>);

fn line_error(line: usize, what: &str) -> String {
    format!("line {line}: {what}")
}

fn paths_by_order(lines: &[ListLine], numbers: &[u64]) -> std::result::Result<Paths, String> {
    if lines.len() != numbers.len() {
        return Err(format!("expected {} lines, one for each image, found {}", numbers.len(), lines.len()));
    }
    let mut paths = Paths::default();
    // Packers number labels anew, so the labels must be the same up to their numbers.
    let mut label_of: BTreeMap<&str, u64> = BTreeMap::new();
    let mut list_of: BTreeMap<u64, &str> = BTreeMap::new();
    for ((line, fields), &number) in lines.iter().zip(numbers) {
        let label = &*fields[2];
        if *label_of.entry(label).or_insert(number) != number || *list_of.entry(number).or_insert(label) != label {
            return Err(line_error(*line, "its label is not that of the record"));
        }
        paths.push(&fields[1]);
    }
    Ok(paths)
}

fn paths_by_key(lines: &[ListLine], keys: &[u64], numbers: &[u64]) -> std::result::Result<Paths, String> {
    let mut of_key: BTreeMap<u64, &ListLine> = BTreeMap::new();
    for line in lines {
        let Ok(key) = line.1[0].parse() else { continue };
        if let Some((before, _)) = of_key.insert(key, line) {
            return Err(line_error(line.0, &format!("expected each key once, found {key} in line {before} too")));
        }
    }
    let mut paths = Paths::default();
    for (key, &number) in keys.iter().zip(numbers) {
        let Some((line, fields)) = of_key.get(key) else {
            return Err(format!("expected a line with key {key}, found none"));
        };
        if fields[1].parse::<f64>().ok() != Some(number as f64) {
            let what = format!("expected the record's label {number}, found {}", fields[1]);
            return Err(line_error(*line, &what));
        }
        paths.push(fields.last().map_or("", |path| path));
    }
    Ok(paths)
}
