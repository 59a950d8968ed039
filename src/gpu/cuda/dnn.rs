//! Channels-last convolutions by cuDNN. The fastest algorithm of each is measured once and kept.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Error, Result, bail};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::Factors;
use super::library::{Found, failed, functions, load};
use crate::gpu::conv::Conv;
use crate::gpu::{Convolution, Element, Pass, Planned};

/// File names of the library. One without a version could be any: a result of version 8 means something else.
const LIBRARIES: [&str; 2] = ["libcudnn.so.9", "cudnn64_9.dll"];
/// Most bytes of workspace that a search may use.
const SEARCH_WORKSPACE: usize = 1 << 30;
/// Results that a search has room for: each algorithm comes once for each type of math.
const MAX_WAYS: usize = 20;

/// `cudnnDataType_t`: f32, f16 and bf16.
const DATA_FLOAT: i32 = 0;
const DATA_HALF: i32 = 2;
const DATA_BFLOAT16: i32 = 9;
/// `cudnnTensorFormat_t`: channels last.
const NHWC: i32 = 1;
/// `cudnnConvolutionMode_t`: without turning the filter.
const CROSS_CORRELATION: i32 = 1;
/// `cudnnMathType_t`: tensor cores for the types that have them; no rounding of f32 factors.
const TENSOR_OP_MATH: i32 = 1;
const FMA_MATH: i32 = 3;
/// `cudnnDeterminism_t`.
const DETERMINISTIC: i32 = 1;

/// Names of `cudnnMathType_t`.
const MATHS: [&str; 4] = ["default math", "tensor cores", "tensor cores, f32 rounded", "FMA"];
/// Names of the algorithms of each pass.
const FORWARD: [&str; 8] = [
    "implicit GEMM",
    "implicit GEMM, indices precomputed",
    "GEMM",
    "direct",
    "FFT",
    "FFT of tiles",
    "Winograd",
    "Winograd, not fused",
];
const GRAD_X: [&str; 6] = ["algorithm 0", "algorithm 1", "FFT", "FFT of tiles", "Winograd", "Winograd, not fused"];
const GRAD_W: [&str; 7] =
    ["algorithm 0", "algorithm 1", "FFT", "algorithm 3", "Winograd", "Winograd, not fused", "FFT of tiles"];

/// Classes of `cudnnStatus_t` of version 9; the last three digits say more.
const STATUSES: [(i32, &str); 5] = [
    (1000, "CUDNN_STATUS_NOT_INITIALIZED"),
    (2000, "CUDNN_STATUS_BAD_PARAM"),
    (3000, "CUDNN_STATUS_NOT_SUPPORTED"),
    (4000, "CUDNN_STATUS_INTERNAL_ERROR"),
    (5000, "CUDNN_STATUS_EXECUTION_FAILED"),
];

const NOT_SUPPORTED: i32 = 3000;

/// A handle, or a descriptor.
type Handle = *mut c_void;
type Const = *const c_void;

/// Result of a search, as cuDNN lays it out.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Perf {
    algorithm: i32,
    status: i32,
    time: f32,
    memory: usize,
    determinism: i32,
    math: i32,
    reserved: [i32; 3],
}

