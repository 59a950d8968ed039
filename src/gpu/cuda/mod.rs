//! An NVIDIA GPU: the driver, the compiled kernels, cuBLAS, and cuDNN with the feature `cudnn`.

mod blas;
#[cfg(feature = "cudnn")]
mod dnn;
mod library;
mod nccl;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{Error, Result, bail};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DevicePtr, LaunchConfig, PinnedHostSlice,
    PushKernelArg, result, sys,
};
use cudarc::nvrtc::Ptx;

use blas::Blas;
use nccl::Nccl;

use super::{Arg, Element, Gpu, Launch, Memory, Product, Transfer};
use crate::dist::{Collective, Ranks};

/// Compiled files of `kernels/`, by the prefix of their kernels' names; the build script writes the list.
const KERNELS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Driver functions that are called. One that is missing would end the process.
const DRIVER: [&str; 35] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAllocAsync",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];
/// Version of CUDA that the kernels were compiled by, as the driver counts: 13000 is 13.0.
const BUILT_BY: &str = env!("MASKINV_CUDA_VERSION");

/// Bytes of a page-locked buffer at most: longer copies go piece by piece.
const STAGED: usize = 4 << 20;
/// Bytes of a page-locked buffer at least: small copies share one size.
const LEAST_STAGED: usize = 64 << 10;
/// Maximum number of page-locked buffers: two steps' copies.
const MAX_STAGED: usize = 16;

/// Whether f32 products may round their factors to TF32 (11 bits of mantissa), as tensor cores do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Factors {
    Exact,
    Tf32,
}

/// A GPU and the one stream that all work is queued on, but for what ranks exchange.
pub(crate) struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    modules: BTreeMap<&'static str, Arc<CudaModule>>,
    functions: Mutex<HashMap<String, Kernel>>,
    blas: Blas,
    /// Page-locked buffers that were written from, in the order of their copies.
    staged: Mutex<VecDeque<Staged>>,
    /// Whether each piece of work is waited for, as `CUDA_LAUNCH_BLOCKING` asks, so that a fault is that call's.
    is_blocking: bool,
    /// While times are measured: an event after each call, with its name, the first one before all.
    profile: Mutex<Option<Vec<(String, CudaEvent)>>>,
    facts: Vec<(&'static str, String)>,
    notices: Mutex<Vec<String>>,
    /// The connection to the GPUs of other ranks.
    nccl: OnceLock<Nccl>,
    #[cfg(feature = "cudnn")]
    dnn: Option<dnn::Dnn>,
}

/// A loaded kernel.
#[derive(Clone)]
struct Kernel {
    function: CudaFunction,
    /// Bytes of each parameter, in builds with debug assertions and where the driver tells.
    parameters: Option<Vec<usize>>,
}

struct Staged {
    memory: PinnedHostSlice<u8>,
    /// When the GPU has read it.
    done: CudaEvent,
}

