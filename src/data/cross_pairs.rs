//! Draws pairs of images under two conditions, and writes lists of pairs.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::path::Path;

use rand::seq::{SliceRandom, index};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::pairs::{count_images, list_number};
use super::{Dataset, Pair};
use crate::error::{Error, Result};

/// Up to this many combinations of reference and probe, impostor pairs are listed and drawn from the list; above,
/// combinations are drawn until enough are distinct.
const MAX_LISTED: usize = 1 << 22;

/// Draws pairs of a reference and a probe, such as a clean face and a masked one, without repetition and with both
/// kinds shuffled together: up to `max_genuine` of the same identity and up to `max_impostor` of different identities.
///
/// `is_probe` holds for each image whether it is a probe, a reference (`Some(false)`) or neither (`None`). The same
/// arguments return the same pairs. In every pair `a` is the reference, `b` the probe and `fold` 0. Drawing is uniform
/// over all pairs of a kind.
pub fn sample_cross_pairs(
    labels: &[u32],
    is_probe: &[Option<bool>],
    max_genuine: usize,
    max_impostor: usize,
    seed: u64,
) -> Vec<Pair> {
    let of_kind = |probe: bool| (0..labels.len()).filter(move |&i| is_probe[i] == Some(probe));
    let mut people: BTreeMap<u32, [Vec<usize>; 2]> = BTreeMap::new();
    for (kind, probe) in [false, true].into_iter().enumerate() {
        of_kind(probe).for_each(|i| people.entry(labels[i]).or_default()[kind].push(i));
    }
    let genuine = people.values().flat_map(|[references, probes]| {
        references.iter().flat_map(|&a| probes.iter().map(move |&b| Pair { a, b, is_same: true, fold: 0 }))
    });
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let genuine: Vec<Pair> = genuine.collect();
    let num = max_genuine.min(genuine.len());
    let mut pairs: Vec<Pair> = index::sample(&mut rng, genuine.len(), num).iter().map(|i| genuine[i]).collect();
    let (references, probes): (Vec<usize>, Vec<usize>) = (of_kind(false).collect(), of_kind(true).collect());
    let num_all = references.len() * probes.len();
    let wanted = max_impostor.min(num_all - genuine.len());
    let impostor = |number: usize| {
        let (a, b) = (references[number / probes.len()], probes[number % probes.len()]);
        (labels[a] != labels[b]).then_some(Pair { a, b, is_same: false, fold: 0 })
    };
    if num_all <= MAX_LISTED {
        let all: Vec<Pair> = (0..num_all).filter_map(impostor).collect();
        pairs.extend(index::sample(&mut rng, all.len(), wanted).iter().map(|i| all[i]));
    } else {
        let mut drawn = HashSet::new();
        while drawn.len() < wanted {
            let number = rng.random_range(0..num_all);
            if let Some(pair) = impostor(number)
                && drawn.insert(number)
            {
                pairs.push(pair);
            }
        }
    }
    pairs.shuffle(&mut rng);
    pairs
}

/// Returns pairs in LFW's format: a line `folds n`, then per fold `n` genuine and `n` impostor pairs, with the largest
/// `n` that both kinds allow.
///
/// # Errors
/// When an image is not named `PERSON_NUMBER`, a person's name contains blanks, or there are too few pairs for the
/// folds.
pub fn lfw_list(images: &dyn Dataset, pairs: &[Pair], num_folds: usize, path: &Path) -> Result<String> {
    let error = |what: String| Error::Data { path: path.to_owned(), what };
    let [genuine, impostor] =
        [true, false].map(|is_same| pairs.iter().filter(|pair| pair.is_same == is_same).collect::<Vec<_>>());
    let per_fold = genuine.len().min(impostor.len()) / num_folds.max(1);
    if per_fold == 0 {
        let what = format!(
            "expected a genuine and an impostor pair for each of {num_folds} folds, found {} and {}",
            genuine.len(),
            impostor.len()
        );
        return Err(error(what));
    }
    let counted = count_images(images);
    let name = |index: usize| {
        let identity = images.identity_name(images.label(index));
        match list_number(images, index, &identity, counted[index]).filter(|_| !identity.contains(char::is_whitespace))
        {
            Some(number) => Ok((identity, number)),
            None => Err(error(format!(
                "LFW's format needs images named PERSON_NUMBER, found {}; write a .csv or .bin",
                images.name(index)
            ))),
        }
    };
    let mut text = format!("{num_folds}\t{per_fold}\n");
    for fold in 0..num_folds {
        for pair in genuine[fold * per_fold..][..per_fold].iter().chain(&impostor[fold * per_fold..][..per_fold]) {
            let ((a, i), (b, j)) = (name(pair.a)?, name(pair.b)?);
            // Writing to a string cannot fail.
            let _ = match pair.is_same {
                true => writeln!(text, "{a}\t{i}\t{j}"),
                false => writeln!(text, "{a}\t{i}\t{b}\t{j}"),
            };
        }
    }
    Ok(text)
}

/// Returns pairs as a CSV with the columns `a`, `b` and `same`, for [`read_photo_pairs`](super::read_photo_pairs).
///
/// # Errors
/// When the data set does not name its images.
pub fn csv_list(images: &dyn Dataset, pairs: &[Pair], path: &Path) -> Result<String> {
    let name = |index: usize| {
        images.person_and_file(index).ok_or_else(|| Error::Data {
            path: path.to_owned(),
            what: "the images of the data set have no names: write a .txt or .bin".to_owned(),
        })
    };
    let wrong = |e: &dyn std::fmt::Display| Error::Data { path: path.to_owned(), what: e.to_string() };
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["a", "b", "same"]).map_err(|e| wrong(&e))?;
    for pair in pairs {
        let same = if pair.is_same { "1" } else { "0" };
        writer.write_record([&name(pair.a)?, &name(pair.b)?, same]).map_err(|e| wrong(&e))?;
    }
    let bytes = writer.into_inner().map_err(|e| wrong(&e))?;
    String::from_utf8(bytes).map_err(|e| wrong(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_cross_the_conditions_and_come_once() {
        let labels: Vec<u32> = (0..60).map(|i| i / 6).collect();
        let is_probe: Vec<Option<bool>> = (0..60).map(|i| [Some(false), Some(true), None][i % 3]).collect();
        let pairs = sample_cross_pairs(&labels, &is_probe, usize::MAX, usize::MAX, 7);
        // Ten people with two references and two probes each.
        assert_eq!(pairs.iter().filter(|p| p.is_same).count(), 40);
        assert_eq!(pairs.iter().filter(|p| !p.is_same).count(), 360);
        let distinct: HashSet<(usize, usize)> = pairs.iter().map(|p| (p.a, p.b)).collect();
        assert_eq!(distinct.len(), 400);
        for pair in &pairs {
            assert_eq!((is_probe[pair.a], is_probe[pair.b]), (Some(false), Some(true)));
            assert_eq!(pair.is_same, labels[pair.a] == labels[pair.b]);
        }
        let few = |seed| sample_cross_pairs(&labels, &is_probe, 5, 9, seed);
        assert_eq!((few(1), few(1).len()), (few(1), 14));
        assert_ne!(few(1), few(2));
        assert!(sample_cross_pairs(&labels, &[None; 60], 5, 5, 0).is_empty());
    }
}
