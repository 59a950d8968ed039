//! Pairs of images to compare: the pair and people lists of LFW and MFR2, and pairs drawn from labels.
//!
//! A list is text with one record per line and fields separated by tabs or blanks. A byte-order mark, CRLF line ends
//! and blank lines are accepted. Counts in a list are checked against its lines; they never determine an allocation.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rand::SeedableRng;
use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;

use super::Dataset;
use crate::error::{Error, Result};

/// Two images of a data set to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Index of the first image.
    pub a: usize,
    /// Index of the second image.
    pub b: usize,
    /// Whether both show the same person.
    pub is_same: bool,
    /// The fold of the protocol, from 0; 0 if there are no folds.
    pub fold: usize,
}

/// An image as lists name it: number 7 of `Jane_Doe` is `Jane_Doe/Jane_Doe_0007.jpg`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageId {
    /// The identity's name.
    pub identity: String,
    /// The image's number, from 1.
    pub number: u32,
}

/// A pair as its list names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairEntry {
    /// The first image.
    pub a: ImageId,
    /// The second image.
    pub b: ImageId,
    /// Whether both show the same person.
    pub is_same: bool,
    /// The fold, from 0.
    pub fold: usize,
    /// The line in the list, from 1.
    pub line: usize,
}

/// The pairs of a list, in its order.
#[derive(Clone, Debug, PartialEq)]
pub struct PairList {
    path: PathBuf,
    entries: Vec<PairEntry>,
    num_folds: usize,
}