fn wrap(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(error)
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cuda {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// When the driver, cuBLAS, the GPU or kernels for it are missing; the message is one line that says which.
    pub fn new(ordinal: usize, factors: Factors) -> Result<Self> {
        let (driver, num) = driver()?;
        let (blas, place_of_blas) = Blas::library()?;
        if ordinal >= num {
            bail!("no GPU {ordinal}: this machine has {num}");
        }
        let context = CudaContext::new(ordinal).map_err(wrap)?;
        let (major, minor) = context.compute_capability().map_err(wrap)?;
        let name = context.name().map_err(wrap)?;
        if major < 8 {
            bail!("GPU {ordinal}, {name}: compute capability {major}.{minor}, expected 8.0 or newer (bf16)");
        }
        // SAFETY: all work goes to one stream, or to NCCL's, which is ordered explicitly: no event of cudarc has to.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(wrap)?;
        let built = BUILT_BY.parse().unwrap_or_default();
        let mut modules = BTreeMap::new();
        for (file, code) in KERNELS.iter().copied() {
            let module = context.load_module(Ptx::from_binary(code.to_vec())).map_err(|error| {
                let why = match driver < built {
                    true => format!(
                        ": the driver is for CUDA {}, this build for {} or newer: update the driver, or build with an \
                         older compiler",
                        version(driver),
                        version(built)
                    ),
                    false => String::new(),
                };
                let what = format!("no kernels for compute capability {major}.{minor}{why} ({error})");
                Error::Msg(format!("GPU {ordinal}, {name}: {what}"))
            })?;
            modules.insert(file, module);
        }
        let (free, all) = context.mem_get_info().map_err(wrap)?;
        #[cfg_attr(not(feature = "cudnn"), expect(unused_mut, reason = "cuDNN adds its own"))]
        let mut facts = vec![
            ("device", format!("GPU {ordinal}, {name}, compute capability {major}.{minor}")),
            ("memory", format!("{:.1} GB, {:.1} GB free", all as f64 / 1e9, free as f64 / 1e9)),
            ("driver", format!("for CUDA {}", version(driver))),
            ("kernels", format!("by CUDA {}", version(built))),
            ("cuBLAS", place_of_blas),
        ];
        #[cfg_attr(not(feature = "cudnn"), expect(unused_mut, reason = "cuDNN adds its own"))]
        let mut notices = Vec::new();
        #[cfg(feature = "cudnn")]
        let dnn = match dnn::Dnn::new(&stream, factors) {
            Ok((dnn, place)) => {
                facts.push(("cuDNN", place));
                Some(dnn)
            }
            Err(error) => {
                facts.push(("cuDNN", format!("not used: {error}")));
                notices.push(format!("{error}: cuBLAS computes convolutions, 2 to 2.5 times slower"));
                None
            }
        };
        Ok(Self {
            blas: Blas::new(blas, &stream, factors)?,
            context,
            stream,
            modules,
            functions: Mutex::default(),
            staged: Mutex::default(),
            is_blocking: std::env::var_os("CUDA_LAUNCH_BLOCKING").is_some_and(|value| value != "0"),
            profile: Mutex::default(),
            facts,
            notices: Mutex::new(notices),
            nccl: OnceLock::new(),
            #[cfg(feature = "cudnn")]
            dnn,
        })
    }

    /// Number of GPUs.
    ///
    /// # Errors
    /// When there is no driver, or it cannot be used.
    pub fn count() -> Result<usize> {
        Ok(driver()?.1)
    }

    /// Name and memory size of the GPU.
    pub fn describe(&self) -> Result<String> {
        let bytes = self.context.total_mem().map_err(wrap)?;
        Ok(format!("{}, {} GiB", self.context.name().map_err(wrap)?, bytes >> 30))
    }

    /// Free and total memory, in bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(wrap)
    }

    /// Binds the GPU to this thread, as raw driver and library calls require, and returns the stream.
    fn bound(&self) -> Result<cudarc::driver::sys::CUstream> {
        self.context.bind_to_thread().map_err(wrap)?;
        Ok(self.stream.cu_stream())
    }

    fn function(&self, kernel: &str) -> Result<Kernel> {
        if let Some(function) = locked(&self.functions).get(kernel) {
            return Ok(function.clone());
        }
        let module = self.modules.iter().find(|(file, _)| kernel.starts_with(*file));
        let Some((_, module)) = module else { bail!("{kernel}: no such kernel") };
        let function = module.load_function(kernel).map_err(|error| Error::Msg(format!("{kernel}: {error}")))?;
        let parameters = if cfg!(debug_assertions) { parameters(&function) } else { None };
        let loaded = Kernel { function, parameters };
        locked(&self.functions).insert(kernel.to_owned(), loaded.clone());
        Ok(loaded)
    }

    /// Page-locked memory of at least `bytes`: what the GPU has read from already, if it is large enough, else new.
    fn staging(&self, bytes: usize) -> Result<PinnedHostSlice<u8>> {
        let mut staged = locked(&self.staged);
        let fits = |buffer: &Staged| buffer.memory.len() >= bytes;
        let done = staged.iter().position(|buffer| fits(buffer) && buffer.done.is_complete());
        // Rather wait than take more and more; memory that is too small makes room, which waits for all work.
        let at = match done {
            None if staged.len() >= MAX_STAGED => Some(staged.iter().position(fits).unwrap_or_default()),
            found => found,
        };
        if let Some(Staged { memory, done }) = at.and_then(|at| staged.remove(at)) {
            self.wait(&done)?;
            if memory.len() >= bytes {
                return Ok(memory);
            }
        }
        let size = bytes.next_power_of_two().max(LEAST_STAGED);
        // SAFETY: it is written before it is read.
        unsafe { self.context.alloc_pinned_with_flags(size, 0) }.map_err(wrap)
    }

    /// Waits for an event, which may be behind what other ranks take part in.
    fn wait(&self, event: &CudaEvent) -> Result<()> {
        match self.nccl.get() {
            Some(nccl) => nccl.wait(event),
            None => event.synchronize().map_err(wrap),
        }
    }

    /// Waits for all queued work.
    fn synchronise(&self) -> Result<()> {
        match self.nccl.get() {
            Some(nccl) => nccl.wait(&self.stream.record_event(None).map_err(wrap)?),
            None => self.stream.synchronize().map_err(wrap),
        }
    }

    /// Whether NCCL is installed.
    #[cfg(test)]
    pub fn has_nccl() -> bool {
        nccl::library().is_ok()
    }

    fn timed_event(&self) -> Result<CudaEvent> {
        self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).map_err(wrap)
    }

    /// Names what failed; with `CUDA_LAUNCH_BLOCKING`, waits for it first.
    fn finished(&self, what: &str, queued: Result<()>) -> Result<()> {
        let done = match self.is_blocking {
            true => queued.and_then(|()| self.synchronise()),
            false => queued,
        };
        let done = done.and_then(|()| {
            if let Some(events) = &mut *locked(&self.profile) {
                events.push((what.to_owned(), self.timed_event()?));
            }
            Ok(())
        });
        done.map_err(|error| {
            // A fault of earlier work ends all calls after it, each with an error of its own. What other ranks take
            // part in may never end.
            let fault = match self.is_blocking || self.nccl.get().is_some() {
                true => None,
                false => self.stream.synchronize().err(),
            };
            let earlier = fault.map(|fault| {
                format!(" (after {fault:?} of this or an earlier call: CUDA_LAUNCH_BLOCKING=1 tells which)")
            });
            let earlier = earlier.unwrap_or_default();
            Error::Msg(format!("{what}: {error}{earlier}"))
        })
    }
}

