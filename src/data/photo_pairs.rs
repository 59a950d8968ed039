//! Pairs of image files listed in a CSV and compared without synthetic masks, for photos with real masks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::image_files::ImageFiles;
use super::test_set::DRAWN_PAIRS_FOLDS;
use super::{Dataset, ImageId, Pair, PairList, TestSet};
use crate::error::Result;
use crate::files::folder_of;
use crate::lists::plain_path;

/// Reads a list of pairs of image files, in one of the forms of [`PairList::read`]: two files and whether they show one
/// person. Files are relative to the folder `images/` beside the list if there is one, otherwise to the list's own
/// folder.
///
/// Pairs are shuffled by `seed`, so that every fold of LFW's accuracy has both kinds.
///
/// # Errors
/// When the list cannot be read, a row is malformed or contradicts another, a file is missing, or there is no pair of
/// one kind.
pub fn read_photo_pairs(path: &Path, seed: u64) -> Result<TestSet> {
    let list = PairList::read(path)?;
    let folder = folder_of(path);
    let root = [folder.join("images"), folder.to_owned()].into_iter().find(|p| p.is_dir()).unwrap_or_default();
    let mut files: Vec<PathBuf> = Vec::new();
    let (mut index_of, mut index_of_file) = (BTreeMap::new(), BTreeMap::new());
    let mut pairs = Vec::new();
    let mut seen: BTreeMap<(usize, usize), (bool, usize)> = BTreeMap::new();
    for entry in list.entries() {
        let mut index = |id: &ImageId| {
            let ImageId::File(name) = id else {
                let what = "expected two image files and 1 or 0, found names of people: give such a list as --pairs";
                return Err(list.error(entry, what.to_owned()));
            };
            if let Some(&index) = index_of.get(name) {
                return Ok(index);
            }
            // Behind a link `..` leads elsewhere than its text says, and a backslash may be part of a name.
            let (plain, file) = (root.join(plain_path(name)), root.join(name));
            let is_same = match (plain.canonicalize(), file.canonicalize()) {
                (Ok(plain), Ok(file)) => plain == file,
                (plain, _) => plain.is_ok(),
            };
            let file = if is_same { plain } else { file };
            if let Some(&index) = index_of_file.get(&file) {
                return Ok(index);
            }
            if !file.is_file() {
                return Err(list.error(entry, format!("expected an image {}, found none", file.display())));
            }
            index_of.insert(name.clone(), files.len());
            index_of_file.insert(file.clone(), files.len());
            files.push(file);
            Ok(files.len() - 1)
        };
        let (a, b, is_same) = (index(&entry.a)?, index(&entry.b)?, entry.is_same);
        if a == b && !is_same {
            return Err(list.error(entry, format!("expected different people, found {} twice", entry.a)));
        }
        let (before, line) = *seen.entry((a.min(b), a.max(b))).or_insert((is_same, entry.line));
        if before != is_same {
            let kind = if is_same { "the same person" } else { "different people" };
            return Err(list.error(entry, format!("expected what line {line} says of this pair, found {kind}")));
        }
        pairs.push(Pair { a, b, is_same, fold: 0 });
    }
    let photos = ImageFiles::new(&root, files);
    let contradicts = |pair: &&Pair| (photos.label(pair.a) == photos.label(pair.b)) != pair.is_same;
    let unlike_folders = match pairs.iter().filter(contradicts).count() {
        0 => String::new(),
        num => format!(", {num} of them unlike the folders, which then count for nothing"),
    };
    pairs.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let description = format!("{} pairs of {}, as they are{unlike_folders}", pairs.len(), path.display());
    TestSet::new(Arc::new(photos), pairs, DRAWN_PAIRS_FOLDS, description)
}
