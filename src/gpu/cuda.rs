//! An NVIDIA GPU: the driver, the compiled kernels, cuBLAS, and cuDNN with the feature `cudnn`.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Error, Result, bail};
use cudarc::cublas::sys as blas;
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PinnedHostSlice,
    PushKernelArg, result,
};
use cudarc::nvrtc::Ptx;

use super::{Arg, Element, Gpu, Launch, Matrix, Memory, Product};

/// Compiled kernel files, by the prefix of their kernels' names.
const KERNELS: [(&str, &[u8]); 7] = [
    ("batch_norm", include_bytes!(concat!(env!("OUT_DIR"), "/batch_norm.fatbin"))),
    ("conv", include_bytes!(concat!(env!("OUT_DIR"), "/conv.fatbin"))),
    ("distill", include_bytes!(concat!(env!("OUT_DIR"), "/distill.fatbin"))),
    ("images", include_bytes!(concat!(env!("OUT_DIR"), "/images.fatbin"))),
    ("margin", include_bytes!(concat!(env!("OUT_DIR"), "/margin.fatbin"))),
    ("rows", include_bytes!(concat!(env!("OUT_DIR"), "/rows.fatbin"))),
    ("update", include_bytes!(concat!(env!("OUT_DIR"), "/update.fatbin"))),
];

/// Bytes of cuBLAS workspace: NVIDIA's recommendation for an H100.
const WORKSPACE: usize = 32 << 20;
/// Maximum number of copies from page-locked memory in flight.
const MAX_COPIES: usize = 8;

/// Whether f32 products may round their factors to TF32 (11 bits of mantissa), as tensor cores do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Factors {
    Exact,
    Tf32,
}

/// A GPU and the one stream that all work is queued on.
pub(crate) struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    modules: BTreeMap<&'static str, Arc<CudaModule>>,
    functions: Mutex<HashMap<String, CudaFunction>>,
    blas: Blas,
    /// Page-locked staging copies of written bytes, kept until the GPU has read them.
    copies: Mutex<VecDeque<Copy>>,
    #[cfg(feature = "cudnn")]
    dnn: Option<super::cudnn::Dnn>,
}

struct Copy {
    memory: PinnedHostSlice<u8>,
    done: CudaEvent,
}

fn wrap(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(error)
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether one of the named libraries can be loaded.
pub(super) fn is_present(names: &[&str]) -> bool {
    // SAFETY: NVIDIA's libraries; loading them runs nothing that depends on this process.
    names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok())
}

