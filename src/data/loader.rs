//! Training batches, prepared ahead by worker threads. Order and content depend only on the seed and the epoch, not on
//! the number of threads.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::sampling::order;
use super::transform::MaskedViews;
use super::{Dataset, OnBroken, Pixels, Sample, Transform};
use crate::error::{Error, Result};

/// Most replacements tried for a broken image.
const MAX_TRIES: usize = 100;

/// Settings of the loader.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoaderConfig {
    /// Images per batch, of all ranks together; the published recipe uses 512 on four GPUs.
    pub batch_size: usize,
    /// Worker threads that prepare batches.
    pub threads: usize,
    /// Batches that each worker thread prepares ahead.
    pub prefetch: usize,
    /// How strongly people with few images are balanced: 0 uses each image once per epoch, 1 draws each person equally
    /// often, 0.5 draws people in proportion to the square root of their number of images.
    pub balance: f64,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        Self { batch_size: 512, threads: 1, prefetch: 2, balance: 0.0 }
    }
}

impl LoaderConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        // Batch norm needs more than one image.
        if !(2..=65_536).contains(&self.batch_size) {
            return Err(Error::Config(format!("loader.batch_size: expected 2 to 65536, found {}", self.batch_size)));
        }
        if !(1..=256).contains(&self.threads) {
            return Err(Error::Config(format!("loader.threads: expected 1 to 256, found {}", self.threads)));
        }
        if !(1..=64).contains(&self.prefetch) {
            return Err(Error::Config(format!("loader.prefetch: expected 1 to 64, found {}", self.prefetch)));
        }
        if !(0.0..=1.0).contains(&self.balance) {
            return Err(Error::Config(format!("loader.balance: expected 0 to 1, found {}", self.balance)));
        }
        Ok(())
    }
}

/// A training batch: both views of each image.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The teacher's views.
    pub teacher: Pixels,
    /// The student's views: one of each image; or, if they are paired, those without a mask and then those with one.
    pub student: Pixels,
    /// Share of the crop that the mask covers, of each of the student's views.
    pub covered: Vec<f32>,
    /// Whether the teacher's view of each image is mirrored; none if the view is made anew every time it comes.
    pub mirrored: Vec<Option<bool>>,
    /// Label of each image; -1 for none.
    pub labels: Vec<i64>,
    /// Index of each image in the data set.
    pub images: Vec<u32>,
}

impl Batch {
    /// Number of the student's views of each image.
    pub fn num_views(&self) -> usize {
        self.student.num_images / self.labels.len().max(1)
    }

    /// Splits the batch into `num` parts of equal size.
    ///
    /// # Errors
    /// When `num` does not divide the number of images.
    pub fn parts(self, num: usize) -> Result<Vec<Self>> {
        let len = self.labels.len();
        if num == 0 || !len.is_multiple_of(num) {
            return Err(Error::Training(format!("a batch of {len} images cannot be split into {num} equal parts")));
        }
        if num == 1 {
            return Ok(vec![self]);
        }
        let part = |i: usize| {
            let images = i * (len / num)..(i + 1) * (len / num);
            let (mut student, mut covered) = (Pixels::new(self.student.size), Vec::new());
            for view in 0..self.num_views() {
                let of_view = view * len + images.start..view * len + images.end;
                student.append(self.student.select(of_view.clone()));
                covered.extend_from_slice(&self.covered[of_view]);
            }
            Self {
                teacher: self.teacher.select(images.clone()),
                student,
                covered,
                mirrored: self.mirrored[images.clone()].to_vec(),
                labels: self.labels[images.clone()].to_vec(),
                images: self.images[images].to_vec(),
            }
        };
        Ok((0..num).map(part).collect())
    }
}

/// Produces the batches of any epoch of a data set.
pub struct Loader {
    dataset: Arc<dyn Dataset>,
    transform: Arc<Transform>,
    config: LoaderConfig,
    input_size: usize,
    seed: u64,
    on_broken: OnBroken,
    share: Share,
}

/// Part of every batch that a loader makes.
#[derive(Clone, Copy)]
struct Share {
    rank: usize,
    num_ranks: usize,
    num_parts: usize,
}

impl Share {
    const ALL: Self = Self { rank: 0, num_ranks: 1, num_parts: 1 };

    /// Places in an epoch's order of this share of a batch of `size` images.
    fn places(self, batch: usize, size: usize) -> impl Iterator<Item = usize> {
        let Self { rank, num_ranks, num_parts } = self;
        let len = size / num_parts / num_ranks;
        (0..num_parts).flat_map(move |part| {
            let first = batch * size + (part * num_ranks + rank) * len;
            first..first + len
        })
    }
}