/// Finds the driver and initialises it. Returns its version and the number of GPUs.
fn driver() -> Result<(i32, usize)> {
    let Some(found) = library::load(&["libcuda.so.1", "libcuda.so", "nvcuda.dll"]) else {
        bail!("no CUDA driver on this machine: libcuda.so.1 is missing");
    };
    library::check(&found.library, &found.place, &DRIVER)?;
    // The driver's bindings find it by its name, which is known as long as it is loaded.
    std::mem::forget(found);
    result::init().map_err(|error| Error::Msg(format!("no usable CUDA driver: {error}")))?;
    let mut version = 0;
    // SAFETY: the pointer is to a local variable.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(wrap)?;
    let num = CudaContext::device_count().map_err(wrap)?;
    Ok((version, usize::try_from(num).unwrap_or_default()))
}

/// A version as CUDA counts it, in words: 12080 is 12.8.
fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// Bytes of each of a kernel's parameters; none where the driver does not tell.
fn parameters(function: &CudaFunction) -> Option<Vec<usize>> {
    // SAFETY: the driver is loaded; the call fails past the last parameter, and writes to local variables.
    unsafe {
        library::check(sys::culib(), "", &["cuFuncGetParamInfo"]).ok()?;
        let of = |at| {
            let (mut offset, mut bytes) = (0, 0);
            let status = sys::cuFuncGetParamInfo(function.cu_function(), at, &raw mut offset, &raw mut bytes);
            status.result().is_ok().then_some(bytes)
        };
        Some((0..).map_while(of).collect())
    }
}

