//! All-pairs protocol: every unmasked image against every masked one, as in insightface's Masked Face Recognition
//! challenge (Deng et al., ICCV Workshops 2021), and all pairs within the unmasked and within the masked images.

use std::collections::BTreeMap;

use image::RgbImage;

use super::comparisons::Comparisons;
use super::config::{EvalConfig, Setting};
use super::embed::{Embeddings, embed};
use super::masked_faces::MaskedFaces;
use super::similarity::for_each_row;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::models::Model;

/// Maximum number of comparisons per setting; each takes 17 bytes.
const MAX_PAIRS: usize = 500_000_000;

/// All pairs of an image of one list and an image of another, except an image with itself. Within a single list each
/// pair comes once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllPairs {
    a: Vec<usize>,
    b: Vec<usize>,
    rows: Vec<Row>,
    num: usize,
}

/// Pairs of one image of the first list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    /// Number of pairs in the rows before.
    offset: usize,
    /// Index in the second list of the first image of this row.
    start: usize,
    /// Index in the second list of the image itself, which is skipped.
    skip: Option<usize>,
}

impl AllPairs {
    /// All pairs of two different `images`, each once.
    fn within(images: &[usize]) -> Self {
        Self::new(images, images, |row| (row + 1, None))
    }

    /// Every image of `a` with every image of `b`, except itself; both lists are ascending.
    fn across(a: &[usize], b: &[usize]) -> Self {
        Self::new(a, b, |row| (0, b.binary_search(&a[row]).ok()))
    }

    fn new(a: &[usize], b: &[usize], range: impl Fn(usize) -> (usize, Option<usize>)) -> Self {
        let mut num = 0usize;
        let rows = (0..a.len()).map(|row| {
            let (start, skip) = range(row);
            let offset = num;
            num += b.len() - start - usize::from(skip.is_some());
            Row { offset, start, skip }
        });
        let rows = rows.collect();
        Self { a: a.to_vec(), b: b.to_vec(), rows, num }
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.num
    }

    /// Whether there are no pairs.
    pub fn is_empty(&self) -> bool {
        self.num == 0
    }

    /// Returns the two images of pair `k`, in the order of the comparisons; none if there is no such pair.
    pub fn images(&self, k: usize) -> Option<[usize; 2]> {
        (k < self.num).then(|| self.images_of(k))
    }

    /// Like [`Self::images`], for a pair that exists.
    pub(crate) fn images_of(&self, k: usize) -> [usize; 2] {
        // Rows without pairs share their offset with the next.
        let row = self.rows.partition_point(|row| row.offset <= k) - 1;
        let Row { offset, start, skip } = self.rows[row];
        let column = start + k - offset;
        let column = column + usize::from(skip.is_some_and(|skip| column >= skip));
        [self.a[row], self.b[column]]
    }

    /// Returns the dot product of every pair; `label` maps an image to its identity. `None` if there are no genuine or
    /// no impostor pairs.
    fn compare(&self, a: &Embeddings, b: &Embeddings, label: impl Fn(usize) -> u32) -> Result<Option<Comparisons>> {
        if self.num > MAX_PAIRS {
            let what = format!("expected at most {MAX_PAIRS} pairs, found {}: use fewer images", self.num);
            return Err(Error::Evaluation(what));
        }
        let mut scores = Vec::with_capacity(self.num);
        let mut people = Vec::with_capacity(self.num);
        for_each_row(a, b, |row, products| {
            let Row { start, skip, .. } = self.rows[row];
            for column in (start..self.b.len()).filter(|&column| Some(column) != skip) {
                scores.push(f64::from(products[column]));
                people.push([label(self.a[row]), label(self.b[column])]);
            }
            Ok(())
        })?;
        let is_same: Vec<bool> = people.iter().map(|[a, b]| a == b).collect();
        let num_genuine = is_same.iter().filter(|is_same| **is_same).count();
        if num_genuine == 0 || num_genuine == is_same.len() {
            return Ok(None);
        }
        Comparisons::new(scores, is_same, Some(people)).map(Some)
    }
}

