//! Ranks: processes that share the work of a training. Another library carries what they exchange: MPI starts them, lets
//! them find each other and moves their data.
//!
//! All ranks run the same program on the same settings and data, and meet in collective operations, which every rank
//! must reach in the same order. Sums that are not left to the transport are added in the order of the ranks, so that
//! all ranks get the same bits.

mod collective;
mod config;
#[cfg(feature = "mpi")]
mod mpi;
mod shard;
#[cfg(test)]
pub(crate) mod threads;
#[cfg(any(test, feature = "mpi"))]
mod transport;

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

#[cfg(not(feature = "mpi"))]
use crate::error::missing_feature;
use crate::error::{Error, Result};

pub(crate) use collective::{Collective, HostBucket};
pub use config::{RanksConfig, Wire};
pub(crate) use shard::{ClassShard, ELSEWHERE, RowOrder};

/// The ranks that share the work, as one of them sees them. A process on its own is the only rank.
///
/// ```
/// use maskinv::dist::Ranks;
///
/// let ranks = Ranks::default();
/// assert_eq!((ranks.rank(), ranks.size()), (0, 1));
/// ```
#[derive(Clone, Default)]
pub struct Ranks {
    /// None for a process on its own.
    others: Option<Arc<dyn Transport>>,
    config: RanksConfig,
    /// Nanoseconds that this rank has waited for results, also by its clones.
    waited: Arc<AtomicU64>,
}

/// What moves data between ranks. It does operations in the order in which they are posted.
pub(crate) trait Transport: Send + Sync {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    fn post(&self, operation: Operation);
}

/// Where the result of an operation goes.
pub(crate) type Reply<T> = SyncSender<Result<T>>;

/// A collective operation.
#[cfg_attr(not(any(test, feature = "mpi")), expect(dead_code, reason = "a build without transport does none"))]
pub(crate) enum Operation {
    /// The sum over all ranks.
    Sum(Vec<f32>, Wire, Reply<Vec<f32>>),
    /// This rank's part of the sum over all ranks; the parts are equal and in the order of the ranks.
    SumPart(Vec<f32>, Reply<Vec<f32>>),
    /// The bytes of each rank, whose numbers may differ.
    Gather(Vec<u8>, Reply<Vec<Vec<u8>>>),
}

/// The result of an operation that goes on while the rank computes.
pub(crate) enum Pending<T> {
    /// It needed no other rank.
    Known(T),
    Awaited {
        result: Receiver<Result<T>>,
        timeout: Duration,
        /// Where the time of waiting is added.
        waited: Arc<AtomicU64>,
    },
}

impl<T> Pending<T> {
    /// Waits for the result.
    ///
    /// # Errors
    /// [`Error::Ranks`] when the transport failed, or another rank did not take part in time.
    pub fn wait(self) -> Result<T> {
        let (result, timeout, waited) = match self {
            Self::Known(value) => return Ok(value),
            Self::Awaited { result, timeout, waited } => (result, timeout, waited),
        };
        let began = Instant::now();
        let result = result.recv_timeout(timeout);
        waited.fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result.map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::timed_out(timeout),
            RecvTimeoutError::Disconnected => Error::Ranks("the connection to the others has ended".into()),
        })?
    }
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

impl Ranks {
    #[cfg(any(test, feature = "mpi"))]
    fn over(transport: Arc<dyn Transport>) -> Self {
        Self { others: Some(transport).filter(|transport| transport.size() > 1), ..Self::default() }
    }

    /// Returns the ranks of which this process is one, by MPI. `num` is how many its launcher has started; a process on
    /// its own does not start MPI.
    ///
    /// # Errors
    /// [`Error::Ranks`] when MPI cannot start; [`Error::Config`] when there are several processes and this build lacks
    /// MPI: they would do the same work several times and overwrite each other's files.
    pub fn launched(num: usize) -> Result<Self> {
        match num {
            0 | 1 => Ok(Self::default()),
            _ => Self::by_mpi(num),
        }
    }