impl Gpu for Cuda {
    fn alloc(&self, bytes: usize) -> Result<Memory> {
        // SAFETY: arrays are written before they are read.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) }.map_err(|error| {
            let (free, all) = self.memory().unwrap_or_default();
            Error::Msg(format!("cannot allocate {bytes} bytes on the GPU: {error} ({free} of {all} bytes are free)"))
        })?;
        let address = slice.device_ptr(&self.stream).0;
        Ok(Memory { address, bytes, _owner: Box::new(slice) })
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        for (number, piece) in bytes.chunks(STAGED).enumerate() {
            let mut memory = self.staging(piece.len())?;
            memory.as_mut_slice().map_err(wrap)?[..piece.len()].copy_from_slice(piece);
            let staged = &memory.as_slice().map_err(wrap)?[..piece.len()];
            let to = to + (number * STAGED) as u64;
            // SAFETY: the bytes lie in memory by this function's contract; the staging memory is kept until its event
            // is complete.
            let queued = unsafe { result::memcpy_htod_async(to, staged, self.bound()?) };
            self.finished("a copy to the GPU", queued.map_err(wrap))?;
            let done = self.stream.record_event(None).map_err(wrap)?;
            locked(&self.staged).push_back(Staged { memory, done });
        }
        Ok(())
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        if self.nccl.get().is_some() {
            // What other ranks take part in may never end: then nothing is left that would write to the slice.
            self.finished("work before a copy from the GPU", self.synchronise())?;
        }
        // SAFETY: the bytes lie in memory by this function's contract, and the stream is synchronised before the borrow
        // of the slice ends.
        let queued = unsafe { result::memcpy_dtoh_async(bytes, from, self.bound()?) };
        let read = queued.and_then(|()| self.stream.synchronize()).map_err(wrap);
        self.finished("a copy from the GPU", read)
    }

    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: by this function's contract.
        let queued = unsafe { result::memset_d8_async(at, 0, bytes, self.bound()?) };
        self.finished("a fill with zeros", queued.map_err(wrap))
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: by this function's contract.
        let queued = unsafe { result::memcpy_dtod_async(to, from, bytes, self.bound()?) };
        self.finished("a copy on the GPU", queued.map_err(wrap))
    }

    unsafe fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        let Kernel { function, parameters } = self.function(kernel)?;
        if let Some(parameters) = parameters {
            let sizes: Vec<usize> = args.iter().map(Arg::bytes).collect();
            if sizes != parameters {
                bail!("{kernel}: expected arguments of {parameters:?} bytes, found {sizes:?}");
            }
        }
        let address = |arg: &Arg| match arg {
            Arg::Array(array) => array.address(),
            _ => 0,
        };
        let addresses: Vec<u64> = args.iter().map(address).collect();
        let mut builder = self.stream.launch_builder(&function);
        for (arg, address) in args.iter().zip(&addresses) {
            match arg {
                Arg::Array(_) | Arg::Null => builder.arg(address),
                Arg::I32(x) => builder.arg(x),
                Arg::I64(x) => builder.arg(x),
                Arg::F32(x) => builder.arg(x),
            };
        }
        let config = LaunchConfig {
            grid_dim: (launch.grid[0], launch.grid[1], 1),
            block_dim: (launch.block, 1, 1),
            shared_mem_bytes: launch.shared_bytes,
        };
        // SAFETY: by this function's contract. Memory is only reused after earlier work on it, since all work is on one
        // stream.
        let queued = unsafe { builder.launch(config) };
        self.finished(kernel, queued.map(|_| ()).map_err(wrap))
    }

    unsafe fn multiply(&self, product: &Product) -> Result<()> {
        self.bound()?;
        // SAFETY: by this function's contract.
        self.finished("cuBLAS", unsafe { self.blas.multiply(product) })
    }

    fn connect(&self, ranks: &Ranks) -> crate::Result<bool> {
        let nccl = match Nccl::connect(&self.context, ranks)? {
            Ok(nccl) => nccl,
            Err(why) => {
                let what = "what ranks exchange goes through the memory of their machines";
                locked(&self.notices).push(format!("{why}: {what}"));
                return Ok(false);
            }
        };
        match self.nccl.set(nccl) {
            Ok(()) => Ok(true),
            Err(_) => Err(crate::Error::Ranks("this GPU is connected already".into())),
        }
    }

    unsafe fn collect(&self, how: Collective, element: Element, transfers: &[Transfer]) -> Result<()> {
        let Some(nccl) = self.nccl.get() else { bail!("this GPU is not connected") };
        self.bound()?;
        // SAFETY: by this function's contract.
        self.finished("NCCL", unsafe { nccl.collect(how, element, transfers, &self.stream) })
    }

    fn await_collectives(&self) -> Result<()> {
        self.nccl.get().map_or(Ok(()), |nccl| nccl.hold_up(&self.stream))
    }

    #[cfg(feature = "cudnn")]
    unsafe fn convolve(&self, pass: &super::Convolution) -> Result<bool> {
        self.bound()?;
        let Some(dnn) = &self.dnn else { return Ok(false) };
        // SAFETY: by this function's contract.
        let queued = unsafe { dnn.convolve(pass) };
        let is_done = queued.as_ref().is_ok_and(|is_done| *is_done);
        self.finished(&format!("cuDNN, {}", pass.pass.title()), queued.map(|_| ()))?;
        Ok(is_done)
    }

    #[cfg(feature = "cudnn")]
    fn planned(&self) -> Vec<super::Planned> {
        self.dnn.as_ref().map(dnn::Dnn::planned).unwrap_or_default()
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        // It is large, and a process on its own does without: loaded only to tell.
        let nccl = nccl::library().map_or_else(|what| format!("not used: {what}"), |library| library.place.clone());
        self.facts.iter().cloned().chain([("NCCL", nccl)]).collect()
    }

    fn start_profile(&self) -> Result<()> {
        *locked(&self.profile) = Some(vec![(String::new(), self.timed_event()?)]);
        Ok(())
    }

    fn end_profile(&self) -> Result<BTreeMap<String, (usize, f64)>> {
        let events = locked(&self.profile).take().unwrap_or_default();
        self.synchronise()?;
        let mut times: BTreeMap<String, (usize, f64)> = BTreeMap::new();
        for pair in events.windows(2) {
            let [(_, before), (name, after)] = pair else { continue };
            let (calls, ms) = times.entry(name.clone()).or_default();
            *calls += 1;
            *ms += f64::from(before.elapsed_ms(after).map_err(wrap)?);
        }
        Ok(times)
    }

    fn take_notices(&self) -> Vec<String> {
        let notices = std::mem::take(&mut *locked(&self.notices));
        #[cfg(feature = "cudnn")]
        let notices = notices.into_iter().chain(self.dnn.iter().filter_map(dnn::Dnn::take_notice)).collect();
        notices
    }
}