/// Compares all images of a set with each other. `worn[i]` says whether the person in image `i` wears a mask. Without
/// `worn`, every image is used twice, clean and with a synthetic mask. Settings without genuine or without impostor
/// pairs are left out. `progress(done, total)` counts embedded images.
///
/// # Errors
/// When an image cannot be read or masked, the network fails, a setting has too many pairs, or no setting is left.
pub fn compare_all_pairs(
    model: &Model,
    images: &dyn Dataset,
    worn: Option<&[bool]>,
    config: &EvalConfig,
    mut progress: impl FnMut(usize, usize),
) -> Result<BTreeMap<Setting, (AllPairs, Comparisons)>> {
    config.validate()?;
    let all: Vec<usize> = (0..images.len()).collect();
    let with = |is_worn: bool| all.iter().copied().filter(|&i| worn.is_none_or(|worn| worn[i] == is_worn)).collect();
    let (unmasked, masked): (Vec<usize>, Vec<usize>) = (with(false), with(true));
    let total = unmasked.len() + masked.len();
    let masked_faces = MaskedFaces::new(images, config)?;
    let photo = |image: usize| -> Result<RgbImage> { Ok(images.get(image)?.image) };
    let u = embed(model, unmasked.len(), |row| photo(unmasked[row]), config.embedding(), |n| progress(n, total))?;
    let masked_face = |row: usize| match worn {
        Some(_) => photo(masked[row]),
        None => masked_faces.get(masked[row]),
    };
    let done = |n| progress(unmasked.len() + n, total);
    let m = embed(model, masked.len(), masked_face, config.embedding(), done)?;
    let label = |image: usize| images.label(image);
    let mut found = BTreeMap::new();
    // The pairs of M-U are the same as those of U-M.
    for setting in Setting::TABLE {
        let (pairs, a, b) = match setting {
            Setting::UU => (AllPairs::within(&unmasked), &u, &u),
            Setting::UM | Setting::MU => (AllPairs::across(&unmasked, &masked), &u, &m),
            Setting::MM => (AllPairs::within(&masked), &m, &m),
        };
        if let Some(comparisons) = pairs.compare(a, b, label)? {
            found.insert(setting, (pairs, comparisons));
        }
    }
    if found.is_empty() {
        let (u, m) = (unmasked.len(), masked.len());
        let what =
            format!("expected genuine and impostor pairs among {u} images without and {m} with masks, found none");
        return Err(Error::Evaluation(what));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::dot;

    #[test]
    fn pairs_are_numbered_as_they_are_compared() {
        let (a, b) = (vec![0, 2, 3, 7], vec![1, 3, 5, 7, 9]);
        let cosines = |n: usize| Embeddings::new((0..2 * n).map(|i| (i as f32).cos()).collect(), 2).unwrap();
        let label = |image: usize| (image / 3) as u32;
        for pairs in [AllPairs::across(&a, &b), AllPairs::within(&b), AllPairs::within(&a)] {
            let (x, y) = (cosines(pairs.a.len()), cosines(pairs.b.len()));
            let comparisons = pairs.compare(&x, &y, label).unwrap().unwrap();
            assert_eq!(comparisons.len(), pairs.len());
            for k in 0..pairs.len() {
                let images = pairs.images_of(k);
                assert_eq!(comparisons.people().unwrap()[k], images.map(label));
                let row = |list: &[usize], image| list.iter().position(|i| *i == image).unwrap();
                let [i, j] = [row(&pairs.a, images[0]), row(&pairs.b, images[1])];
                assert!((comparisons.scores()[k] - dot(&x[i], &y[j])).abs() < 1e-6);
                assert_ne!(images[0], images[1]);
            }
        }
        assert_eq!((AllPairs::across(&a, &b).len(), AllPairs::within(&b).len()), (18, 10));
        assert_eq!(AllPairs::within(&b).images(9), Some([7, 9]));
        assert!(AllPairs::within(&[4]).is_empty());
        // Two images of one person: no impostor pair.
        assert_eq!(AllPairs::within(&[3, 5]).compare(&cosines(2), &cosines(2), label).unwrap(), None);
    }
}
