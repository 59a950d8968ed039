//! Ranks over MPI.

use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mpi::collective::SystemOperation;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::request::{LocalScope, Request, scope};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives};
use mpi::{Count, Threading};

use super::transport::Primitives;
use super::{Operation, Transport};
use crate::error::{Error, Result};

/// Most elements of one call: MPI counts them in 32 bits.
const MAX_COUNT: usize = 1 << 28;
/// Times that an operation is looked at without a pause.
const EAGER: usize = 50;
/// Longest pause between two looks at an operation.
const LONGEST_PAUSE: Duration = Duration::from_micros(500);

/// A thread of its own makes all calls of MPI: operations go on while the others compute, and nobody waits for MPI
/// without an end.
pub(super) struct Mpi {
    rank: usize,
    size: usize,
    operations: Mutex<Option<Sender<Operation>>>,
    thread: Option<JoinHandle<()>>,
}

impl Mpi {
    pub fn open() -> Result<Self> {
        let (operations, received) = channel();
        let (started, result) = sync_channel(1);
        let thread = std::thread::Builder::new().name("mpi".into()).spawn(move || {
            let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
                let _ = started.send(None);
                return;
            };
            let world = World::of(&universe);
            let _ = started.send(Some((world.0.rank() as usize, world.0.size() as usize)));
            world.serve(&received);
        });
        let wrong = |what: String| Error::Ranks(format!("MPI does not start: {what}"));
        let thread = thread.map_err(|e| wrong(e.to_string()))?;
        let started = result.recv().map_err(|e| wrong(e.to_string()))?;
        let (rank, size) = started.ok_or_else(|| wrong("it was started before".into()))?;
        Ok(Self { rank, size, operations: Mutex::new(Some(operations)), thread: Some(thread) })
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn post(&self, operation: Operation) {
        let operations = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        // If the thread has ended, the operation is dropped, and who waits for it is told.
        let _ = operations.as_ref().map(|operations| operations.send(operation));
    }
}

impl Drop for Mpi {
    /// Ends MPI, which waits for all ranks to do so.
    fn drop(&mut self) {
        drop(self.operations.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        // A panic of the thread has already shown as an end of the connection.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// All ranks.
struct World(SimpleCommunicator);

impl World {
    fn of(universe: &Universe) -> Self {
        Self(universe.world())
    }

    fn serve(&self, operations: &Receiver<Operation>) {
        while let Ok(operation) = operations.recv() {
            operation.run(self);
        }
    }
}

/// Looks at an operation until it has ended. MPI itself would wait without a pause and take the core from those who
/// compute.
fn wait<'a, R: ?Sized>(mut request: Request<'a, R, &LocalScope<'a>>) {
    let mut pause = Duration::from_micros(10);
    for look in 0.. {
        request = match request.test() {
            Ok(_) => return,
            Err(request) => request,
        };
        if look < EAGER {
            std::thread::yield_now();
        } else {
            std::thread::sleep(pause);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }
}

impl Primitives for World {
    fn size(&self) -> usize {
        self.0.size() as usize
    }

    fn sum(&self, values: &mut Vec<f32>) -> Result<()> {
        let mut sums = vec![0f32; values.len()];
        for (values, sums) in values.chunks(MAX_COUNT).zip(sums.chunks_mut(MAX_COUNT)) {
            let sum = SystemOperation::sum();
            scope(|scope| wait(self.0.immediate_all_reduce_into(scope, values, sums, sum)));
        }
        *values = sums;
        Ok(())
    }

    fn sum_part(&self, values: &[f32]) -> Result<Vec<f32>> {
        let part = values.len() / Primitives::size(self);
        if values.len() > MAX_COUNT {
            return Err(Error::Ranks(format!("{} values are too many to add at once", values.len())));
        }
        let mut sums = vec![0f32; part];
        let sum = SystemOperation::sum();
        scope(|scope| wait(self.0.immediate_reduce_scatter_block_into(scope, values, &mut sums[..], sum)));
        Ok(sums)
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut lens = vec![0u64; Primitives::size(self)];
        let len = [bytes.len() as u64];
        scope(|scope| wait(self.0.immediate_all_gather_into(scope, &len[..], &mut lens[..])));
        let mut all: Vec<Vec<u8>> = lens.iter().map(|len| Vec::with_capacity(*len as usize)).collect();
        // In rounds that MPI can count.
        let most = MAX_COUNT / lens.len();
        for round in 0..lens.iter().max().map_or(0, |len| (*len as usize).div_ceil(most)) {
            let of_round = |len: usize| len.saturating_sub(round * most).min(most);
            let counts: Vec<Count> = lens.iter().map(|len| of_round(*len as usize) as Count).collect();
            let starts: Vec<Count> =
                counts.iter().scan(0, |next, count| Some(std::mem::replace(next, *next + count))).collect();
            let mut received = vec![0u8; counts.iter().map(|count| *count as usize).sum()];
            let mine = &bytes[bytes.len().min(round * most)..][..of_round(bytes.len())];
            let mut parts = PartitionMut::new(&mut received[..], &counts[..], &starts[..]);
            scope(|scope| wait(self.0.immediate_all_gather_varcount_into(scope, mine, &mut parts)));
            for ((all, start), count) in all.iter_mut().zip(&starts).zip(&counts) {
                all.extend_from_slice(&received[*start as usize..][..*count as usize]);
            }
        }
        Ok(all)
    }

    fn exchange(&self, values: &[u16]) -> Result<Vec<u16>> {
        if values.len() > MAX_COUNT {
            return Err(Error::Ranks(format!("{} values are too many to exchange at once", values.len())));
        }
        let mut received = vec![0u16; values.len()];
        scope(|scope| wait(self.0.immediate_all_to_all_into(scope, values, &mut received[..])));
        Ok(received)
    }
}
