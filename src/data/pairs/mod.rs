//! Pairs of images to compare: lists of pairs and of people, and pairs drawn from labels.

mod entry;
mod form;
mod list;
mod people;
mod resolve;

use rand::SeedableRng;
use rand::seq::{SliceRandom, index};
use rand_chacha::ChaCha8Rng;

pub use entry::{ImageId, PairEntry};
pub use list::PairList;
pub use people::{People, Person};
pub(in crate::data) use resolve::{count_images, list_number};

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
