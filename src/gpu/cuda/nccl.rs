//! What GPUs of several ranks exchange, by NCCL, on a stream of its own.
//!
//! NCCL is called as cuBLAS is: cudarc's bindings look for it under other names than its packages install it by, and
//! their statuses are Rust enums.

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use candle_core::{Error, Result, bail};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

use super::library::{Found, failed, functions, load};
use crate::dist::{Collective, Ranks};
use crate::gpu::{Element, Transfer};

/// File names of the library.
const LIBRARIES: [&str; 1] = ["libnccl.so.2"];
/// `ncclDataType_t`.
const FLOAT32: i32 = 7;
const BFLOAT16: i32 = 9;
/// `ncclRedOp_t`.
const SUM: i32 = 0;
/// `ncclResult_t`.
const SUCCESS: i32 = 0;
const IN_PROGRESS: i32 = 7;
const STATUSES: [(i32, &str); 6] = [
    (1, "ncclUnhandledCudaError"),
    (2, "ncclSystemError"),
    (3, "ncclInternalError"),
    (4, "ncclInvalidArgument"),
    (5, "ncclInvalidUsage"),
    (6, "ncclRemoteError"),
];
/// Bytes of `ncclUniqueId`.
const ID_BYTES: usize = 128;
/// Time for which an event is looked at without a pause.
const EAGER: Duration = Duration::from_micros(200);
/// Longest wait for the end of a communicator.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two looks at an event.
const PAUSE: Duration = Duration::from_micros(50);

/// `ncclUniqueId`: how the ranks find each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId([c_char; ID_BYTES]);

functions! {
    /// The functions of NCCL that are called.
    Functions {
        ncclGetVersion(version: *mut i32) -> i32;
        ncclGetUniqueId(id: *mut UniqueId) -> i32;
        ncclCommInitRank(communicator: *mut *mut c_void, size: i32, id: UniqueId, rank: i32) -> i32;
        ncclCommDestroy(communicator: *mut c_void) -> i32;
        ncclCommAbort(communicator: *mut c_void) -> i32;
        ncclCommGetAsyncError(communicator: *mut c_void, error: *mut i32) -> i32;
        ncclGroupStart() -> i32;
        ncclGroupEnd() -> i32;
        ncclAllReduce(
            from: *const c_void, to: *mut c_void, len: usize, data_type: i32, operation: i32,
            communicator: *mut c_void, stream: *mut c_void,
        ) -> i32;
        ncclReduceScatter(
            from: *const c_void, to: *mut c_void, len_of_part: usize, data_type: i32, operation: i32,
            communicator: *mut c_void, stream: *mut c_void,
        ) -> i32;
        ncclAllGather(
            from: *const c_void, to: *mut c_void, len: usize, data_type: i32, communicator: *mut c_void,
            stream: *mut c_void,
        ) -> i32;
        ncclBroadcast(
            from: *const c_void, to: *mut c_void, len: usize, data_type: i32, root: i32, communicator: *mut c_void,
            stream: *mut c_void,
        ) -> i32;
    }
}

fn check(call: &str, status: i32) -> Result<()> {
    if status == SUCCESS { Ok(()) } else { Err(failed("NCCL", call, status, status, &STATUSES)) }
}

/// NCCL, which is never unloaded: it has threads of its own.
pub(super) struct Library {
    functions: Functions,
    /// Its version and where it lies.
    pub place: String,
}

/// Loads NCCL, once.
///
/// # Errors
/// One line that says what is missing.
pub(super) fn library() -> std::result::Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        let Found { library, place } = load(&LIBRARIES).ok_or("NCCL is missing (libnccl.so.2)")?;
        let functions = Functions::of(library, &place).map_err(|error| error.to_string())?;
        let mut version = 0;
        // SAFETY: the pointer is to a local variable.
        let status = unsafe { (functions.ncclGetVersion)(&raw mut version) };
        check("ncclGetVersion", status).map_err(|error| error.to_string())?;
        let (major, minor, patch) = (version / 10_000, version / 100 % 100, version % 100);
        Ok(Library { functions, place: format!("{place}, version {major}.{minor}.{patch}") })
    });
    library.as_ref().map_err(String::as_str)
}

/// A communicator, and the stream of its operations.
pub(super) struct Nccl {
    functions: &'static Functions,
    communicator: *mut c_void,
    size: usize,
    stream: Arc<CudaStream>,
    timeout: Duration,
    is_aborted: AtomicBool,
}