functions! {
    /// The functions of cuDNN that are called.
    Functions {
        cudnnGetVersion() -> usize;
        cudnnCreate(handle: *mut Handle) -> i32;
        cudnnDestroy(handle: Handle) -> i32;
        cudnnSetStream(handle: Handle, stream: Handle) -> i32;
        cudnnCreateTensorDescriptor(descriptor: *mut Handle) -> i32;
        cudnnDestroyTensorDescriptor(descriptor: Handle) -> i32;
        cudnnSetTensor4dDescriptor(
            descriptor: Handle, format: i32, data_type: i32, n: i32, c: i32, h: i32, w: i32,
        ) -> i32;
        cudnnCreateFilterDescriptor(descriptor: *mut Handle) -> i32;
        cudnnDestroyFilterDescriptor(descriptor: Handle) -> i32;
        cudnnSetFilter4dDescriptor(
            descriptor: Handle, data_type: i32, format: i32, k: i32, c: i32, h: i32, w: i32,
        ) -> i32;
        cudnnCreateConvolutionDescriptor(descriptor: *mut Handle) -> i32;
        cudnnDestroyConvolutionDescriptor(descriptor: Handle) -> i32;
        cudnnSetConvolution2dDescriptor(
            descriptor: Handle, pad_h: i32, pad_w: i32, u: i32, v: i32, dilation_h: i32, dilation_w: i32, mode: i32,
            compute: i32,
        ) -> i32;
        cudnnSetConvolutionMathType(descriptor: Handle, math: i32) -> i32;
        cudnnConvolutionForward(
            handle: Handle, alpha: Const, x: Handle, px: Handle, w: Handle, pw: Handle, conv: Handle, algorithm: i32,
            workspace: Handle, bytes: usize, beta: Const, y: Handle, py: Handle,
        ) -> i32;
        cudnnConvolutionBackwardData(
            handle: Handle, alpha: Const, w: Handle, pw: Handle, y: Handle, py: Handle, conv: Handle, algorithm: i32,
            workspace: Handle, bytes: usize, beta: Const, x: Handle, px: Handle,
        ) -> i32;
        cudnnConvolutionBackwardFilter(
            handle: Handle, alpha: Const, x: Handle, px: Handle, y: Handle, py: Handle, conv: Handle, algorithm: i32,
            workspace: Handle, bytes: usize, beta: Const, w: Handle, pw: Handle,
        ) -> i32;
        cudnnFindConvolutionForwardAlgorithmEx(
            handle: Handle, x: Handle, px: Handle, w: Handle, pw: Handle, conv: Handle, y: Handle, py: Handle,
            wanted: i32, num: *mut i32, found: *mut Perf, workspace: Handle, bytes: usize,
        ) -> i32;
        cudnnFindConvolutionBackwardDataAlgorithmEx(
            handle: Handle, w: Handle, pw: Handle, y: Handle, py: Handle, conv: Handle, x: Handle, px: Handle,
            wanted: i32, num: *mut i32, found: *mut Perf, workspace: Handle, bytes: usize,
        ) -> i32;
        cudnnFindConvolutionBackwardFilterAlgorithmEx(
            handle: Handle, x: Handle, px: Handle, y: Handle, py: Handle, conv: Handle, w: Handle, pw: Handle,
            wanted: i32, num: *mut i32, found: *mut Perf, workspace: Handle, bytes: usize,
        ) -> i32;
    }
}

fn class_of(status: i32) -> i32 {
    status / 1000 * 1000
}

fn check(call: &str, status: i32) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(failed("cuDNN", call, status, class_of(status), &STATUSES)) }
}

type Key = (Conv, Pass, Element);

/// cuDNN on a stream.
pub(super) struct Dnn {
    functions: Arc<Functions>,
    handle: Handle,
    factors: Factors,
    state: Mutex<State>,
    stream: Arc<CudaStream>,
}

/// What is known of convolutions so far.
#[derive(Default)]
struct State {
    plans: BTreeMap<Key, Option<Plan>>,
    /// As much as the plans need.
    workspace: Option<CudaSlice<u8>>,
    /// Convolutions without an algorithm, which was not said yet.
    without: Vec<Key>,
}

/// Descriptors of a convolution and the algorithms that can run it.
struct Plan {
    x: Descriptor,
    w: Descriptor,
    y: Descriptor,
    conv: Descriptor,
    /// The fastest first.
    ways: VecDeque<Perf>,
}

