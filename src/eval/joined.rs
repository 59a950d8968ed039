//! Joins score files of several systems by the names of the images.

use std::collections::HashMap;

use super::comparisons::Comparisons;
use super::score_file::{ImagePairs, Numbers, ScoreFile};
use crate::error::{Error, Result};

/// Returns the comparisons of several systems with the pairs in the order of the first. Pairs are matched by the names
/// of their images, whole or, if the files name other folders, by their last two parts; files without names are taken
/// to be in one order. A pair that is there several times is matched in its order.
///
/// # Errors
/// [`Error::Evaluation`] with the file's name when only some files name their images, or they name different pairs.
pub fn join_scores(files: Vec<(String, ScoreFile)>) -> Result<Vec<Comparisons>> {
    let num_named = files.iter().filter(|(_, file)| file.images.is_some()).count();
    if num_named != 0 && num_named != files.len() {
        let is_like = |named: bool| files.iter().find(|(_, file)| file.images.is_some() == named);
        let [with, without] = [true, false].map(|named| is_like(named).map_or("", |(name, _)| name.as_str()));
        let what = format!("expected image_a and image_b in all files or in none, found them in {with} only");
        return Err(Error::Evaluation(format!("{without}: {what}")));
    }
    let mut files = files.into_iter();
    let Some((_, first)) = files.next() else { return Ok(Vec::new()) };
    let mut joined = vec![first.comparisons];
    for (name, file) in files {
        let comparisons = match (&first.images, &file.images) {
            (Some(expected), Some(found)) => {
                let order = order(expected, found, str::to_owned).or_else(|_| order(expected, found, end_of));
                let order = order.map_err(|what| Error::Evaluation(format!("{name}: {what}")))?;
                reordered(&file.comparisons, &order)?
            }
            _ => file.comparisons,
        };
        joined.push(comparisons);
    }
    Ok(joined)
}

/// Returns the last two parts of a path, `PERSON/IMAGE`.
fn end_of(name: &str) -> String {
    let parts: Vec<&str> = name.rsplitn(3, ['/', '\\']).take(2).collect();
    parts.into_iter().rev().collect::<Vec<_>>().join("/")
}

/// Returns the places in `found` of the pairs `expected`, by the `key` of each name.
fn order(
    expected: &ImagePairs,
    found: &ImagePairs,
    key: fn(&str) -> String,
) -> std::result::Result<Vec<usize>, String> {
    if expected.pairs.len() != found.pairs.len() {
        let (expected, found) = (expected.pairs.len(), found.pairs.len());
        return Err(format!("expected {expected} pairs, as in the first file, found {found}"));
    }
    let mut numbers = Numbers::default();
    let [expected_numbers, found_numbers] =
        [expected, found].map(|images| images.names.iter().map(|name| numbers.of(&key(name))).collect::<Vec<_>>());
    let pair_of = |pair: &[u32; 2], numbers: &[u32]| {
        let mut pair = pair.map(|image| numbers[image as usize]);
        pair.sort_unstable();
        pair
    };
    let pairs = || expected.pairs.iter().map(|pair| pair_of(pair, &expected_numbers));
    if pairs().eq(found.pairs.iter().map(|pair| pair_of(pair, &found_numbers))) {
        return Ok((0..found.pairs.len()).collect());
    }
    // The last place first, so that `pop` returns the first.
    let mut places: HashMap<[u32; 2], Vec<usize>> = HashMap::new();
    let found = found.pairs.iter().enumerate().rev();
    found.for_each(|(place, pair)| places.entry(pair_of(pair, &found_numbers)).or_default().push(place));
    let place = |(number, pair): (usize, [u32; 2])| {
        let place = places.get_mut(&pair).and_then(Vec::pop);
        place.ok_or_else(|| {
            let [a, b] = expected.pairs[number].map(|image| &expected.names[image as usize]);
            format!("expected pair {} of the first file, {a} and {b}, found none", number + 1)
        })
    };
    pairs().enumerate().map(place).collect()
}

fn reordered(comparisons: &Comparisons, order: &[usize]) -> Result<Comparisons> {
    let scores = order.iter().map(|&i| comparisons.scores()[i]).collect();
    let is_same = order.iter().map(|&i| comparisons.is_same()[i]).collect();
    let people = comparisons.people().map(|people| order.iter().map(|&i| people[i]).collect());
    Comparisons::new(scores, is_same, people)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four pairs, one of them twice, from the folder `root`, in the order of `order`.
    fn file(root: &str, order: &[usize], has_names: bool) -> (String, ScoreFile) {
        let pairs = [("x/1", "x/2", true), ("x/1", "y/1", false), ("y/1", "y/2", true), ("x/1", "x/2", true)];
        let scores = [0.9, 0.1, 0.8, 0.7];
        let name = |part: &str| format!("{root}/{part}.jpg");
        let comparisons = Comparisons::new(
            order.iter().map(|&i| scores[i]).collect(),
            order.iter().map(|&i| pairs[i].2).collect(),
            None,
        );
        // Each pair with names of its own, some of which are there several times.
        let images = ImagePairs {
            names: order.iter().flat_map(|&i| [name(pairs[i].0), name(pairs[i].1)]).collect(),
            pairs: (0..order.len() as u32).map(|pair| [2 * pair, 2 * pair + 1]).collect(),
        };
        let images = has_names.then_some(images);
        let (repeated, with_itself) = (Vec::new(), Vec::new());
        let comparisons = comparisons.expect("as many labels as scores");
        (root.to_owned(), ScoreFile { comparisons, groups: None, images, repeated, with_itself })
    }

    #[test]
    fn scores_in_another_order_are_the_same_scores() {
        for root in ["a", "somewhere/else"] {
            let joined = join_scores(vec![file("a", &[0, 1, 2, 3], true), file(root, &[2, 0, 1, 3], true)]).unwrap();
            assert_eq!(joined[0], joined[1], "{root}");
        }
    }

    #[test]
    fn other_pairs_are_refused() {
        let error = |second| join_scores(vec![file("a", &[0, 1, 2, 3], true), second]).unwrap_err().to_string();
        let other = error(file("a", &[0, 1, 1, 3], true));
        assert!(other.contains("expected pair 3 of the first file, a/y/1.jpg and a/y/2.jpg, found none"), "{other}");
        assert!(error(file("a", &[0, 1, 2], true)).contains("expected 4 pairs"));
        assert!(error(file("b", &[0, 1, 2, 3], false)).contains("b: expected image_a and image_b in all files"));
    }
}
