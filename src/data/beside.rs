//! The protocol that lies beside a data set and says who is trained on and which pairs are tested: LFW's lists of people
//! and pairs, or a verification file.

use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::test_set::{DRAWN_PAIRS_FOLDS, TestSet};
use super::{PairList, People, Source};
use crate::error::{Error, Result};
use crate::files::folder_of;

/// The test protocol found beside a data set.
pub(super) enum Beside {
    Lists(LfwLists),
    /// A verification file. It does not name its people, so the whole data set is for training.
    Verification(PathBuf),
    Nothing,
}

impl Beside {
    pub fn find(source: &Source) -> Self {
        if let (Some(people), Some(pairs)) = (source.beside("people.txt"), source.beside("pairs.txt")) {
            return Self::Lists(LfwLists { people, pairs });
        }
        source.verification_beside().map_or(Self::Nothing, Self::Verification)
    }
}

/// LFW's lists of people and pairs. Folds are counted from 1.
pub(super) struct LfwLists {
    people: PathBuf,
    pairs: PathBuf,
}

impl LfwLists {
    /// Returns the people of `train_folds`, or of all folds but `test_folds` if there are none.
    pub fn train_names(&self, train_folds: &[usize], test_folds: &[usize]) -> Result<Vec<String>> {
        let people = People::read(&self.people)?;
        let num_folds = people.folds.len();
        if num_folds == 1 {
            let what = "expected folds to train on and others to test on, found one, whose pairs are all tested";
            return Err(Error::Data { path: self.people.clone(), what: what.into() });
        }
        if !train_folds.is_empty() {
            return self.names(&people, train_folds);
        }
        let others: Vec<usize> = (1..=num_folds).filter(|fold| !test_folds.contains(fold)).collect();
        self.names(&people, &others)
    }

    /// Returns the people of the folds to test on; none if there is one fold only.
    pub fn test_names(&self, test_folds: &[usize]) -> Result<Option<Vec<String>>> {
        let people = People::read(&self.people)?;
        if people.folds.len() == 1 {
            return Ok(None);
        }
        self.names(&people, test_folds).map(Some)
    }

    fn names(&self, people: &People, folds: &[usize]) -> Result<Vec<String>> {
        check_folds(&self.people, folds, people.folds.len())?;
        Ok(people.names(folds.iter().map(|fold| fold - 1)))
    }

    /// Returns the pairs of the folds to test on; `seed` is for a list without folds, as in [`listed_test`].
    pub fn test(&self, source: &Source, test_folds: &[usize], seed: u64) -> Result<TestSet> {
        let path = &self.pairs;
        let list = PairList::read_lfw(path)?;
        // A list without folds is a test of its own.
        if list.num_folds() == 1 {
            return listed_test(source, path, seed);
        }
        check_folds(path, test_folds, list.num_folds())?;
        if test_folds.len() < 2 {
            let what = "data.test_folds: expected two folds or more: the threshold for each comes from the others";
            return Err(Error::Config(what.into()));
        }
        let mut pairs = list.resolve(source.images.as_ref())?;
        pairs.retain(|p| test_folds.contains(&(p.fold + 1)));
        let description = format!("{} pairs of folds {test_folds:?} of {}", pairs.len(), folder_of(path).display());
        TestSet::new(source.images.clone(), pairs, test_folds.len(), description)
    }
}

/// Returns the pairs of a list, in all its folds; those of a list without folds are shuffled by `seed`.
pub(super) fn listed_test(source: &Source, path: &Path, seed: u64) -> Result<TestSet> {
    let list = PairList::read(path)?;
    let mut pairs = list.resolve(source.images.as_ref())?;
    let num_folds = match list.num_folds() {
        // MFR2's list names all genuine pairs first: shuffle, so that each fold has both kinds.
        0 | 1 => {
            pairs.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            DRAWN_PAIRS_FOLDS
        }
        folds => folds,
    };
    let counted = if list.counts_from_zero(source.images.as_ref()) { ", which counts images from 0" } else { "" };
    let description = format!("{} pairs of {}{counted}", pairs.len(), path.display());
    TestSet::new(source.images.clone(), pairs, num_folds, description)
}

fn check_folds(path: &Path, wanted: &[usize], num_folds: usize) -> Result<()> {
    match wanted.iter().find(|&&f| f > num_folds) {
        Some(fold) => {
            let what = format!("expected fold {fold}, found {num_folds} folds");
            Err(Error::Data { path: path.to_owned(), what })
        }
        None if wanted.is_empty() => {
            Err(Error::Data { path: path.to_owned(), what: "expected at least one fold to be chosen".into() })
        }
        None => Ok(()),
    }
}
