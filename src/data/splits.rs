//! Opens the training and test sets that the settings describe.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::beside::{Beside, listed_test};
use super::photo_pairs::read_photo_pairs;
use super::test_set::{DRAWN_PAIRS_FOLDS, TestSet};
use super::{
    Cached, Dataset, IdentityFilter, PairList, ProceduralConfig, ProceduralFaces, Source, Subset, Unlabelled,
    VerificationFaces, open_source_with, sample_pairs,
};
use crate::error::{Error, Result};

/// Most procedural images; they are indexed in memory, and a larger number is a mistake.
const MAX_PROCEDURAL_IMAGES: usize = 10_000_000;
/// Most images that the cache holds: 11 GB.
const MAX_CACHED_IMAGES: usize = 300_000;

/// Data settings: where faces come from, and who is kept for testing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// A data set in any format that [`open_source`](super::open_source) knows; procedural faces if absent. If
    /// `people.txt` and `pairs.txt` in LFW's format [belong to it](Source::beside), they decide who is trained on and
    /// which pairs are tested.
    pub root: Option<PathBuf>,
    /// Pairs to test on instead: a list of images in `root` that [`PairList`](super::PairList) reads, or a verification
    /// file (`.bin`) with its own images.
    pub pairs: Option<PathBuf>,
    /// Pairs of photos with real masks to test on as well, without synthetic masks: a list for
    /// [`read_photo_pairs`](super::read_photo_pairs).
    pub real_masks: Option<PathBuf>,
    /// Whether the recipe is for real faces and refuses to run on procedural ones.
    pub requires_root: bool,
    /// Seed that decides who is kept for testing and which pairs are drawn, where no list does. It is independent of
    /// the training seed, so that all trainings are tested on the same unseen people.
    pub split_seed: u64,
    /// Whether the training images have labels: with `none`, those of `root` are ignored, and only distillation can use
    /// the images.
    pub labels: Labels,
    /// Further training images whose labels are not used or not known: a data set in any format, or a folder of aligned
    /// crops. Distillation learns from them, the margin loss does not.
    pub unlabelled: Option<PathBuf>,
    /// Identities with fewer images are left out of training.
    pub min_images: usize,
    /// Folds of `people.txt` to train on, from 1; all that are not in `test_folds` if empty.
    pub train_folds: Vec<usize>,
    /// Folds of `people.txt` and `pairs.txt` to test on, from 1.
    pub test_folds: Vec<usize>,
    /// Share of the identities kept for testing where no list decides.
    pub test_share: f64,
    /// Share of the training identities that is held out for validation between epochs (`watch.every`). With 0 the test
    /// set is watched, and anything selected by it is no longer tested on unseen people.
    pub watch_share: f64,
    /// Most pairs of each kind, genuine and impostor, drawn where no list names pairs.
    pub max_pairs: usize,
    /// Whether to keep the training images decoded in memory, 37 kB each.
    pub cache: bool,
    /// Policy for training images that cannot be decoded, and for truncated archives; every test image must be
    /// readable.
    pub on_broken: OnBroken,
    /// The training set if `root` is absent.
    pub procedural: ProceduralConfig,
    /// The training set of the teacher if `root` is absent: identities that neither the students nor the test see.
    /// `procedural` if absent.
    pub procedural_teacher: Option<ProceduralConfig>,
    /// Size of the procedural test set, whose identities follow the training set's.
    pub procedural_test: ProceduralTest,
}

/// What is known of the training images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Labels {
    /// Who they show.
    #[default]
    Identities,
    /// Nothing, or nothing that is used.
    None,
}

/// Policy for training images that cannot be decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBroken {
    /// Stop with the image's error.
    #[default]
    Fail,
    /// Use another image and count the broken one.
    Skip,
}

/// Size of the procedural test set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProceduralTest {
    /// Number of identities.
    pub num_identities: usize,
    /// Images per identity.
    pub images_per_identity: usize,
}

impl Default for ProceduralTest {
    fn default() -> Self {
        Self { num_identities: 80, images_per_identity: 5 }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            root: None,
            pairs: None,
            real_masks: None,
            requires_root: false,
            split_seed: 0,
            labels: Labels::Identities,
            unlabelled: None,
            min_images: 2,
            train_folds: Vec::new(),
            test_folds: vec![6, 7],
            test_share: 0.2,
            watch_share: 0.0,
            max_pairs: 20_000,
            cache: true,
            on_broken: OnBroken::Fail,
            procedural: ProceduralConfig::default(),
            procedural_teacher: None,
            procedural_test: ProceduralTest::default(),
        }
    }
}

