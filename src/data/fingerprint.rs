//! Fingerprints of data sets, by which a training notices that its data is no longer what it was begun with.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Dataset, Splits, TestSet};
use crate::files::hex;
use crate::parallel;

/// Most images of a set of which each is hashed whole. Of more, the sizes count and the contents of this many / 10.
const MAX_HASHED: usize = 20_000;
/// Hexadecimal digits kept of a SHA-256.
const DIGITS: usize = 16;

/// Fingerprint of a data set: its people in the order of their labels, and a digest of the images of each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Number of images.
    pub num_images: usize,
    /// The people, by label.
    pub people: Vec<PersonFingerprint>,
    /// Digest of the labels of all images, in the set's order.
    pub order: String,
}

/// Fingerprint of a person's images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PersonFingerprint {
    /// Name of the person in the set.
    pub name: String,
    /// Number of images.
    pub num_images: usize,
    /// Digest of the images' file names, sizes and contents, in the set's order.
    pub images: String,
}

/// Fingerprint of a test set: its images and pairs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestFingerprint {
    /// The images.
    pub images: Fingerprint,
    /// Number of pairs.
    pub num_pairs: usize,
    /// Digest of the pairs with their labels and folds, in the protocol's order.
    pub pairs: String,
}

/// Fingerprint of everything that a training reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitsFingerprint {
    /// The students' training set.
    pub train: Fingerprint,
    /// The teacher's training set, if it is another.
    pub teacher_train: Option<Fingerprint>,
    /// The set evaluated between epochs, if it is not the test set.
    pub watch: Option<TestFingerprint>,
    /// The test set.
    pub test: TestFingerprint,
    /// The photos with real masks.
    pub real_masks: Option<TestFingerprint>,
}

impl Fingerprint {
    /// Reads what identifies `set`. Images that cannot be read count as empty.
    ///
    /// Up to 20,000 images, the contents of all are hashed; of a larger set, every image's size, where the format tells
    /// it without reading the image (all but parquet do), and the contents of 2,000 images spread evenly over the set.
    pub fn of(set: &dyn Dataset) -> Self {
        let stride = if set.len() <= MAX_HASHED { 1 } else { set.len().div_ceil(MAX_HASHED / 10) };
        let digest = |index: usize| {
            let mut hasher = Sha256::new();
            hasher.update(set.file_name(index).unwrap_or_default());
            if index.is_multiple_of(stride) {
                hasher.update(set.encoded(index).ok().flatten().unwrap_or_default());
            } else {
                hasher.update(set.encoded_len(index).unwrap_or_default().to_le_bytes());
            }
            <[u8; 32]>::from(hasher.finalize())
        };
        let mut people: Vec<(usize, Sha256)> = vec![(0, Sha256::new()); set.num_identities()];
        let mut order = Sha256::new();
        for (index, digest) in parallel::map(set.len(), digest).into_iter().enumerate() {
            let label = set.label(index);
            order.update(label.to_le_bytes());
            let (num_images, hasher) = &mut people[label as usize];
            *num_images += 1;
            hasher.update(digest);
        }
        let person = |(label, (num_images, hasher)): (usize, (usize, Sha256))| PersonFingerprint {
            name: set.identity_name(label as u32),
            num_images,
            images: digits(hasher),
        };
        let people = people.into_iter().enumerate().map(person).collect();
        Self { num_images: set.len(), people, order: digits(order) }
    }

    /// Describes the first thing in which a set differs from this one; none if they are the same.
    pub fn difference(&self, now: &Self) -> Option<String> {
        let counts = |set: &Self| format!("{} images of {} people", set.num_images, set.people.len());
        for (label, (before, now)) in self.people.iter().zip(&now.people).enumerate() {
            if before.name != now.name {
                return Some(format!("person {label} was {}, now {}", before.name, now.name));
            }
            if before.num_images != now.num_images {
                return Some(format!("{} had {} images, now {}", before.name, before.num_images, now.num_images));
            }
            if before.images != now.images {
                return Some(format!("the images of {} have changed", before.name));
            }
        }
        if (self.num_images, self.people.len()) != (now.num_images, now.people.len()) {
            return Some(format!("it had {}, now {}", counts(self), counts(now)));
        }
        (self.order != now.order).then(|| "its images are in another order".to_owned())
    }
}

impl TestFingerprint {
    /// Reads what identifies `test`; see [`Fingerprint::of`].
    pub fn of(test: &TestSet) -> Self {
        let mut hasher = Sha256::new();
        for pair in &test.pairs {
            for value in [pair.a, pair.b, pair.fold, pair.is_same.into()] {
                hasher.update((value as u64).to_le_bytes());
            }
        }
        Self { images: Fingerprint::of(test.images.as_ref()), num_pairs: test.pairs.len(), pairs: digits(hasher) }
    }

    /// Describes the first thing in which a test set differs from this one; none if they are the same.
    pub fn difference(&self, now: &Self) -> Option<String> {
        let pairs = || match self.num_pairs == now.num_pairs {
            true => (self.pairs != now.pairs).then(|| "its pairs are others".to_owned()),
            false => Some(format!("it had {} pairs, now {}", self.num_pairs, now.num_pairs)),
        };
        self.images.difference(&now.images).or_else(pairs)
    }
}