impl PairList {
    /// Reads a list in LFW's format if its first line has one or two fields, otherwise in MFR2's.
    ///
    /// # Errors
    /// Same as [`PairList::read_lfw`] or [`PairList::read_mfr2`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let text = read_text(path.as_ref())?;
        let lines = Lines::new(path.as_ref(), &text);
        if lines.first().len() <= 2 { Self::parse_lfw(lines) } else { Self::parse_mfr2(lines) }
    }

    /// Reads LFW's `pairs.txt`: a line `folds n`, then per fold `n` lines `name i j` (the same person) and `n` lines
    /// `name1 i name2 j` (different people). If the first line is just `n` (`pairsDevTest.txt`), the list has one fold.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is not UTF-8, [`Error::Line`] for a wrong
    /// number of fields, a number that is not a whole number from 1, two people with the same name, an early end of the
    /// file, or text after the last fold.
    pub fn read_lfw(path: impl AsRef<Path>) -> Result<Self> {
        Self::parse_lfw(Lines::new(path.as_ref(), &read_text(path.as_ref())?))
    }

    /// Reads MFR2's `pairs.txt`: lines `name i j` (same person) and `name1 i name2 j` (different people), in any order.
    /// All are in fold 0.
    ///
    /// # Errors
    /// Same as [`PairList::read_lfw`], and when the list is empty.
    pub fn read_mfr2(path: impl AsRef<Path>) -> Result<Self> {
        Self::parse_mfr2(Lines::new(path.as_ref(), &read_text(path.as_ref())?))
    }

    fn parse_lfw(mut lines: Lines) -> Result<Self> {
        let header = lines.next("\"folds pairs\"")?;
        let (num_folds, num_pairs): (usize, usize) = match *header.fields {
            [pairs] => (1, lines.number(&header, pairs)?),
            [folds, pairs] => (lines.number(&header, folds)?, lines.number(&header, pairs)?),
            _ => return Err(lines.error(&header, "expected the numbers of folds and of pairs")),
        };
        let mut entries = Vec::new();
        for fold in 0..num_folds {
            for is_same in [true, false] {
                for i in 1..=num_pairs {
                    let kind = if is_same { "same \"name i j\"" } else { "different \"name1 i name2 j\"" };
                    let expected = format!("pair {i} of {num_pairs} of fold {fold}, {kind}");
                    let line = lines.next(&expected)?;
                    let entry = lines.pair(&line, fold, &expected)?;
                    if entry.is_same != is_same {
                        return Err(lines.error(&line, &format!("expected {expected}")));
                    }
                    entries.push(entry);
                }
            }
        }
        lines.end("the last fold")?;
        Ok(Self { path: lines.path.to_owned(), entries, num_folds })
    }

    fn parse_mfr2(mut lines: Lines) -> Result<Self> {
        let expected = "\"name i j\" or \"name1 i name2 j\"";
        let mut entries = Vec::new();
        while entries.is_empty() || !lines.first().is_empty() {
            let line = lines.next(expected)?;
            entries.push(lines.pair(&line, 0, expected)?);
        }
        Ok(Self { path: lines.path.to_owned(), entries, num_folds: 1 })
    }

    /// The pairs, in the list's order.
    pub fn entries(&self) -> &[PairEntry] {
        &self.entries
    }

    /// Number of folds; every entry's `fold` is below it.
    pub fn num_folds(&self) -> usize {
        self.num_folds
    }

    /// Finds the images of every pair in a data set, in the list's order.
    ///
    /// Identities are matched by name. Images are matched by file name, `<identity>_NNNN.<extension>` with any number
    /// of leading zeros; if the data set has no file names, by their position among the identity's images.
    ///
    /// # Errors
    /// [`Error::Line`] at the first pair with an image that the data set lacks.
    pub fn resolve(&self, images: &dyn Dataset) -> Result<Vec<Pair>> {
        let named: HashSet<&str> =
            self.entries.iter().flat_map(|e| [e.a.identity.as_str(), e.b.identity.as_str()]).collect();
        let names = images.identity_names().into_iter();
        let names: Vec<Option<String>> = names.map(|name| named.contains(name.as_str()).then_some(name)).collect();
        let mut index_of: HashMap<(&str, u32), usize> = HashMap::new();
        for (index, counted) in count_images(images).into_iter().enumerate() {
            let Some(identity) = names[images.label(index) as usize].as_deref() else { continue };
            if let Some(number) = list_number(images, index, identity, counted) {
                index_of.entry((identity, number)).or_insert(index);
            }
        }
        let find = |id: &ImageId, line: usize| {
            index_of.get(&(id.identity.as_str(), id.number)).copied().ok_or_else(|| {
                let what = format!("expected image {} of {} in the data set, found none", id.number, id.identity);
                Error::Line { path: self.path.clone(), line, what }
            })
        };
        let resolve = |e: &PairEntry| {
            Ok(Pair { a: find(&e.a, e.line)?, b: find(&e.b, e.line)?, is_same: e.is_same, fold: e.fold })
        };
        self.entries.iter().map(resolve).collect()
    }
}

/// Returns the number by which lists refer to an image of `identity`: from its file name, or `counted` if the data set
/// has no file names.
pub(super) fn list_number(images: &dyn Dataset, index: usize, identity: &str, counted: u32) -> Option<u32> {
    match images.file_name(index) {
        Some(name) => image_number(&name, identity),
        None => Some(counted),
    }
}

/// Returns 7 for `Jane_Doe_0007.jpg` of identity `Jane_Doe`.
fn image_number(file_name: &str, identity: &str) -> Option<u32> {
    let stem = Path::new(file_name).file_stem()?.to_str()?;
    let digits = stem.strip_prefix(identity)?.strip_prefix('_')?;
    if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}

/// Returns each image's number among those of its identity, from 1, in the order of the set.
pub(super) fn count_images(images: &dyn Dataset) -> Vec<u32> {
    let mut counts = vec![0; images.num_identities()];
    let number = |index: usize| {
        let count = &mut counts[images.label(index) as usize];
        *count += 1;
        *count
    };
    (0..images.len()).map(number).collect()
}

/// A person of a people list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// The identity's name.
    pub name: String,
    /// Number of images.
    pub num_images: u32,
}

/// A people list: the identities of each fold. No identity is in two folds.
#[derive(Clone, Debug, PartialEq)]
pub struct People {
    /// The identities of each fold, in the list's order.
    pub folds: Vec<Vec<Person>>,
}

