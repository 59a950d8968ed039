//! Batches for training, prepared ahead on threads. Order and content depend on the seed only.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Dataset, Pixels, Transform};
use crate::error::{Error, Result};

/// How batches are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoaderConfig {
    /// Images per batch; the published recipe has 512 over four GPUs.
    pub batch_size: usize,
    /// Threads that prepare batches.
    pub threads: usize,
    /// Batches that each thread prepares ahead.
    pub prefetch: usize,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        Self { batch_size: 512, threads: 1, prefetch: 2 }
    }
}

impl LoaderConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        // Batch norm has no statistics of a single image.
        if !(2..=65_536).contains(&self.batch_size) {
            return Err(Error::Config(format!("loader.batch_size: expected 2 to 65536, found {}", self.batch_size)));
        }
        if !(1..=256).contains(&self.threads) {
            return Err(Error::Config(format!("loader.threads: expected 1 to 256, found {}", self.threads)));
        }
        if !(1..=64).contains(&self.prefetch) {
            return Err(Error::Config(format!("loader.prefetch: expected 1 to 64, found {}", self.prefetch)));
        }
        Ok(())
    }
}

/// The views of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// What the teacher sees.
    pub teacher: Pixels,
    /// What the student sees.
    pub student: Pixels,
    /// Whose faces they are.
    pub labels: Vec<i64>,
}

/// Makes the batches of any epoch of a data set.
pub struct Loader {
    dataset: Arc<dyn Dataset>,
    transform: Arc<Transform>,
    config: LoaderConfig,
    input_size: usize,
    seed: u64,
}

impl Loader {
    /// Returns a loader of images of side `input_size`.
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
        if dataset.len() < config.batch_size {
            return Err(Error::Config(format!(
                "loader.batch_size: {} is more than the {} images of the data set",
                config.batch_size,
                dataset.len()
            )));
        }
        Ok(Self { dataset, transform: Arc::new(transform), config: config.clone(), input_size, seed })
    }

    /// Full batches in an epoch.
    pub fn num_batches(&self) -> usize {
        self.dataset.len() / self.config.batch_size
    }

    /// Images that an epoch leaves out, because they do not fill a batch; others every epoch.
    pub fn num_left_out(&self) -> usize {
        self.dataset.len() % self.config.batch_size
    }

    /// Returns the batches of `epoch` in their order, prepared ahead by threads that end with the iterator.
    pub fn epoch(&self, epoch: u64) -> Batches {
        let mut order: Vec<usize> = (0..self.dataset.len()).collect();
        order.shuffle(&mut rng_of(self.seed, epoch, u64::MAX));
        let order = Arc::new(order);
        let (receivers, workers) = (0..self.config.threads)
            .map(|first| {
                // Worker `first` makes every `threads`-th batch: taking turns restores the order.
                let (sender, receiver) = sync_channel(self.config.prefetch);
                let worker = Worker {
                    dataset: self.dataset.clone(),
                    transform: self.transform.clone(),
                    order: order.clone(),
                    batch_size: self.config.batch_size,
                    input_size: self.input_size,
                    seed: self.seed,
                    epoch,
                };
                let batches = (first..self.num_batches()).step_by(self.config.threads);
                (receiver, std::thread::spawn(move || worker.run(batches, &sender)))
            })
            .unzip();
        Batches { receivers, workers, next: 0, num_batches: self.num_batches() }
    }
}

/// A generator of its own for each image of each epoch, whoever prepares it.
fn rng_of(seed: u64, epoch: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    key[16..24].copy_from_slice(&index.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

struct Worker {
    dataset: Arc<dyn Dataset>,
    transform: Arc<Transform>,
    order: Arc<Vec<usize>>,
    batch_size: usize,
    input_size: usize,
    seed: u64,
    epoch: u64,
}

impl Worker {
    fn run(&self, batches: impl Iterator<Item = usize>, sender: &SyncSender<Result<Batch>>) {
        for batch in batches {
            let made = self.make(&self.order[batch * self.batch_size..][..self.batch_size]);
            let failed = made.is_err();
            // A closed channel means that nobody wants more.
            if sender.send(made).is_err() || failed {
                return;
            }
        }
    }

    fn make(&self, indices: &[usize]) -> Result<Batch> {
        let pixels = Pixels::new(self.input_size);
        let mut batch = Batch { teacher: pixels.clone(), student: pixels, labels: Vec::new() };
        for &index in indices {
            let sample = self.dataset.get(index)?;
            let mut rng = rng_of(self.seed, self.epoch, index as u64);
            let views = self.transform.views(&sample, &mut rng).map_err(|e| Error::Data {
                path: self.dataset.name(index).into(),
                what: format!("cannot be masked: {e}"),
            })?;
            batch.teacher.push(&views.teacher);
            batch.student.push(&views.student);
            batch.labels.push(i64::from(sample.label));
        }
        Ok(batch)
    }
}

/// The batches of one epoch; ends after an error.
pub struct Batches {
    receivers: Vec<Receiver<Result<Batch>>>,
    workers: Vec<JoinHandle<()>>,
    next: usize,
    num_batches: usize,
}

impl Iterator for Batches {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.num_batches {
            return None;
        }
        let batch = match self.receivers[self.next % self.receivers.len()].recv() {
            Ok(batch) => batch,
            Err(_) => Err(Error::Training(format!("the loader stopped before batch {}", self.next))),
        };
        self.next = if batch.is_ok() { self.next + 1 } else { self.num_batches };
        Some(batch)
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.receivers.clear();
        for worker in self.workers.drain(..) {
            // A panic of a worker has been seen as an early end of its channel.
            let _ = worker.join();
        }
    }
}