/// A training set and its test sets. Training and test identities are disjoint, unless the test images come from a
/// verification file or from [`DataConfig::real_masks`].
pub struct Splits {
    /// The training set.
    pub train: Arc<dyn Dataset>,
    /// The test set.
    pub test: TestSet,
    /// The validation set to watch during training, if it is not the test set.
    pub watch: Option<TestSet>,
    /// Pairs of photos with real masks to test on as well.
    pub real_masks: Option<TestSet>,
    /// Description of the data set at [`DataConfig::root`], for the user.
    pub found: Option<String>,
}

impl DataConfig {
    /// Checks that the settings are in range and fit together.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Config(format!("data.{what}")));
        if !(self.test_share > 0.0 && self.test_share < 1.0) {
            return wrong(format!("test_share: expected above 0 and below 1, found {}", self.test_share));
        }
        if !(0.0..1.0).contains(&self.watch_share) {
            return wrong(format!("watch_share: expected 0 to below 1, found {}", self.watch_share));
        }
        if self.requires_root && self.root.is_none() {
            return wrong("root: this recipe is for real faces; name a data set (--data PATH)".into());
        }
        if self.pairs.as_ref().is_some_and(|pairs| !is_verification(pairs)) && self.root.is_none() {
            return wrong("pairs: a list of pairs needs data.root too, the data set with its images".into());
        }
        let test = self.procedural_test_faces();
        let teacher = self.procedural_teacher.iter().map(|faces| ("procedural_teacher", faces));
        for (name, faces) in [("procedural", &self.procedural), ("procedural_test", &test)].into_iter().chain(teacher) {
            faces.validate()?;
            let images = faces.num_identities.saturating_mul(faces.images_per_identity);
            if images > MAX_PROCEDURAL_IMAGES {
                return wrong(format!("{name}: expected up to {MAX_PROCEDURAL_IMAGES} images, found {images}"));
            }
        }
        if let Some(teacher) = &self.procedural_teacher {
            let range = |faces: &ProceduralConfig| {
                faces.first_identity..faces.first_identity.saturating_add(faces.num_identities as u64)
            };
            let (seen, tested) = (range(teacher), range(&test));
            if teacher.seed == test.seed && seen.start < tested.end && tested.start < seen.end {
                return wrong(format!(
                    "procedural_teacher: the teacher sees identities {seen:?}, the test is on {tested:?}"
                ));
            }
        }
        if self.max_pairs == 0 {
            return wrong("max_pairs: expected at least 1, found 0".into());
        }
        if self.train_folds.iter().chain(&self.test_folds).any(|&f| f == 0) {
            return wrong("train_folds, test_folds: folds are counted from 1, found 0".into());
        }
        let mut folds: Vec<usize> = self.train_folds.iter().chain(&self.test_folds).copied().collect();
        folds.sort_unstable();
        if let Some(twice) = folds.windows(2).find(|w| w[0] == w[1]) {
            return wrong(format!("train_folds, test_folds: fold {} is named twice", twice[0]));
        }
        Ok(())
    }

    /// Opens the training set and the test sets.
    ///
    /// # Errors
    /// When a folder, list or image is missing or broken, or nobody is left to train or test on.
    pub fn open(&self) -> Result<Splits> {
        self.validate()?;
        let source = self.open_root()?;
        let (train, watch) = self.train_of(source.as_ref())?;
        Ok(Splits {
            train: self.with_unlabelled(train)?,
            watch,
            test: self.test_of(source.as_ref())?,
            real_masks: self.open_real_masks()?,
            found: source.map(|source| source.to_string()),
        })
    }

    /// Opens the training set only.
    ///
    /// # Errors
    /// Same as [`Self::open`].
    pub fn open_train(&self) -> Result<Arc<dyn Dataset>> {
        self.with_unlabelled(self.train_of(self.open_root()?.as_ref())?.0)
    }

    /// Opens the test set only.
    ///
    /// # Errors
    /// Same as [`Self::open`].
    pub fn open_test(&self) -> Result<TestSet> {
        match &self.pairs {
            // A verification file has its own images: `root` is not opened.
            Some(pairs) if is_verification(pairs) => self.test_of(None),
            _ => self.test_of(self.open_root()?.as_ref()),
        }
    }

    /// Opens all images of the people to test on, with a description for the user: those of `test_folds` if
    /// `people.txt` with folds belongs to the data set, else everybody in it.
    ///
    /// # Errors
    /// Same as [`Self::open`]; also when there is no [`Self::root`].
    pub fn open_test_images(&self) -> Result<(Arc<dyn Dataset>, String)> {
        self.validate()?;
        let Some(source) = self.open_root()? else {
            return Err(Error::Config("data.root: expected a data set, found none".into()));
        };
        let names = match Beside::find(&source) {
            Beside::Lists(lists) => lists.test_names(&self.test_folds)?,
            _ => None,
        };
        let Some(names) = names else { return Ok((source.images.clone(), source.to_string())) };
        let filter = IdentityFilter { min_images: 1, names: Some(names) };
        let images = Subset::new(source.images, &filter, &source.path)?;
        let (num, people, folds) = (images.len(), images.num_identities(), &self.test_folds);
        let path = source.path.display();
        Ok((Arc::new(images), format!("{num} images of the {people} people of folds {folds:?} of {path}")))
    }

    /// Opens the teacher's training set, if it is not the students'.
    ///
    /// # Errors
    /// When a setting is out of range.
    pub fn open_teacher_train(&self) -> Result<Option<Arc<dyn Dataset>>> {
        self.validate()?;
        let faces = self.procedural_teacher.as_ref().filter(|_| self.root.is_none());
        faces.map(|faces| self.cached(Arc::new(ProceduralFaces::new(faces.clone())?))).transpose()
    }

    /// Returns a training set with the images that have no label.
    fn with_unlabelled(&self, train: Arc<dyn Dataset>) -> Result<Arc<dyn Dataset>> {
        let train: Arc<dyn Dataset> = match self.labels {
            Labels::Identities => train,
            Labels::None => Arc::new(Unlabelled::new(train)),
        };
        let Some(path) = &self.unlabelled else { return Ok(train) };
        let others = self.cached(Unlabelled::open(path, self.on_broken)?)?;
        Ok(Arc::new(Unlabelled::beside(train, others)))
    }

    fn open_root(&self) -> Result<Option<Source>> {
        self.root.as_deref().map(|root| open_source_with(root, self.on_broken)).transpose()
    }

    /// Returns the training set, and the set to watch if there is one.
    fn train_of(&self, source: Option<&Source>) -> Result<(Arc<dyn Dataset>, Option<TestSet>)> {
        let all = self.all_but_test(source)?;
        if self.watch_share == 0.0 {
            return Ok((all, None));
        }
        let mut labels: Vec<usize> = (0..all.num_identities()).collect();
        labels.shuffle(&mut ChaCha8Rng::seed_from_u64(self.split_seed));
        let num = (self.watch_share * labels.len() as f64).ceil() as usize;
        let part = |labels: &[usize], min_images: usize| {
            let mut is_wanted = vec![false; all.num_identities()];
            labels.iter().for_each(|label| is_wanted[*label] = true);
            Subset::of(all.clone(), &is_wanted, min_images)
        };
        let (Some(watched), Some(train)) = (part(&labels[..num], 2), part(&labels[num..], 1)) else {
            let what = format!(
                "watch_share: {} of {} identities leaves nobody to train on or nobody to watch",
                self.watch_share,
                labels.len()
            );
            return Err(Error::Config(format!("data.{what}")));
        };
        let description = format!("{} identities left out of training", watched.num_identities());
        Ok((Arc::new(train), Some(self.with_drawn_pairs(Arc::new(watched), description)?)))
    }

    /// Returns the images to train on or to watch.
    fn all_but_test(&self, source: Option<&Source>) -> Result<Arc<dyn Dataset>> {
        let Some(source) = source else {
            return self.cached(Arc::new(ProceduralFaces::new(self.procedural.clone())?));
        };
        let names = match (&self.pairs, Beside::find(source)) {
            (Some(pairs), _) if is_verification(pairs) => None,
            (Some(list), _) => Some(names_outside(source, list)?),
            (None, Beside::Lists(lists)) => Some(lists.train_names(&self.train_folds, &self.test_folds)?),
            (None, Beside::Verification(_)) => None,
            (None, Beside::Nothing) => Some(self.split_identities(source)?.0),
        };
        let filter = IdentityFilter { min_images: self.min_images, names };
        self.cached(Arc::new(Subset::new(source.images.clone(), &filter, &source.path)?))
    }

    fn test_of(&self, source: Option<&Source>) -> Result<TestSet> {
        if let Some(pairs) = self.pairs.as_deref().filter(|pairs| is_verification(pairs)) {
            return VerificationFaces::open(pairs)?.into_test(DRAWN_PAIRS_FOLDS);
        }
        let Some(source) = source else { return self.procedural_test() };
        if let Some(path) = &self.pairs {
            return listed_test(source, path, self.split_seed);
        }
        match Beside::find(source) {
            Beside::Lists(lists) => lists.test(source, &self.test_folds, self.split_seed),
            Beside::Verification(path) => VerificationFaces::open(&path)?.into_test(DRAWN_PAIRS_FOLDS),
            Beside::Nothing => {
                let filter = IdentityFilter { min_images: 2, names: Some(self.split_identities(source)?.1) };
                let images = Subset::new(source.images.clone(), &filter, &source.path)?;
                let unused = match source.unused_pairs() {
                    Some(list) => {
                        let name = list.file_name().unwrap_or_default().display();
                        format!(" ({name} alone decides nothing: give it as --pairs)")
                    }
                    None => String::new(),
                };
                let description =
                    format!("{} unseen identities of {}{unused}", images.num_identities(), source.path.display());
                self.with_drawn_pairs(Arc::new(images), description)
            }
        }
    }

    /// Opens the photos with real masks, if the settings name some.
    ///
    /// # Errors
    /// When the list or an image that it names is missing or broken.
    pub fn open_real_masks(&self) -> Result<Option<TestSet>> {
        self.real_masks.as_deref().map(|path| read_photo_pairs(path, self.split_seed)).transpose()
    }

    /// Returns the settings of the procedural test set: the identities that follow the training ones.
    fn procedural_test_faces(&self) -> ProceduralConfig {
        ProceduralConfig {
            first_identity: self.procedural.first_identity.saturating_add(self.procedural.num_identities as u64),
            num_identities: self.procedural_test.num_identities,
            images_per_identity: self.procedural_test.images_per_identity,
            ..self.procedural.clone()
        }
    }

    fn procedural_test(&self) -> Result<TestSet> {
        let config = self.procedural_test_faces();
        let description = format!("{} unseen procedural identities", config.num_identities);
        let faces = ProceduralFaces::new(config)?;
        // Every arm is evaluated on them: drawing them once saves most of the time of an evaluation.
        let images = if faces.len() <= MAX_CACHED_IMAGES { self.cached(Arc::new(faces))? } else { Arc::new(faces) };
        self.with_drawn_pairs(images, description)
    }

    fn with_drawn_pairs(&self, images: Arc<dyn Dataset>, description: String) -> Result<TestSet> {
        let labels: Vec<u32> = (0..images.len()).map(|i| images.label(i)).collect();
        let pairs = sample_pairs(&labels, self.max_pairs, self.max_pairs, self.split_seed);
        TestSet::new(images, pairs, DRAWN_PAIRS_FOLDS, description)
    }

    fn cached(&self, dataset: Arc<dyn Dataset>) -> Result<Arc<dyn Dataset>> {
        if !self.cache {
            return Ok(dataset);
        }
        if dataset.len() > MAX_CACHED_IMAGES {
            let what = format!("data.cache: {} images are too many to keep in memory; set it to false", dataset.len());
            return Err(Error::Config(what));
        }
        Ok(Arc::new(Cached::new(dataset, self.on_broken)?))
    }

    /// Splits the identities' names into training and test names, where no list decides.
    fn split_identities(&self, source: &Source) -> Result<(Vec<String>, Vec<String>)> {
        let mut names = source.images.identity_names();
        names.shuffle(&mut ChaCha8Rng::seed_from_u64(self.split_seed));
        let num_test = (names.len() as f64 * self.test_share).round() as usize;
        // Impostor pairs take two people.
        if num_test < 2 || num_test >= names.len() {
            let (num, share) = (names.len(), self.test_share);
            let remedy = match num {
                0..=3 => "expected four or more".to_owned(),
                _ => "set the share to test with --set data.test_share=0.5, or name pairs with --pairs".to_owned(),
            };
            return Err(Error::Data {
                path: source.path.clone(),
                what: format!(
                    "expected enough identities to train and to test, found {num}, of which data.test_share = {share} \
                     leaves {num_test} to test on: {remedy}"
                ),
            });
        }
        let test = names.split_off(names.len() - num_test);
        Ok((names, test))
    }
}

/// Returns the names of the identities that a list of pairs does not mention.
fn names_outside(source: &Source, list: &Path) -> Result<Vec<String>> {
    let images = source.images.as_ref();
    let pairs = PairList::read(list)?.resolve(images)?;
    let tested: BTreeSet<u32> = pairs.iter().flat_map(|pair| [pair.a, pair.b]).map(|i| images.label(i)).collect();
    let is_free = |label: &u32| !tested.contains(label);
    Ok((0..images.num_identities() as u32).filter(is_free).map(|label| images.identity_name(label)).collect())
}

/// Whether a file of pairs is one of insightface's verification files.
fn is_verification(path: &Path) -> bool {
    path.extension().is_some_and(|x| x.eq_ignore_ascii_case("bin"))
}
