//! Matrix products by cuBLAS.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::{Error, Result, bail};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::Factors;
use super::library::{Found, failed, functions, load};
use crate::gpu::{Element, Matrix, Product};

/// File names of the library, the newest version first. A name without a version could be any.
const LIBRARIES: [&str; 4] = ["libcublas.so.13", "libcublas.so.12", "cublas64_13.dll", "cublas64_12.dll"];
/// Bytes of workspace: NVIDIA's recommendation for an H100.
const WORKSPACE: usize = 32 << 20;

/// `cublasOperation_t`: a matrix as it is, or transposed.
const AS_IT_IS: i32 = 0;
const TRANSPOSED: i32 = 1;
/// `cudaDataType`: f32, f16 and bf16.
const R_32F: i32 = 0;
const R_16F: i32 = 2;
const R_16BF: i32 = 14;
/// `cublasComputeType_t`: sums in f32, with exact factors or with factors rounded to TF32.
const COMPUTE_32F: i32 = 68;
const COMPUTE_32F_FAST_TF32: i32 = 77;
/// `cublasMath_t`: without reductions between parts of a sum in less than f32.
const NO_REDUCED_PRECISION_REDUCTION: i32 = 16;
/// `cublasGemmAlgo_t`: the library chooses.
const ALGORITHM: i32 = -1;

/// `cublasStatus_t`.
const STATUSES: [(i32, &str); 9] = [
    (1, "CUBLAS_STATUS_NOT_INITIALIZED"),
    (3, "CUBLAS_STATUS_ALLOC_FAILED"),
    (7, "CUBLAS_STATUS_INVALID_VALUE"),
    (8, "CUBLAS_STATUS_ARCH_MISMATCH"),
    (11, "CUBLAS_STATUS_MAPPING_ERROR"),
    (13, "CUBLAS_STATUS_EXECUTION_FAILED"),
    (14, "CUBLAS_STATUS_INTERNAL_ERROR"),
    (15, "CUBLAS_STATUS_NOT_SUPPORTED"),
    (16, "CUBLAS_STATUS_LICENSE_ERROR"),
];

functions! {
    /// The functions of cuBLAS that are called.
    Functions {
        cublasCreate_v2(handle: *mut *mut c_void) -> i32;
        cublasDestroy_v2(handle: *mut c_void) -> i32;
        cublasSetStream_v2(handle: *mut c_void, stream: *mut c_void) -> i32;
        cublasSetWorkspace_v2(handle: *mut c_void, workspace: *mut c_void, bytes: usize) -> i32;
        cublasSetMathMode(handle: *mut c_void, mode: i32) -> i32;
        cublasGemmEx(
            handle: *mut c_void, op_a: i32, op_b: i32, m: i32, n: i32, k: i32, alpha: *const c_void,
            a: *const c_void, type_a: i32, lda: i32, b: *const c_void, type_b: i32, ldb: i32, beta: *const c_void,
            c: *mut c_void, type_c: i32, ldc: i32, compute: i32, algorithm: i32,
        ) -> i32;
    }
}

/// cuBLAS on a stream, with its workspace.
pub(super) struct Blas {
    functions: Functions,
    handle: *mut c_void,
    factors: Factors,
    _workspace: CudaSlice<u8>,
    _stream: Arc<CudaStream>,
}

// SAFETY: cuBLAS may be called from several threads, one at a time on a handle; the GPU's one stream is used under the
// lock of its caller.
unsafe impl Send for Blas {}
// SAFETY: as above; cuBLAS guards a handle's state against calls at the same time.
unsafe impl Sync for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: `new` made the handle. On an error there is nothing to do.
        let _ = unsafe { (self.functions.cublasDestroy_v2)(self.handle) };
    }
}

fn check(call: &str, status: i32) -> Result<()> {
    if status == 0 { Ok(()) } else { Err(failed("cuBLAS", call, status, status, &STATUSES)) }
}

impl Blas {
    /// Loads cuBLAS; its error is one line that says what is missing.
    pub fn library() -> Result<(Functions, String)> {
        let Some(Found { library, place }) = load(&LIBRARIES) else {
            bail!(
                "cuBLAS is missing: no libcublas.so.13 or .12 in LD_LIBRARY_PATH, CUDA_HOME, /usr/local/cuda, Python's \
                 packages or the system's folders"
            );
        };
        Ok((Functions::of(library, &place)?, place))
    }

    /// Opens cuBLAS on a stream.
    pub fn new(functions: Functions, stream: &Arc<CudaStream>, factors: Factors) -> Result<Self> {
        // SAFETY: cuBLAS writes the workspace before it reads it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE) }.map_err(Error::wrap)?;
        let (address, _) = workspace.device_ptr(stream);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer is to a local variable.
        check("cublasCreate", unsafe { (functions.cublasCreate_v2)(&raw mut handle) })?;
        let stream_handle = stream.cu_stream().cast();
        let blas = Self { functions, handle, factors, _workspace: workspace, _stream: stream.clone() };
        let Functions { cublasSetStream_v2, cublasSetWorkspace_v2, cublasSetMathMode, .. } = &blas.functions;
        // SAFETY: the stream and the memory live as long as the handle, and the memory is used in the stream's order.
        unsafe {
            check("cublasSetStream", cublasSetStream_v2(handle, stream_handle))?;
            check("cublasSetWorkspace", cublasSetWorkspace_v2(handle, address as *mut c_void, WORKSPACE))?;
            check("cublasSetMathMode", cublasSetMathMode(handle, NO_REDUCED_PRECISION_REDUCTION))?;
        }
        Ok(blas)
    }

    /// Computes a product.
    ///
    /// # Safety
    /// The matrices have the product's sizes and lie in their arrays, which are on this GPU.
    pub unsafe fn multiply(&self, product: &Product) -> Result<()> {
        let Product { m, n, k, a, b, c, alpha, beta } = *product;
        if c.is_transposed || a.element() != b.element() {
            bail!("multiply: {product:?}");
        }
        let compute = match (a.element(), self.factors) {
            (Element::F32, Factors::Tf32) => COMPUTE_32F_FAST_TF32,
            _ => COMPUTE_32F,
        };
        let size = |size: usize| i32::try_from(size).map_err(Error::wrap);
        let op = |x: Matrix| if x.is_transposed { TRANSPOSED } else { AS_IT_IS };
        // cuBLAS is column-major and sees each matrix transposed, so it computes b' a' = c'.
        // SAFETY: the matrices lie in their arrays by this function's contract; alpha and beta are f32, as the computation is.
        let status = unsafe {
            (self.functions.cublasGemmEx)(
                self.handle,
                op(b),
                op(a),
                size(n)?,
                size(m)?,
                size(k)?,
                (&raw const alpha).cast(),
                b.array.address() as *const c_void,
                data_type(b.element())?,
                size(b.stride)?,
                a.array.address() as *const c_void,
                data_type(a.element())?,
                size(a.stride)?,
                (&raw const beta).cast(),
                c.array.address() as *mut c_void,
                data_type(c.element())?,
                size(c.stride)?,
                compute,
                ALGORITHM,
            )
        };
        check("cublasGemmEx", status)
    }
}

fn data_type(element: Element) -> Result<i32> {
    Ok(match element {
        Element::F32 => R_32F,
        Element::Bf16 => R_16BF,
        Element::F16 => R_16F,
        other => bail!("multiply: matrices of {other:?}"),
    })
}