/// A cuDNN descriptor, destroyed on drop.
struct Descriptor {
    raw: Handle,
    destroy: unsafe extern "C" fn(Handle) -> i32,
    /// Keeps the library loaded.
    _functions: Arc<Functions>,
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: the descriptor was created with the plan and has no other owner. On an error there is nothing to do.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

// SAFETY: the handle and the descriptors are only used under the lock of the state, by one thread at a time.
unsafe impl Send for Dnn {}
// SAFETY: as above.
unsafe impl Sync for Dnn {}

impl Drop for Dnn {
    fn drop(&mut self) {
        // SAFETY: `new` made the handle. On an error there is nothing to do.
        let _ = unsafe { (self.functions.cudnnDestroy)(self.handle) };
    }
}

impl Dnn {
    /// Opens cuDNN.
    ///
    /// # Errors
    /// When there is no cuDNN of version 9, or it cannot be used; one line.
    pub fn new(stream: &Arc<CudaStream>, factors: Factors) -> Result<(Self, String)> {
        let Some(Found { library, place }) = load(&LIBRARIES) else { bail!("no cuDNN 9 on this machine") };
        let functions = Arc::new(Functions::of(library, &place)?);
        // SAFETY: the call has no arguments.
        let version = unsafe { (functions.cudnnGetVersion)() };
        // 90100 is 9.1.0.
        if version / 10_000 != 9 {
            bail!("{place}: expected version 9 of cuDNN, found {version}");
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer is to a local variable.
        check("cudnnCreate", unsafe { (functions.cudnnCreate)(&raw mut handle) })?;
        let dnn = Self { functions, handle, factors, state: Mutex::default(), stream: stream.clone() };
        // SAFETY: the stream lives as long as the handle.
        check("cudnnSetStream", unsafe { (dnn.functions.cudnnSetStream)(handle, stream.cu_stream().cast()) })?;
        let [major, minor, patch] = [version / 10_000, version / 100 % 100, version % 100];
        Ok((dnn, format!("{place}, {major}.{minor}.{patch}")))
    }

    /// Runs a pass; all arrays, the filters' gradient included, have the same type. Returns false if cuDNN has no
    /// deterministic algorithm for it.
    ///
    /// # Safety
    /// The arrays have the convolution's sizes and are on this GPU.
    pub unsafe fn convolve(&self, pass: &Convolution) -> Result<bool> {
        let key = (*pass.conv, pass.pass, pass.x.element());
        let mut state = self.state();
        let State { plans, workspace, without } = &mut *state;
        let plan = match plans.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                // SAFETY: by this function's contract.
                unknown.insert(Some(unsafe { self.plan(pass)? }))
            }
        };
        let Some(known) = plan else { return Ok(false) };
        while let Some(way) = known.ways.front().copied() {
            let has_room = self.reserve(workspace, way.memory);
            // SAFETY: by this function's contract.
            if has_room && unsafe { self.run(pass, known, way, workspace.as_ref())? } {
                return Ok(true);
            }
            known.ways.pop_front();
        }
        *plan = None;
        without.push(key);
        Ok(false)
    }

    /// What is known of the convolutions that ran so far.
    pub fn planned(&self) -> Vec<Planned> {
        let of = |(key, plan): (&Key, &Option<Plan>)| {
            let (conv, pass, element) = *key;
            let names: &[&str] = match pass {
                Pass::Forward => &FORWARD,
                Pass::GradX => &GRAD_X,
                Pass::GradW => &GRAD_W,
            };
            let name = |names: &[&str], at: i32| {
                let known = usize::try_from(at).ok().and_then(|at| names.get(at).copied());
                known.map_or_else(|| format!("number {at}"), str::to_owned)
            };
            let way = plan.as_ref().and_then(|plan| plan.ways.front());
            let algorithm = way.map(|way| format!("{}, {}", name(names, way.algorithm), name(&MATHS, way.math)));
            let (ms, workspace) = way.map_or((None, 0), |way| (Some(way.time), way.memory));
            Planned { conv, pass, element, algorithm, ms, workspace }
        };
        self.state().plans.iter().map(of).collect()
    }

    /// Returns what is worth saying and was not said yet.
    pub fn take_notice(&self) -> Option<String> {
        let without = std::mem::take(&mut self.state().without);
        let first = describe(*without.first()?);
        let more = if without.len() > 1 { format!(" and {} more", without.len() - 1) } else { String::new() };
        Some(format!("cuDNN has no algorithm for {first}{more}: cuBLAS computes them, 2 to 2.5 times slower"))
    }

    /// Makes the workspace at least this large; false if there is no memory for that.
    fn reserve(&self, workspace: &mut Option<CudaSlice<u8>>, bytes: usize) -> bool {
        if bytes > workspace.as_ref().map_or(0, |held| held.len()) {
            // What is too small goes first: both together may not fit.
            *workspace = None;
            // SAFETY: cuDNN writes the workspace before it reads it.
            *workspace = unsafe { self.stream.alloc::<u8>(bytes) }.ok();
            return workspace.is_some();
        }
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self, memory: &CudaSlice<u8>) -> Handle {
        memory.device_ptr(&self.stream).0 as Handle
    }