    #[cfg(feature = "mpi")]
    fn by_mpi(_num: usize) -> Result<Self> {
        Ok(Self::over(Arc::new(mpi::Mpi::open()?)))
    }

    #[cfg(not(feature = "mpi"))]
    fn by_mpi(num: usize) -> Result<Self> {
        Err(Error::Config(format!("one of {num} ranks: {}", missing_feature("mpi"))))
    }

    /// Returns the same ranks with other settings.
    pub fn configured(self, config: &RanksConfig) -> Self {
        Self { config: config.clone(), ..self }
    }

    /// Number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.others.as_ref().map_or(0, |others| others.rank())
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.others.as_ref().map_or(1, |others| others.size())
    }

    /// Seconds that this rank has waited for what it exchanges with the others.
    pub(crate) fn seconds_waited(&self) -> f64 {
        Duration::from_nanos(self.waited.load(Ordering::Relaxed)).as_secs_f64()
    }

    /// Whether there is no other rank.
    pub fn is_single(&self) -> bool {
        self.others.is_none()
    }

    /// Whether this is the rank that prints and writes files.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    fn post<T>(&self, others: &Arc<dyn Transport>, operation: impl FnOnce(Reply<T>) -> Operation) -> Pending<T> {
        let (reply, result) = sync_channel(1);
        others.post(operation(reply));
        Pending::Awaited { result, timeout: self.timeout(), waited: self.waited.clone() }
    }

    /// Begins to add values over all ranks. All get the same bits.
    pub(crate) fn sum(&self, values: Vec<f32>) -> Pending<Vec<f32>> {
        let Some(others) = &self.others else { return Pending::Known(values) };
        self.post(others, |reply| Operation::Sum(values, self.config.gradients, reply))
    }

    /// Does a collective operation on values of which all ranks have as many. All get the same bits.
    ///
    /// # Errors
    /// When they have no equal parts and need some; or same as [`Pending::wait`].
    pub(crate) fn collect(&self, values: Vec<f32>, how: Collective) -> Result<Vec<f32>> {
        let Some(others) = &self.others else { return Ok(values) };
        how.len(values.len(), self.size())?;
        match how {
            Collective::Sum => self.post(others, |reply| Operation::Sum(values, Wire::F32, reply)).wait(),
            Collective::SumPart => self.post(others, |reply| Operation::SumPart(values, reply)).wait(),
            Collective::Gather => self.join_f32(&values),
            Collective::OfFirst => self.join_f32(if self.is_first() { &values } else { &[] }),
        }
    }

    /// How gradients travel.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn wire(&self) -> Wire {
        self.config.gradients
    }

    /// Longest time to wait for the others.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.config.timeout_s)
    }

    /// Bytes of a gradient bucket.
    pub(crate) fn bucket_bytes(&self) -> usize {
        self.config.bucket_kib * 1024
    }

    /// Returns the bytes of each rank.
    ///
    /// # Errors
    /// Same as [`Pending::wait`].
    pub(crate) fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let Some(others) = &self.others else { return Ok(vec![bytes]) };
        self.post(others, |reply| Operation::Gather(bytes, reply)).wait()
    }

    /// Returns the numbers of each rank.
    ///
    /// # Errors
    /// Same as [`Pending::wait`].
    pub(crate) fn gather_f64(&self, values: &[f64]) -> Result<Vec<Vec<f64>>> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let values = |bytes: Vec<u8>| bytes.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
        Ok(self.gather(bytes)?.into_iter().map(values).collect())
    }

    /// Returns the numbers of each rank.
    ///
    /// # Errors
    /// Same as [`Pending::wait`].
    pub(crate) fn gather_f32(&self, values: &[f32]) -> Result<Vec<Vec<f32>>> {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let values = |bytes: Vec<u8>| bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(self.gather(bytes)?.into_iter().map(values).collect())
    }

    /// Returns the numbers of all ranks, one rank after the other.
    ///
    /// # Errors
    /// Same as [`Pending::wait`].
    pub(crate) fn join_f32(&self, values: &[f32]) -> Result<Vec<f32>> {
        Ok(self.gather_f32(values)?.concat())
    }

    /// Replaces each value by its sum over all ranks, added in their order.
    ///
    /// # Errors
    /// Same as [`Pending::wait`].
    pub(crate) fn total(&self, values: &mut [f64]) -> Result<()> {
        let all = self.gather_f64(values)?;
        values.fill(0.0);
        for of_rank in &all {
            values.iter_mut().zip(of_rank).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }

    /// Returns the first rank's path, if it has one.
    ///
    /// # Errors
    /// [`Error::Ranks`] when the path is not UTF-8 and there are other ranks, the transport fails, or another rank does
    /// not take part in time.
    pub fn path_of_first(&self, path: Option<&Path>) -> Result<Option<PathBuf>> {
        if self.is_single() {
            return Ok(path.map(Path::to_owned));
        }
        let text = path.filter(|_| self.is_first()).map(|path| {
            path.to_str().ok_or_else(|| Error::Ranks(format!("{}: expected a path in UTF-8", path.display())))
        });
        let text = self.of_first(self.all_ok(text.transpose())?.unwrap_or_default())?;
        Ok(Some(PathBuf::from(text)).filter(|path| !path.as_os_str().is_empty()))
    }

    /// Returns what the first rank says.
    fn of_first(&self, text: &str) -> Result<String> {
        let said = if self.is_first() { text.as_bytes().to_vec() } else { Vec::new() };
        let first = self.gather(said)?.swap_remove(0);
        String::from_utf8(first).map_err(|e| Error::Ranks(format!("the first rank sent no text: {e}")))
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// Same as [`Pending::wait`].
    pub(crate) fn any(&self, says_so: bool) -> Result<bool> {
        Ok(self.gather(vec![u8::from(says_so)])?.iter().any(|said| said == &[1]))
    }

    /// Does work such as writing a file on the first rank; the others wait until it is done. Returns its result on the
    /// first rank, and nothing on the others.
    ///
    /// # Errors
    /// On the first rank the work's, on the others that the first failed; or that a rank does not take part in time.
    pub fn first_does<T, E: Display + From<Error>>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<Option<T>, E> {
        let done = if self.is_first() { work().map(Some) } else { Ok(None) };
        self.all_ok(done)
    }

    /// Returns this rank's result once all have one.
    ///
    /// # Errors
    /// This rank's, or that another failed; or same as [`Pending::wait`].
    pub(crate) fn all_ok<T, E: Display + From<Error>>(&self, mine: Result<T, E>) -> Result<T, E> {
        let said = mine.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
        let all = self.gather(said.into_bytes());
        let mine = mine?;
        match all?.iter().enumerate().find(|(_, said)| !said.is_empty()) {
            Some((rank, said)) => Err(Error::Ranks(format!("rank {rank}: {}", String::from_utf8_lossy(said))).into()),
            None => Ok(mine),
        }
    }

    /// Checks that all ranks have the same of something, such as `"settings"`.
    ///
    /// # Errors
    /// [`Error::Ranks`] on all ranks, which names the first rank that differs and the first line in which it does; or
    /// same as [`Pending::wait`].
    pub(crate) fn agree(&self, what: &str, mine: &str) -> Result<()> {
        let all = self.gather(mine.as_bytes().to_vec())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let Some((rank, theirs)) = all.iter().enumerate().find(|(_, theirs)| **theirs != all[0]) else {
            return Ok(());
        };
        let (first, theirs) = (text(&all[0]), text(theirs));
        let line = first.lines().zip(theirs.lines()).find(|(a, b)| a != b);
        let (first, theirs) = line.unwrap_or((&first, &theirs));
        let differs = format!("rank 0 has {first:?}, rank {rank} has {theirs:?}");
        Err(Error::Ranks(format!("all ranks need the same {what}: {differs}")))
    }
}