impl People {
    /// Reads LFW's `people.txt`: the number of folds, then per fold a line with its number of people and that many
    /// lines `name images`. A list that begins with the number of people (`peopleDevTrain.txt`) has one fold.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is not UTF-8, [`Error::Line`] for a wrong
    /// number of fields, a number that is not a whole number from 1, a repeated name, an early end of the file, or text
    /// after the last fold.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let text = read_text(path.as_ref())?;
        let mut lines = Lines::new(path.as_ref(), &text);
        let count = |lines: &mut Lines, expected: &str| {
            let line = lines.next(expected)?;
            match *line.fields {
                [count] => lines.number::<usize>(&line, count),
                _ => Err(lines.error(&line, &format!("expected {expected}"))),
            }
        };
        let first = count(&mut lines, "a number of folds or of people")?;
        let has_folds = lines.first().len() == 1;
        let num_folds = if has_folds { first } else { 1 };
        let mut seen = HashMap::new();
        let mut folds = Vec::new();
        for fold in 0..num_folds {
            let num_people =
                if has_folds { count(&mut lines, &format!("the number of people of fold {fold}"))? } else { first };
            let mut people = Vec::new();
            for i in 1..=num_people {
                let expected = format!("person {i} of {num_people} of fold {fold}, \"name images\"");
                let line = lines.next(&expected)?;
                let [name, images] = *line.fields else {
                    return Err(lines.error(&line, &format!("expected {expected}")));
                };
                if let Some(earlier) = seen.insert(name, line.number) {
                    return Err(
                        lines.error(&line, &format!("expected each name once, {name} is in line {earlier} too"))
                    );
                }
                people.push(Person { name: name.to_owned(), num_images: lines.number(&line, images)? });
            }
            folds.push(people);
        }
        lines.end("the last fold")?;
        Ok(Self { folds })
    }

    /// Returns the names of the identities in the given folds, for [`IdentityFilter`](super::IdentityFilter). A fold
    /// that does not exist has none.
    pub fn names(&self, folds: impl IntoIterator<Item = usize>) -> Vec<String> {
        let of = |fold: usize| self.folds.get(fold).into_iter().flatten();
        folds.into_iter().flat_map(of).map(|p| p.name.clone()).collect()
    }
}

/// Draws pairs of images by their labels, without repetition and with both kinds shuffled together: up to `max_genuine`
/// of the same identity and up to `max_impostor` of different identities. `usize::MAX` returns all of them.
///
/// The same arguments return the same pairs. Every pair has `a < b` and `fold` 0. Drawing is uniform over all pairs of
/// a kind, so an identity with many images is in many pairs. Memory is that of the labels and the drawn pairs.
pub fn sample_pairs(labels: &[u32], max_genuine: usize, max_impostor: usize, seed: u64) -> Vec<Pair> {
    let mut images: Vec<usize> = (0..labels.len()).collect();
    images.sort_by_key(|&i| labels[i]);
    // All pairs of a kind are numbered identity by identity, so that a number determines its pair. Per identity: first
    // position in `images`, number of images, and the numbers of its first genuine and its first impostor pair.
    let mut groups: Vec<[usize; 4]> = Vec::new();
    let (mut start, mut num_genuine, mut num_impostor) = (0, 0, 0);
    for group in images.chunk_by(|&i, &j| labels[i] == labels[j]) {
        groups.push([start, group.len(), num_genuine, num_impostor]);
        num_genuine += group.len() * (group.len() - 1) / 2;
        num_impostor += group.len() * start; // paired with the images of earlier identities
        start += group.len();
    }
    let pair = |first: usize, second: usize, is_same| {
        let (a, b) = (images[first].min(images[second]), images[first].max(images[second]));
        Pair { a, b, is_same, fold: 0 }
    };
    let genuine = |number: usize| {
        let [start, len, first, _] = groups[groups.partition_point(|g| g[2] <= number) - 1];
        let (row, column) = ((number - first) / len, (number - first) % len);
        // Row r of the triangle of pairs (r < c) and row len - 2 - r together fill one row of a rectangle `len` wide.
        if column > row {
            pair(start + row, start + column, true)
        } else {
            pair(start + len - 2 - row, start + len - 1 - column, true)
        }
    };
    let impostor = |number: usize| {
        let [start, _, _, first] = groups[groups.partition_point(|g| g[3] <= number) - 1];
        pair(start + (number - first) / start, (number - first) % start, false)
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let drawn_genuine = index::sample(&mut rng, num_genuine, max_genuine.min(num_genuine));
    let drawn_impostor = index::sample(&mut rng, num_impostor, max_impostor.min(num_impostor));
    let mut pairs: Vec<Pair> = drawn_genuine.iter().map(genuine).chain(drawn_impostor.iter().map(impostor)).collect();
    pairs.shuffle(&mut rng);
    pairs
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to() as u64;
        Error::Format { path: path.to_owned(), offset, what: "expected UTF-8 text".to_owned() }
    })
}