    /// Queues a pass; false if cuDNN does not support it that way after all.
    ///
    /// # Safety
    /// Same as for [`Self::convolve`].
    unsafe fn run(
        &self,
        pass: &Convolution,
        plan: &Plan,
        way: Perf,
        workspace: Option<&CudaSlice<u8>>,
    ) -> Result<bool> {
        // A result holds under the type of math that it was measured with.
        self.set_math(&plan.conv, way.math)?;
        let workspace = workspace.map_or(std::ptr::null_mut(), |held| self.address(held));
        let (one, zero) = (1f32, 0f32);
        let (alpha, beta) = ((&raw const one).cast(), (&raw const zero).cast());
        let Plan { x, w, y, conv, .. } = plan;
        let [px, pw, py] = [pass.x, pass.w, pass.y].map(|array| array.address() as Handle);
        let (handle, algorithm, bytes) = (self.handle, way.algorithm, way.memory);
        let Functions {
            cudnnConvolutionForward: forward,
            cudnnConvolutionBackwardData: data,
            cudnnConvolutionBackwardFilter: filter,
            ..
        } = &*self.functions;
        // SAFETY: the descriptors match the arrays by this function's contract; alpha and beta are f32, as the
        // computation is; the stream orders the uses of the workspace.
        let (call, status) = unsafe {
            match pass.pass {
                Pass::Forward => (
                    "cudnnConvolutionForward",
                    forward(
                        handle, alpha, x.raw, px, w.raw, pw, conv.raw, algorithm, workspace, bytes, beta, y.raw, py,
                    ),
                ),
                Pass::GradX => (
                    "cudnnConvolutionBackwardData",
                    data(handle, alpha, w.raw, pw, y.raw, py, conv.raw, algorithm, workspace, bytes, beta, x.raw, px),
                ),
                Pass::GradW => (
                    "cudnnConvolutionBackwardFilter",
                    filter(handle, alpha, x.raw, px, y.raw, py, conv.raw, algorithm, workspace, bytes, beta, w.raw, pw),
                ),
            }
        };
        if class_of(status) == NOT_SUPPORTED {
            return Ok(false);
        }
        check(call, status)?;
        Ok(true)
    }