impl Loader {
    /// Returns a loader that scales images to `input_size` pixels square.
    ///
    /// # Errors
    /// When a setting is out of range, or the data set has fewer images than a batch.
    pub fn new(
        dataset: Arc<dyn Dataset>,
        transform: Transform,
        config: &LoaderConfig,
        input_size: usize,
        seed: u64,
    ) -> Result<Self> {
        config.validate()?;
        let transform = Arc::new(transform);
        let (config, on_broken) = (config.clone(), OnBroken::Fail);
        let loader = Self { dataset, transform, config, input_size, seed, on_broken, share: Share::ALL };
        loader.check_size()?;
        Ok(loader)
    }

    /// Returns the loader with another policy for images that cannot be decoded.
    pub fn on_broken(self, on_broken: OnBroken) -> Self {
        Self { on_broken, ..self }
    }

    /// Restricts the loader to the images of one of several ranks that train together: an equal part of each batch, of
    /// each of the `num_parts` mini-batches that it is split into. Together the ranks see what one would see, in its
    /// order.
    ///
    /// # Errors
    /// When `rank` is not below `num_ranks`, or a mini-batch has no equal parts.
    pub fn shard(self, rank: usize, num_ranks: usize, num_parts: usize) -> Result<Self> {
        if rank >= num_ranks {
            return Err(Error::Config(format!("rank {rank}: expected a rank below {num_ranks}")));
        }
        let size = self.config.batch_size;
        if num_parts == 0 || !size.is_multiple_of(num_ranks * num_parts) {
            let of_parts = if num_parts == 1 { String::new() } else { format!(" in {num_parts} mini-batches") };
            return Err(Error::Config(format!(
                "loader.batch_size: expected a multiple of {} for {num_ranks} ranks{of_parts}, found {size}",
                num_ranks * num_parts.max(1)
            )));
        }
        Ok(Self { share: Share { rank, num_ranks, num_parts }, ..self })
    }

    fn check_size(&self) -> Result<()> {
        if self.num_batches() == 0 {
            return Err(Error::Config(format!(
                "loader.batch_size: {} is more than the {} images of the data set",
                self.config.batch_size,
                self.dataset.len()
            )));
        }
        Ok(())
    }

    /// Number of batches in an epoch.
    pub fn num_batches(&self) -> usize {
        self.dataset.len() / self.config.batch_size
    }

    /// Number of images at the end of an epoch's order that do not fill a batch and are left out. The order changes
    /// every epoch.
    pub fn num_left_out(&self) -> usize {
        self.dataset.len() % self.config.batch_size
    }

    /// Returns the batches of `epoch` in order, prepared ahead by threads that end with the iterator.
    pub fn epoch(&self, epoch: u64) -> Batches {
        self.epoch_from(epoch, 0)
    }

    /// Returns the batches of `epoch` from number `first` on, to resume training. Each is the same as in a full epoch.
    pub fn epoch_from(&self, epoch: u64, first: usize) -> Batches {
        let mut rng = rng_of(self.seed, epoch, Stream::Order);
        let (set, balance) = (&self.dataset, self.config.balance);
        let order = order(set.len(), set.num_identities(), |i| set.label(i), balance, &mut rng);
        let order = Arc::new(Slot::number(&order, set.len()));
        let broken = Arc::new(Mutex::new(Vec::new()));
        let (receivers, workers) = (0..self.config.threads)
            .map(|turn| {
                // Worker `turn` makes every `threads`-th batch; receiving from the workers in turn restores the order.
                let (sender, receiver) = sync_channel(self.config.prefetch);
                let worker = Worker {
                    dataset: self.dataset.clone(),
                    transform: self.transform.clone(),
                    order: order.clone(),
                    input_size: self.input_size,
                    seed: self.seed,
                    epoch,
                    on_broken: self.on_broken,
                    broken: broken.clone(),
                };
                let (size, share) = (self.config.batch_size, self.share);
                let batches = (first + turn..self.num_batches()).step_by(self.config.threads);
                let places = batches.map(move |batch| share.places(batch, size).collect());
                (receiver, std::thread::spawn(move || worker.run(places, &sender)))
            })
            .unzip();
        Batches { receivers, workers, taken: 0, next: first, num_batches: self.num_batches(), broken }
    }
}

/// A place in an epoch's order: an image, and how often it came before.
#[derive(Clone, Copy)]
struct Slot {
    image: u32,
    repeat: u32,
}

impl Slot {
    fn number(order: &[u32], num_images: usize) -> Vec<Self> {
        let mut counts = vec![0; num_images];
        let slot = |&image: &u32| {
            let count = &mut counts[image as usize];
            *count += 1;
            Self { image, repeat: *count - 1 }
        };
        order.iter().map(slot).collect()
    }
}