/// The non-blank lines of a list, read one after the other.
struct Lines<'a> {
    path: &'a Path,
    /// In reverse order, so that `pop` returns the next line.
    rest: Vec<Line<'a>>,
    /// Number of the line after the last one, where an early end is reported.
    end: usize,
}

struct Line<'a> {
    number: usize,
    fields: Vec<&'a str>,
}

impl<'a> Lines<'a> {
    fn new(path: &'a Path, text: &'a str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = text.lines().enumerate();
        let mut rest: Vec<Line> =
            lines.map(|(i, l)| Line { number: i + 1, fields: l.split_whitespace().collect() }).collect();
        let end = rest.len() + 1;
        rest.retain(|l| !l.fields.is_empty());
        rest.reverse();
        Self { path, rest, end }
    }

    /// Returns the fields of the next line without consuming it; empty at the end.
    fn first(&self) -> &[&'a str] {
        self.rest.last().map_or(&[], |l| &l.fields)
    }

    fn next(&mut self, expected: &str) -> Result<Line<'a>> {
        self.rest.pop().ok_or_else(|| Error::Line {
            path: self.path.to_owned(),
            line: self.end,
            what: format!("expected {expected}, found the end of the file"),
        })
    }

    fn end(&mut self, last: &str) -> Result<()> {
        match self.rest.pop() {
            Some(line) => Err(self.error(&line, &format!("expected the end of the file after {last}"))),
            None => Ok(()),
        }
    }

    fn error(&self, line: &Line, expected: &str) -> Error {
        let what = format!("{expected}, found \"{}\"", line.fields.join(" "));
        Error::Line { path: self.path.to_owned(), line: line.number, what }
    }

    /// Parses a whole number from 1.
    fn number<T: FromStr + PartialOrd + From<u8>>(&self, line: &Line, field: &str) -> Result<T> {
        let number = field.parse().ok().filter(|n| *n >= T::from(1));
        number.ok_or_else(|| self.error(line, &format!("expected a whole number from 1 for \"{field}\"")))
    }

    /// Parses `name i j` or `name1 i name2 j`.
    fn pair(&self, line: &Line, fold: usize, expected: &str) -> Result<PairEntry> {
        let (a, i, b, j) = match *line.fields {
            [name, i, j] => (name, i, name, j),
            [name, _, other, _] if name == other => {
                return Err(self.error(line, "expected two different people in a line of four fields"));
            }
            [a, i, b, j] => (a, i, b, j),
            _ => return Err(self.error(line, &format!("expected {expected}"))),
        };
        let id = |name: &str, number| {
            Ok::<_, Error>(ImageId { identity: name.to_owned(), number: self.number(line, number)? })
        };
        Ok(PairEntry { a: id(a, i)?, b: id(b, j)?, is_same: a == b, fold, line: line.number })
    }
}
