//! Channels-last convolutions by cuDNN. The fastest algorithm of each is measured once and cached.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{Error, Result, bail};
use cudarc::cudnn::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::conv::Conv;
use super::cuda::{Factors, is_present};
use super::{Convolution, Element, Pass};

/// Bytes of workspace for a convolution.
const WORKSPACE: usize = 1 << 30;
/// Maximum number of algorithms that are measured.
const MAX_WAYS: usize = 10;

type Key = (Conv, Pass, usize);

/// cuDNN on a stream.
pub(super) struct Dnn {
    handle: sys::cudnnHandle_t,
    factors: Factors,
    plans: Mutex<BTreeMap<Key, Option<Plan>>>,
    stream: Arc<CudaStream>,
    workspace: CudaSlice<u8>,
}

/// Descriptors of a convolution and the algorithm that runs it.
struct Plan {
    x: Descriptor<sys::cudnnTensorDescriptor_t>,
    w: Descriptor<sys::cudnnFilterDescriptor_t>,
    y: Descriptor<sys::cudnnTensorDescriptor_t>,
    conv: Descriptor<sys::cudnnConvolutionDescriptor_t>,
    way: Way,
}

#[derive(Clone, Copy)]
enum Way {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    GradX(sys::cudnnConvolutionBwdDataAlgo_t),
    GradW(sys::cudnnConvolutionBwdFilterAlgo_t),
}

/// A cuDNN descriptor, destroyed on drop.
struct Descriptor<T: Copy> {
    raw: T,
    destroy: unsafe fn(T) -> std::result::Result<(), result::CudnnError>,
}