impl Cuda {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// When the driver, cuBLAS, the GPU or kernels for it are missing; the message is one line that says which.
    pub fn new(ordinal: usize, factors: Factors) -> Result<Self> {
        if !is_present(&["libcuda.so.1", "libcuda.so", "nvcuda.dll"]) {
            bail!("no CUDA driver on this machine: libcuda.so.1 is missing");
        }
        if !is_present(&["libcublas.so.13", "libcublas.so.12", "libcublas.so", "cublas64_13.dll", "cublas64_12.dll"]) {
            bail!("cuBLAS is missing: no libcublas.so.13 or .12 on the library path (LD_LIBRARY_PATH)");
        }
        result::init().map_err(|error| Error::Msg(format!("no usable CUDA driver: {error}")))?;
        let num = CudaContext::device_count().map_err(wrap)?;
        if usize::try_from(num).is_ok_and(|num| ordinal >= num) {
            bail!("no GPU {ordinal}: this machine has {num}");
        }
        let context = CudaContext::new(ordinal).map_err(wrap)?;
        let (major, minor) = context.compute_capability().map_err(wrap)?;
        let name = context.name().map_err(wrap)?;
        if major < 8 {
            bail!("GPU {ordinal}, {name}: compute capability {major}.{minor}, expected 8.0 or newer (bf16)");
        }
        // SAFETY: all work goes to one stream, so no event has to order it.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(wrap)?;
        let mut modules = BTreeMap::new();
        for (file, code) in KERNELS {
            let module = context.load_module(Ptx::from_binary(code.to_vec())).map_err(|error| {
                Error::Msg(format!("GPU {ordinal}, {name}: no kernels for compute capability {major}.{minor}: {error}"))
            })?;
            modules.insert(file, module);
        }
        #[cfg(feature = "cudnn")]
        let dnn = super::cudnn::Dnn::new(&stream, factors)?;
        Ok(Self {
            blas: Blas::new(&stream, factors)?,
            context,
            stream,
            modules,
            functions: Mutex::default(),
            copies: Mutex::default(),
            #[cfg(feature = "cudnn")]
            dnn,
        })
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

    fn function(&self, kernel: &str) -> Result<CudaFunction> {
        if let Some(function) = locked(&self.functions).get(kernel) {
            return Ok(function.clone());
        }
        let module = self.modules.iter().find(|(file, _)| kernel.starts_with(*file));
        let Some((_, module)) = module else { bail!("{kernel}: no such kernel") };
        let function = module.load_function(kernel).map_err(|error| Error::Msg(format!("{kernel}: {error}")))?;
        locked(&self.functions).insert(kernel.to_owned(), function.clone());
        Ok(function)
    }

    /// Page-locked memory of at least `bytes`: a finished copy's if one is large enough, else new.
    fn pinned(&self, bytes: usize) -> Result<PinnedHostSlice<u8>> {
        let mut copies = locked(&self.copies);
        let found = copies.iter().position(|copy| copy.memory.len() >= bytes && copy.done.is_complete());
        if let Some(copy) = found.and_then(|at| copies.remove(at)) {
            return Ok(copy.memory);
        }
        if copies.len() >= MAX_COPIES
            && let Some(oldest) = copies.pop_front()
        {
            oldest.done.synchronize().map_err(wrap)?;
        }
        // SAFETY: it is written before it is read.
        unsafe { self.context.alloc_pinned_with_flags(bytes, 0) }.map_err(wrap)
    }
}

/// cuBLAS on a stream, with its workspace.
struct Blas {
    handle: cudarc::cublas::CudaBlas,
    factors: Factors,
    _workspace: CudaSlice<u8>,
}

impl Blas {
    fn new(stream: &Arc<CudaStream>, factors: Factors) -> Result<Self> {
        let handle = cudarc::cublas::CudaBlas::new(stream.clone()).map_err(wrap)?;
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE).map_err(wrap)?;
        let (address, _) = workspace.device_ptr(stream);
        // SAFETY: the memory lives as long as the handle, and is used in the order of the handle's stream.
        let status = unsafe { blas::cublasSetWorkspace_v2(*handle.handle(), address as *mut c_void, WORKSPACE) };
        status.result().map_err(wrap)?;
        Ok(Self { handle, factors, _workspace: workspace })
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        let Product { m, n, k, a, b, c, alpha, beta } = *product;
        if c.is_transposed || a.element != b.element {
            bail!("multiply: {product:?}");
        }
        let compute = match (a.element, self.factors) {
            (Element::F32, Factors::Tf32) => blas::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let size = |size: usize| i32::try_from(size).map_err(wrap);
        let op = |x: Matrix| match x.is_transposed {
            true => blas::cublasOperation_t::CUBLAS_OP_T,
            false => blas::cublasOperation_t::CUBLAS_OP_N,
        };
        // cuBLAS is column-major and sees each matrix transposed, so it computes b' a' = c'.
        // SAFETY: the callers' matrices lie in arrays of their sizes; alpha and beta are f32, as the computation is.
        unsafe {
            cudarc::cublas::result::gemm_ex(
                *self.handle.handle(),
                op(b),
                op(a),
                size(n)?,
                size(m)?,
                size(k)?,
                (&raw const alpha).cast(),
                b.address as *const c_void,
                data_type(b.element)?,
                size(b.stride)?,
                a.address as *const c_void,
                data_type(a.element)?,
                size(a.stride)?,
                (&raw const beta).cast(),
                c.address as *mut c_void,
                data_type(c.element)?,
                size(c.stride)?,
                compute,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(wrap)
    }
}

fn data_type(element: Element) -> Result<blas::cudaDataType> {
    Ok(match element {
        Element::F32 => blas::cudaDataType::CUDA_R_32F,
        Element::Bf16 => blas::cudaDataType::CUDA_R_16BF,
        Element::F16 => blas::cudaDataType::CUDA_R_16F,
        other => bail!("multiply: matrices of {other:?}"),
    })
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

    fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        let mut memory = self.pinned(bytes.len())?;
        memory.as_mut_slice().map_err(wrap)?[..bytes.len()].copy_from_slice(bytes);
        let staged = &memory.as_slice().map_err(wrap)?[..bytes.len()];
        // SAFETY: the array has that many bytes; the staging memory is kept until its event is complete.
        unsafe { result::memcpy_htod_async(to, staged, self.bound()?) }.map_err(wrap)?;
        let done = self.stream.record_event(None).map_err(wrap)?;
        locked(&self.copies).push_back(Copy { memory, done });
        Ok(())
    }

    fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the array has that many bytes, and the stream is synchronised before the borrow of the slice ends.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.bound()?) }.map_err(wrap)?;
        self.stream.synchronize().map_err(wrap)
    }

    fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: the array has that many bytes.
        unsafe { result::memset_d8_async(at, 0, bytes, self.bound()?) }.map_err(wrap)
    }

    fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        let function = self.function(kernel)?;
        let mut builder = self.stream.launch_builder(&function);
        for arg in args {
            match arg {
                Arg::Pointer(address) => builder.arg(address),
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
        // SAFETY: the callers' arguments have the kernel's types, in its order: the tests make the same calls on the
        // CPU, where types are checked. Memory is only reused after earlier work on it, since all work is on one
        // stream.
        unsafe { builder.launch(config) }.map_err(|error| Error::Msg(format!("{kernel}: {error}")))?;
        Ok(())
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        self.bound()?;
        self.blas.multiply(product)
    }

    #[cfg(feature = "cudnn")]
    fn convolve(&self, pass: &super::Convolution) -> Result<bool> {
        self.bound()?;
        self.dnn.as_ref().map_or(Ok(false), |dnn| dnn.convolve(pass))
    }
}