// SAFETY: a communicator may be used by any thread, one at a time; its operations are queued by the trainer's thread.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Drop for Nccl {
    /// Closes the communicator, which waits for the other ranks: not for long, since one of them may have failed.
    fn drop(&mut self) {
        if !self.is_aborted.swap(true, Ordering::Relaxed) {
            self.end(self.functions.ncclCommDestroy);
        }
    }
}

impl Nccl {
    /// Connects the GPUs of all ranks. Returns why they cannot be, the same on all ranks, if one of them lacks NCCL or
    /// two share a GPU.
    ///
    /// # Errors
    /// On all ranks, when NCCL fails on one of them or one does not take part in time.
    pub fn connect(context: &Arc<CudaContext>, ranks: &Ranks) -> crate::Result<std::result::Result<Self, String>> {
        let uuid = ranks.all_ok(context.uuid().map_err(|error| crate::Error::from(Error::wrap(error))))?;
        let library = library();
        // Which GPU this is, after a zero, or what is missing.
        let mine = match library {
            Ok(_) => [0].into_iter().chain(uuid.bytes.iter().map(|byte| *byte as u8)).collect(),
            Err(what) => what.as_bytes().to_vec(),
        };
        let all = ranks.gather(mine)?;
        for (rank, of_rank) in all.iter().enumerate() {
            if of_rank.first() != Some(&0) {
                return Ok(Err(format!("rank {rank}: {}", String::from_utf8_lossy(of_rank))));
            }
            if let Some(other) = all[..rank].iter().position(|other| other == of_rank) {
                return Ok(Err(format!("ranks {other} and {rank} share a GPU, which NCCL cannot")));
            }
        }
        match library {
            Ok(library) => Self::new(library, context, ranks).map(Ok),
            Err(what) => Ok(Err(what.to_owned())),
        }
    }

    /// Opens a communicator of all ranks, each with a GPU of its own.
    fn new(library: &'static Library, context: &Arc<CudaContext>, ranks: &Ranks) -> crate::Result<Self> {
        let functions = &library.functions;
        let stream = ranks.all_ok(context.new_stream().map_err(|error| crate::Error::from(Error::wrap(error))))?;
        let mut id = UniqueId([0; ID_BYTES]);
        let made = match ranks.is_first() {
            // SAFETY: the pointer is to a local variable.
            true => check("ncclGetUniqueId", unsafe { (functions.ncclGetUniqueId)(&raw mut id) }),
            false => Ok(()),
        };
        ranks.all_ok(made.map_err(crate::Error::from))?;
        let of_first = ranks.gather(id.0.iter().map(|byte| *byte as u8).collect())?.swap_remove(0);
        id.0.iter_mut().zip(of_first).for_each(|(byte, of_first)| *byte = of_first as c_char);
        let opened = open(functions, context, (id, ranks.size() as i32, ranks.rank() as i32), ranks.timeout());
        let communicator = ranks.all_ok(opened.map_err(crate::Error::from))? as *mut c_void;
        let is_aborted = AtomicBool::new(false);
        Ok(Self { functions, communicator, size: ranks.size(), stream, timeout: ranks.timeout(), is_aborted })
    }

    /// Queues a collective operation for each of the transfers, after the work that is queued on `main`.
    ///
    /// # Safety
    /// The transfers lie in memory of this GPU that is kept until the operation is done, and only it uses them.
    pub unsafe fn collect(
        &self,
        how: Collective,
        element: Element,
        transfers: &[Transfer],
        main: &CudaStream,
    ) -> Result<()> {
        let data_type = match element {
            Element::F32 => FLOAT32,
            Element::Bf16 => BFLOAT16,
            other => bail!("ranks exchange no {other:?}"),
        };
        if self.is_aborted.load(Ordering::Relaxed) {
            bail!("the connection to the other GPUs has ended");
        }
        self.stream.join(main).map_err(Error::wrap)?;
        let Functions { ncclAllReduce, ncclReduceScatter, ncclAllGather, ncclBroadcast, .. } = *self.functions;
        let (communicator, stream) = (self.communicator, self.stream.cu_stream().cast());
        // SAFETY: calls between these two are one operation for NCCL.
        check("ncclGroupStart", unsafe { (self.functions.ncclGroupStart)() })?;
        let mut queued = Ok(());
        for Transfer { from, to, len } in transfers.iter().copied() {
            let (from, to) = (from as *const c_void, to as *mut c_void);
            // SAFETY: the memory is large enough by this function's contract, and used in the streams' order.
            let (call, status) = unsafe {
                match how {
                    Collective::Sum => {
                        ("ncclAllReduce", ncclAllReduce(from, to, len, data_type, SUM, communicator, stream))
                    }
                    Collective::SumPart => {
                        let part = len / self.size;
                        ("ncclReduceScatter", ncclReduceScatter(from, to, part, data_type, SUM, communicator, stream))
                    }
                    Collective::Gather => {
                        ("ncclAllGather", ncclAllGather(from, to, len, data_type, communicator, stream))
                    }
                    Collective::OfFirst => {
                        ("ncclBroadcast", ncclBroadcast(from, to, len, data_type, 0, communicator, stream))
                    }
                }
            };
            queued = queued.and(check(call, status));
        }
        // SAFETY: as above; a group that was begun is ended.
        queued.and(check("ncclGroupEnd", unsafe { (self.functions.ncclGroupEnd)() }))
    }