impl SplitsFingerprint {
    /// Reads what identifies the data of a training; see [`Fingerprint::of`].
    pub fn of(splits: &Splits, teacher_train: Option<&dyn Dataset>) -> Self {
        Self {
            train: Fingerprint::of(splits.train.as_ref()),
            teacher_train: teacher_train.map(Fingerprint::of),
            watch: splits.watch.as_ref().map(TestFingerprint::of),
            test: TestFingerprint::of(&splits.test),
            real_masks: splits.real_masks.as_ref().map(TestFingerprint::of),
        }
    }

    /// Returns the fingerprint of the test set.
    pub fn into_test(self) -> TestFingerprint {
        self.test
    }

    /// Describes the first thing in which data differs from this; none if it is the same.
    pub fn difference(&self, now: &Self) -> Option<String> {
        fn of<T>(name: &str, a: Option<&T>, b: Option<&T>, f: fn(&T, &T) -> Option<String>) -> Option<String> {
            match (a, b) {
                (Some(a), Some(b)) => f(a, b).map(|what| format!("{name}: {what}")),
                (None, None) => None,
                (before, _) => Some(format!("there was {} {name}", if before.is_some() { "a" } else { "no" })),
            }
        }
        let (before, set, test) = (self, Fingerprint::difference, TestFingerprint::difference);
        of("training set", Some(&before.train), Some(&now.train), set)
            .or_else(|| of("teacher's training set", before.teacher_train.as_ref(), now.teacher_train.as_ref(), set))
            .or_else(|| of("watched set", before.watch.as_ref(), now.watch.as_ref(), test))
            .or_else(|| of("test set", Some(&before.test), Some(&now.test), test))
            .or_else(|| of("set of real masks", before.real_masks.as_ref(), now.real_masks.as_ref(), test))
    }
}

fn digits(hasher: Sha256) -> String {
    let mut digits = hex(&hasher.finalize());
    digits.truncate(DIGITS);
    digits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::FaceFolder;
    use crate::error::Result;

    fn folder() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (person, images) in [("ann", 2), ("bob", 3)] {
            std::fs::create_dir(root.path().join(person)).unwrap();
            for i in 0..images {
                std::fs::write(root.path().join(person).join(format!("{i}.jpg")), format!("{person} {i}")).unwrap();
            }
        }
        root
    }

    /// What `change` changes, as the fingerprint says it.
    fn said(change: impl Fn(&std::path::Path)) -> Option<String> {
        let root = folder();
        let of = || Fingerprint::of(&FaceFolder::open(root.path()).unwrap());
        let before = of();
        change(root.path());
        before.difference(&of())
    }

    #[test]
    fn every_change_is_noticed_and_the_first_is_named() {
        assert_eq!(said(|_| ()), None);
        let rename = |from: &str, to: &str| said(|root| std::fs::rename(root.join(from), root.join(to)).unwrap());
        assert_eq!(rename("ann", "zoe").unwrap(), "person 0 was ann, now bob");
        assert_eq!(rename("bob", "bill").unwrap(), "person 1 was bob, now bill");
        assert_eq!(rename("ann/1.jpg", "bob/9.jpg").unwrap(), "ann had 2 images, now 1");
        assert_eq!(rename("ann/0.jpg", "ann/7.jpg").unwrap(), "the images of ann have changed");
        let edited = said(|root| std::fs::write(root.join("bob/2.jpg"), "bob 3").unwrap());
        assert_eq!(edited.unwrap(), "the images of bob have changed");
        let gone = said(|root| std::fs::remove_dir_all(root.join("bob")).unwrap());
        assert_eq!(gone.unwrap(), "it had 5 images of 2 people, now 2 images of 1 people");
    }

    /// A set of one-byte images of which one may be another byte, or two.
    struct Many {
        changed: usize,
        bytes: &'static [u8],
    }

    impl Dataset for Many {
        fn len(&self) -> usize {
            MAX_HASHED + 1
        }

        fn num_identities(&self) -> usize {
            7
        }

        fn label(&self, index: usize) -> u32 {
            index as u32 % 7
        }

        fn name(&self, index: usize) -> String {
            index.to_string()
        }

        fn encoded(&self, index: usize) -> Result<Option<Vec<u8>>> {
            Ok(Some(if index == self.changed { self.bytes } else { &[0] }.to_vec()))
        }

        fn encoded_len(&self, index: usize) -> Option<u64> {
            Some(if index == self.changed { self.bytes.len() as u64 } else { 1 })
        }
    }

    #[test]
    fn of_many_images_all_sizes_count_and_a_sample_of_contents() {
        let of = |changed: usize, bytes: &'static [u8]| Fingerprint::of(&Many { changed, bytes });
        let whole = of(0, &[0]);
        let said = |changed: usize, bytes: &'static [u8]| whole.difference(&of(changed, bytes));
        assert_eq!(said(5, &[0, 0]).unwrap(), "the images of 5 have changed", "its size");
        assert_eq!(said(11, &[1]).unwrap(), "the images of 4 have changed", "every eleventh is hashed");
        assert_eq!(said(5, &[1]), None);
    }
}
