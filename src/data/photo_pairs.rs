//! Pairs of image files listed in a CSV and compared without synthetic masks, for photos with real masks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::decode::read_bytes;
use super::test_set::DRAWN_PAIRS_FOLDS;
use super::{Dataset, Pair, TestSet};
use crate::error::{Error, Result};
use crate::files::folder_of;

/// Reads a list of pairs: a CSV whose first row names three columns, two of image files and one, `same` or `is_same`,
/// of 1 or 0 (or true or false). Files are relative to the folder `images/` beside the list if there is one, otherwise
/// to the list's own folder.
///
/// Pairs are shuffled by `seed`, so that every fold of LFW's accuracy has both kinds.
///
/// # Errors
/// When the list cannot be read, a row is malformed, a file is missing, or there is no pair of one kind.
pub fn read_photo_pairs(path: &Path, seed: u64) -> Result<TestSet> {
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(std::io::BufReader::new(file));
    let wrong = |line: u64, what: String| Error::Line { path: path.to_owned(), line: line as usize, what };
    let header = reader.headers().map_err(|e| wrong(1, e.to_string()))?.clone();
    if header.len() != 3 || !matches!(&header[2], "same" | "is_same") {
        let found: Vec<&str> = header.iter().collect();
        return Err(wrong(1, format!("expected two columns of files and one named same, found {found:?}")));
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let root = [folder.join("images"), folder.to_owned()].into_iter().find(|p| p.is_dir()).unwrap_or_default();
    let mut files: Vec<PathBuf> = Vec::new();
    let mut index_of = BTreeMap::new();
    let mut pairs = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|e| wrong(e.position().map_or(0, csv::Position::line), e.to_string()))?;
        let line = record.position().map_or(0, csv::Position::line);
        let mut index = |name: &str| {
            if let Some(&index) = index_of.get(name) {
                return Ok(index);
            }
            let file = root.join(name);
            if !file.is_file() {
                return Err(wrong(line, format!("expected an image {}, found none", file.display())));
            }
            index_of.insert(name.to_owned(), files.len());
            files.push(file);
            Ok(files.len() - 1)
        };
        let is_same = match &record[2] {
            "1" | "true" => true,
            "0" | "false" => false,
            other => return Err(wrong(line, format!("{}: expected 1 or 0, found {other:?}", &header[2]))),
        };
        pairs.push(Pair { a: index(&record[0])?, b: index(&record[1])?, is_same, fold: 0 });
    }
    pairs.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let description = format!("{} pairs of {}, as they are", pairs.len(), path.display());
    TestSet::new(Arc::new(Photos::new(files)), pairs, DRAWN_PAIRS_FOLDS, description)
}

/// Image files. Each folder counts as one person; [`TestSet::people`] drops the labels if the pairs contradict them.
struct Photos {
    files: Vec<PathBuf>,
    labels: Vec<u32>,
    people: Vec<String>,
}

impl Photos {
    fn new(files: Vec<PathBuf>) -> Self {
        let folder = |file: &PathBuf| folder_of(file).display().to_string();
        let mut people: Vec<String> = files.iter().map(folder).collect();
        people.sort();
        people.dedup();
        let label = |file| people.binary_search(&folder(file)).expect("the folder of every file was taken") as u32;
        Self { labels: files.iter().map(label).collect(), files, people }
    }
}

impl Dataset for Photos {
    fn len(&self) -> usize {
        self.files.len()
    }

    fn num_identities(&self) -> usize {
        self.people.len()
    }

    fn label(&self, index: usize) -> u32 {
        self.labels[index]
    }

    fn identity_name(&self, label: u32) -> String {
        self.people[label as usize].clone()
    }

    fn name(&self, index: usize) -> String {
        self.files[index].display().to_string()
    }

    fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
        read_bytes(&self.files[index]).map(Some)
    }

    fn encoded_len(&self, index: usize) -> Option<u64> {
        self.files[index].metadata().ok().map(|data| data.len())
    }
}