    /// Lets what is queued later on `main` wait for the operations queued so far.
    pub fn hold_up(&self, main: &CudaStream) -> Result<()> {
        main.join(&self.stream).map_err(Error::wrap)
    }

    /// Waits until the GPU has reached an event, which may be behind operations that other ranks take part in.
    ///
    /// # Errors
    /// When the GPU or NCCL fails, or another rank does not take part in time. Then no operation goes on.
    pub fn wait(&self, event: &CudaEvent) -> Result<()> {
        let began = Instant::now();
        loop {
            // What an aborted operation leaves behind is nothing, and the communicator is no more.
            if self.is_aborted.load(Ordering::Relaxed) {
                bail!("the connection to the other GPUs has ended");
            }
            if event.try_is_complete().map_err(Error::wrap)? {
                return Ok(());
            }
            let waited = began.elapsed();
            if waited < EAGER {
                std::thread::yield_now();
                continue;
            }
            let mut error = SUCCESS;
            // SAFETY: the communicator lives as long as this, and the pointer is to a local variable.
            let status = unsafe { (self.functions.ncclCommGetAsyncError)(self.communicator, &raw mut error) };
            let error = if status == SUCCESS { error } else { status };
            if error != SUCCESS && error != IN_PROGRESS {
                self.abort();
                return check("an operation of all ranks", error);
            }
            if waited > self.timeout {
                self.abort();
                return Err(Error::wrap(crate::Error::timed_out(self.timeout)));
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn abort(&self) {
        if !self.is_aborted.swap(true, Ordering::Relaxed) {
            self.end(self.functions.ncclCommAbort);
        }
    }

    /// Ends the communicator on a thread of its own, which is given up if other ranks do not answer.
    fn end(&self, end: unsafe extern "C" fn(*mut c_void) -> i32) {
        let (done, ended) = sync_channel(1);
        let (communicator, context) = (self.communicator as usize, self.stream.context().clone());
        std::thread::spawn(move || {
            let _ = context.bind_to_thread();
            // SAFETY: `new` made the communicator, and nothing uses it from now on. On an error there is nothing to do.
            let _ = unsafe { end(communicator as *mut c_void) };
            let _ = done.send(());
        });
        let _ = ended.recv_timeout(PATIENCE);
    }
}

/// Opens a communicator and returns its address. NCCL waits for all ranks without an end: a thread of its own does,
/// which is given up after a while.
fn open(
    functions: &Functions,
    context: &Arc<CudaContext>,
    (id, size, rank): (UniqueId, i32, i32),
    timeout: Duration,
) -> Result<usize> {
    let (done, opened) = sync_channel(1);
    let (open, context) = (functions.ncclCommInitRank, context.clone());
    std::thread::spawn(move || {
        let mut communicator = std::ptr::null_mut();
        let bound = context.bind_to_thread().map_err(Error::wrap);
        // SAFETY: the pointer is to a local variable, and the id is the first rank's.
        let status =
            bound.and_then(|()| check("ncclCommInitRank", unsafe { open(&raw mut communicator, size, id, rank) }));
        let _ = done.send(status.map(|()| communicator as usize));
    });
    opened.recv_timeout(timeout).map_err(|_| Error::wrap(crate::Error::timed_out(timeout)))?
}