impl<T: Copy> Drop for Descriptor<T> {
    fn drop(&mut self) {
        // SAFETY: the descriptor was created with the plan and has no other owner. On an error there is nothing to do.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

// SAFETY: the handle and the descriptors are only used under the lock of the plans, by one thread at a time.
unsafe impl Send for Dnn {}
// SAFETY: as above.
unsafe impl Sync for Dnn {}

impl Drop for Dnn {
    fn drop(&mut self) {
        self.plans().clear();
        // SAFETY: the handle was created by `new`. On an error there is nothing to do.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn wrap(error: result::CudnnError) -> Error {
    Error::Msg(format!("cuDNN: {error:?}"))
}

impl Dnn {
    /// Opens cuDNN; returns none if it is not installed.
    pub fn new(stream: &Arc<CudaStream>, factors: Factors) -> Result<Option<Self>> {
        if !is_present(&["libcudnn.so.9", "libcudnn.so", "cudnn64_9.dll"]) {
            return Ok(None);
        }
        let handle = result::create_handle().map_err(wrap)?;
        // SAFETY: the stream lives as long as the handle.
        unsafe { result::set_stream(handle, stream.cu_stream().cast()) }.map_err(wrap)?;
        // SAFETY: cuDNN writes the workspace before it reads it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE) }.map_err(Error::wrap)?;
        Ok(Some(Self { handle, factors, plans: Mutex::default(), stream: stream.clone(), workspace }))
    }

    /// Runs a pass; all arrays, the filters' gradient included, have the same type. Returns false if cuDNN has no
    /// deterministic algorithm for it.
    pub fn convolve(&self, pass: &Convolution) -> Result<bool> {
        let key = (*pass.conv, pass.pass, pass.element.bytes() + usize::from(pass.element == Element::F16));
        let mut plans = self.plans();
        let plan = match plans.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(self.plan(pass)?),
        };
        plan.as_ref().map_or(Ok(false), |plan| self.run(pass, plan).map(|()| true))
    }

    fn plans(&self) -> MutexGuard<'_, BTreeMap<Key, Option<Plan>>> {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn workspace(&self) -> *mut c_void {
        self.workspace.device_ptr(&self.stream).0 as *mut c_void
    }

    fn run(&self, pass: &Convolution, plan: &Plan) -> Result<()> {
        let (one, zero) = (1f32, 0f32);
        let (alpha, beta) = ((&raw const one).cast(), (&raw const zero).cast());
        let Plan { x, w, y, conv, way } = plan;
        let [px, pw, py] = [pass.x, pass.w, pass.y].map(|address| address as *mut c_void);
        let (handle, workspace) = (self.handle, self.workspace());
        // SAFETY: the descriptors match the arrays, whose sizes the caller checked; alpha and beta are f32, as the
        // computation is; the stream orders the uses of the workspace.
        unsafe {
            match *way {
                Way::Forward(way) => result::convolution_forward(
                    handle, alpha, x.raw, px, w.raw, pw, conv.raw, way, workspace, WORKSPACE, beta, y.raw, py,
                ),
                Way::GradX(way) => result::convolution_backward_data(
                    handle, alpha, w.raw, pw, y.raw, py, conv.raw, way, workspace, WORKSPACE, beta, x.raw, px,
                ),
                Way::GradW(way) => result::convolution_backward_filter(
                    handle, alpha, x.raw, px, y.raw, py, conv.raw, way, workspace, WORKSPACE, beta, w.raw, pw,
                ),
            }
        }
        .map_err(wrap)
    }

    /// Describes a convolution and measures which algorithm is fastest on its arrays; the output array is overwritten.
    /// Returns none if no algorithm is deterministic.
    fn plan(&self, pass: &Convolution) -> Result<Option<Plan>> {
        let Conv { x: [n, h, width, c], co, k, stride, padding, group } = *pass.conv;
        if group.is_some() {
            bail!("cuDNN: grouped convolutions run on our own kernels");
        }
        let [_, ho, wo, _] = pass.conv.y();
        let data_type = match pass.element {
            Element::F32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
            Element::Bf16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            Element::F16 => sys::cudnnDataType_t::CUDNN_DATA_HALF,
            other => bail!("cuDNN: convolutions of {other:?}"),
        };
        let math = match (pass.element, self.factors) {
            (Element::F32, Factors::Exact) => sys::cudnnMathType_t::CUDNN_FMA_MATH,
            _ => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        };
        let format = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;
        let size = |size: usize| i32::try_from(size).map_err(Error::wrap);
        let tensor = |[n, c, h, w]: [usize; 4]| -> Result<_> {
            let raw = result::create_tensor_descriptor().map_err(wrap)?;
            let descriptor = Descriptor { raw, destroy: result::destroy_tensor_descriptor };
            let sizes = [size(n)?, size(c)?, size(h)?, size(w)?];
            // SAFETY: the descriptor was just created.
            unsafe { result::set_tensor4d_descriptor(raw, format, data_type, sizes) }.map_err(wrap)?;
            Ok(descriptor)
        };
        let (x, y) = (tensor([n, c, h, width])?, tensor([n, co, ho, wo])?);
        let raw = result::create_filter_descriptor().map_err(wrap)?;
        let w = Descriptor { raw, destroy: result::destroy_filter_descriptor };
        let sizes = [size(co)?, size(c)?, size(k)?, size(k)?];
        // SAFETY: the descriptor was just created.
        unsafe { result::set_filter4d_descriptor(raw, data_type, format, sizes) }.map_err(wrap)?;
        let raw = result::create_convolution_descriptor().map_err(wrap)?;
        let conv = Descriptor { raw, destroy: result::destroy_convolution_descriptor };
        let (padding, stride) = (size(padding)?, size(stride)?);
        let mode = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let compute = sys::cudnnDataType_t::CUDNN_DATA_FLOAT;
        // SAFETY: the descriptor was just created.
        unsafe {
            result::set_convolution2d_descriptor(raw, padding, padding, stride, stride, 1, 1, mode, compute)
                .map_err(wrap)?;
            result::set_convolution_math_type(raw, math).map_err(wrap)?;
        }
        let mut plan = Plan {
            x,
            w,
            y,
            conv,
            way: Way::Forward(sys::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM),
        };
        let Some(way) = self.fastest(pass, &plan) else { return Ok(None) };
        plan.way = way;
        Ok(Some(plan))
    }

    /// The fastest deterministic algorithm, if cuDNN finds one.
    fn fastest(&self, pass: &Convolution, plan: &Plan) -> Option<Way> {
        let Plan { x, w, y, conv, .. } = plan;
        let [px, pw, py] = [pass.x, pass.w, pass.y].map(|address| address as *mut c_void);
        let (handle, workspace) = (self.handle, self.workspace());
        let (wanted, mut num) = (MAX_WAYS as i32, 0);
        /// First result that succeeded and is deterministic: cuDNN lists the fastest first.
        macro_rules! first {
            ($Perf:ty, $way:path, |$found:ident| $find:expr) => {{
                // SAFETY: plain numbers, for which all zeros is a valid value.
                let mut $found: [$Perf; MAX_WAYS] = unsafe { std::mem::zeroed() };
                // SAFETY: as in `run`; there is room for as many results as are requested.
                unsafe { $find }.result().ok()?;
                let found = $found.iter().take(usize::try_from(num).unwrap_or_default()).find(|perf| {
                    perf.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS
                        && perf.determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC
                });
                found.map(|perf| $way(perf.algo))
            }};
        }
        match pass.pass {
            Pass::Forward => first!(sys::cudnnConvolutionFwdAlgoPerf_t, Way::Forward, |found| {
                sys::cudnnFindConvolutionForwardAlgorithmEx(
                    handle,
                    x.raw,
                    px,
                    w.raw,
                    pw,
                    conv.raw,
                    y.raw,
                    py,
                    wanted,
                    &raw mut num,
                    found.as_mut_ptr(),
                    workspace,
                    WORKSPACE,
                )
            }),
            Pass::GradX => first!(sys::cudnnConvolutionBwdDataAlgoPerf_t, Way::GradX, |found| {
                sys::cudnnFindConvolutionBackwardDataAlgorithmEx(
                    handle,
                    w.raw,
                    pw,
                    y.raw,
                    py,
                    conv.raw,
                    x.raw,
                    px,
                    wanted,
                    &raw mut num,
                    found.as_mut_ptr(),
                    workspace,
                    WORKSPACE,
                )
            }),
            Pass::GradW => first!(sys::cudnnConvolutionBwdFilterAlgoPerf_t, Way::GradW, |found| {
                sys::cudnnFindConvolutionBackwardFilterAlgorithmEx(
                    handle,
                    x.raw,
                    px,
                    y.raw,
                    py,
                    conv.raw,
                    w.raw,
                    pw,
                    wanted,
                    &raw mut num,
                    found.as_mut_ptr(),
                    workspace,
                    WORKSPACE,
                )
            }),
        }
    }
}