/// What random numbers are for; each has a stream of its own.
enum Stream {
    /// The order of an epoch.
    Order,
    /// The views of the image in a slot, or of its replacement.
    Views(Slot),
    /// The replacement of a broken image in a slot.
    Replacement(Slot),
}

/// Returns the random generator of a stream in an epoch, the same on every worker.
fn rng_of(seed: u64, epoch: u64, stream: Stream) -> ChaCha8Rng {
    let (index, kind) = match stream {
        Stream::Order => (u64::MAX, 0),
        Stream::Views(slot) => (u64::from(slot.image), u64::from(slot.repeat)),
        Stream::Replacement(slot) => (u64::from(slot.image), u64::from(slot.repeat) | 1 << 32),
    };
    let mut key = [0; 32];
    for (part, value) in key.chunks_exact_mut(8).zip([seed, epoch, index, kind]) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

struct Worker {
    dataset: Arc<dyn Dataset>,
    transform: Arc<Transform>,
    order: Arc<Vec<Slot>>,
    input_size: usize,
    seed: u64,
    epoch: u64,
    on_broken: OnBroken,
    broken: Arc<Mutex<Vec<String>>>,
}

impl Worker {
    fn run(&self, batches: impl Iterator<Item = Vec<usize>>, sender: &SyncSender<Result<Batch>>) {
        for places in batches {
            let slots: Vec<Slot> = places.into_iter().map(|place| self.order[place]).collect();
            let made = self.make(&slots);
            let failed = made.is_err();
            // A closed channel means that the iterator was dropped.
            if sender.send(made).is_err() || failed {
                return;
            }
        }
    }

    fn make(&self, slots: &[Slot]) -> Result<Batch> {
        let pixels = Pixels::with_capacity(self.input_size, slots.len());
        let (labels, images) = (Vec::with_capacity(slots.len()), Vec::with_capacity(slots.len()));
        let mut masked = MaskedViews { pixels: Pixels::new(self.input_size), covered: Vec::new() };
        let (covered, mirrored) = (Vec::with_capacity(slots.len()), Vec::with_capacity(slots.len()));
        let mut batch = Batch { teacher: pixels.clone(), student: pixels, covered, mirrored, labels, images };
        for &slot in slots {
            let (index, sample) = self.sample(slot)?;
            let mut rng = rng_of(self.seed, self.epoch, Stream::Views(slot));
            let label = self.dataset.class(index).map_or(-1, i64::from);
            self.transform.push_views(sample, &mut rng, &mut batch, &mut masked).map_err(|e| Error::Data {
                path: self.dataset.name(index).into(),
                what: format!("cannot be masked: {e}"),
            })?;
            batch.labels.push(label);
            batch.images.push(index as u32);
        }
        batch.student.append(masked.pixels);
        batch.covered.append(&mut masked.covered);
        Ok(batch)
    }

    /// Returns a slot's image with its index, or a random replacement if it is broken and broken images are skipped.
    fn sample(&self, slot: Slot) -> Result<(usize, Sample)> {
        let index = slot.image as usize;
        let error = match (self.dataset.get(index), self.on_broken) {
            (Ok(sample), _) => return Ok((index, sample)),
            (Err(error), OnBroken::Fail) => return Err(error),
            (Err(error), OnBroken::Skip) => error,
        };
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).push(error.to_string());
        let mut rng = rng_of(self.seed, self.epoch, Stream::Replacement(slot));
        for _ in 0..MAX_TRIES {
            let other = rng.random_range(0..self.dataset.len());
            if let Ok(sample) = self.dataset.get(other) {
                return Ok((other, sample));
            }
        }
        Err(Error::Training(format!("{MAX_TRIES} random replacements for a broken image are broken too: {error}")))
    }
}

/// Iterator over the batches of one epoch; ends after an error.
pub struct Batches {
    receivers: Vec<Receiver<Result<Batch>>>,
    workers: Vec<JoinHandle<()>>,
    taken: usize,
    next: usize,
    num_batches: usize,
    broken: Arc<Mutex<Vec<String>>>,
}

impl Batches {
    /// Returns one error message for each broken image replaced so far, sorted.
    pub fn broken(&self) -> Vec<String> {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
        broken.sort_unstable();
        broken
    }
}

impl Iterator for Batches {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.num_batches {
            return None;
        }
        let batch = match self.receivers[self.taken % self.receivers.len()].recv() {
            Ok(batch) => batch,
            Err(_) => Err(Error::Training(format!("the loader stopped before batch {}", self.next))),
        };
        self.taken += 1;
        self.next = if batch.is_ok() { self.next + 1 } else { self.num_batches };
        Some(batch)
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.receivers.clear();
        for worker in self.workers.drain(..) {
            // A worker's panic has already shown as an early end of its channel.
            let _ = worker.join();
        }
    }
}