    fn descriptor(
        &self,
        create: unsafe extern "C" fn(*mut Handle) -> i32,
        destroy: unsafe extern "C" fn(Handle) -> i32,
    ) -> Result<Descriptor> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a local variable.
        check("a descriptor", unsafe { create(&raw mut raw) })?;
        Ok(Descriptor { raw, destroy, _functions: self.functions.clone() })
    }

    /// Describes a convolution and measures its algorithms on its arrays; the output array is overwritten.
    ///
    /// # Safety
    /// Same as for [`Self::convolve`].
    unsafe fn plan(&self, pass: &Convolution) -> Result<Plan> {
        let Conv { x: [n, h, width, c], co, k, stride, padding, group } = *pass.conv;
        if group.is_some() {
            bail!("cuDNN: grouped convolutions run on our own kernels");
        }
        let [_, ho, wo, _] = pass.conv.y();
        let data_type = match pass.x.element() {
            Element::F32 => DATA_FLOAT,
            Element::Bf16 => DATA_BFLOAT16,
            Element::F16 => DATA_HALF,
            other => bail!("cuDNN: convolutions of {other:?}"),
        };
        let math = match (pass.x.element(), self.factors) {
            (Element::F32, Factors::Exact) => FMA_MATH,
            _ => TENSOR_OP_MATH,
        };
        let functions = &*self.functions;
        let size = |size: usize| i32::try_from(size).map_err(Error::wrap);
        let tensor = |[n, c, h, w]: [usize; 4]| -> Result<Descriptor> {
            let made =
                self.descriptor(functions.cudnnCreateTensorDescriptor, functions.cudnnDestroyTensorDescriptor)?;
            let set = functions.cudnnSetTensor4dDescriptor;
            // SAFETY: the descriptor was just created.
            let status = unsafe { set(made.raw, NHWC, data_type, size(n)?, size(c)?, size(h)?, size(w)?) };
            check("cudnnSetTensor4dDescriptor", status)?;
            Ok(made)
        };
        let (x, y) = (tensor([n, c, h, width])?, tensor([n, co, ho, wo])?);
        let w = self.descriptor(functions.cudnnCreateFilterDescriptor, functions.cudnnDestroyFilterDescriptor)?;
        let set = functions.cudnnSetFilter4dDescriptor;
        // SAFETY: the descriptor was just created.
        let status = unsafe { set(w.raw, data_type, NHWC, size(co)?, size(c)?, size(k)?, size(k)?) };
        check("cudnnSetFilter4dDescriptor", status)?;
        let conv =
            self.descriptor(functions.cudnnCreateConvolutionDescriptor, functions.cudnnDestroyConvolutionDescriptor)?;
        let (pad, step) = (size(padding)?, size(stride)?);
        let set = functions.cudnnSetConvolution2dDescriptor;
        // SAFETY: as above.
        let status = unsafe { set(conv.raw, pad, pad, step, step, 1, 1, CROSS_CORRELATION, DATA_FLOAT) };
        check("cudnnSetConvolution2dDescriptor", status)?;
        self.set_math(&conv, math)?;
        let mut plan = Plan { x, w, y, conv, ways: VecDeque::new() };
        // SAFETY: by this function's contract.
        plan.ways = unsafe { self.ways(pass, &plan)? };
        Ok(plan)
    }

    fn set_math(&self, conv: &Descriptor, math: i32) -> Result<()> {
        // SAFETY: the descriptor is a plan's.
        let status = unsafe { (self.functions.cudnnSetConvolutionMathType)(conv.raw, math) };
        check("cudnnSetConvolutionMathType", status)
    }

    /// The deterministic algorithms that ran, the fastest first.
    ///
    /// # Safety
    /// Same as for [`Self::convolve`].
    unsafe fn ways(&self, pass: &Convolution, plan: &Plan) -> Result<VecDeque<Perf>> {
        let Plan { x, w, y, conv, .. } = plan;
        let [px, pw, py] = [pass.x, pass.w, pass.y].map(|array| array.address() as Handle);
        // Given back after the search; a smaller one finds other algorithms.
        let sizes = (0..6).map(|halvings| SEARCH_WORKSPACE >> (2 * halvings));
        // SAFETY: cuDNN writes the workspace before it reads it.
        let memory = sizes.into_iter().find_map(|bytes| unsafe { self.stream.alloc::<u8>(bytes) }.ok());
        let (workspace, bytes) = memory.as_ref().map_or((std::ptr::null_mut(), 0), |m| (self.address(m), m.len()));
        let (handle, wanted, mut num) = (self.handle, MAX_WAYS as i32, 0);
        let mut found = [Perf::default(); MAX_WAYS];
        let (count, results) = (&raw mut num, found.as_mut_ptr());
        let Functions {
            cudnnFindConvolutionForwardAlgorithmEx: forward,
            cudnnFindConvolutionBackwardDataAlgorithmEx: data,
            cudnnFindConvolutionBackwardFilterAlgorithmEx: filter,
            ..
        } = &*self.functions;
        // SAFETY: as in `run`; there is room for as many results as are requested.
        let (call, status) = unsafe {
            match pass.pass {
                Pass::Forward => (
                    "cudnnFindConvolutionForwardAlgorithmEx",
                    forward(
                        handle, x.raw, px, w.raw, pw, conv.raw, y.raw, py, wanted, count, results, workspace, bytes,
                    ),
                ),
                Pass::GradX => (
                    "cudnnFindConvolutionBackwardDataAlgorithmEx",
                    data(handle, w.raw, pw, y.raw, py, conv.raw, x.raw, px, wanted, count, results, workspace, bytes),
                ),
                Pass::GradW => (
                    "cudnnFindConvolutionBackwardFilterAlgorithmEx",
                    filter(handle, x.raw, px, y.raw, py, conv.raw, w.raw, pw, wanted, count, results, workspace, bytes),
                ),
            }
        };
        if class_of(status) == NOT_SUPPORTED {
            return Ok(VecDeque::new());
        }
        check(call, status)?;
        let is_usable = |perf: &&Perf| {
            // Reproducible, and of exact f32 without tensor cores, whatever math the search tried.
            let is_exact = pass.x.element() != Element::F32 || self.factors == Factors::Tf32 || perf.math == FMA_MATH;
            perf.status == 0 && perf.determinism == DETERMINISTIC && is_exact
        };
        let num = usize::try_from(num).unwrap_or_default();
        Ok(found.iter().take(num).filter(is_usable).copied().collect())
    }
}

fn describe((conv, pass, element): Key) -> String {
    format!("{} of {conv}, {}", pass.title(), element.suffix())
}
