//! GPU compute: memory, kernels (`kernels/*.cu`), matrix products and convolutions behind one trait, [`Gpu`].
//!
//! `cuda.rs` drives a real GPU. The tests run the same kernel sources on the CPU (`host.rs`), so all code built on
//! [`Gpu`] is compared with the CPU ops on every machine. Work is queued: only [`Array::read`] waits for it.

pub(crate) mod batch_norm;
pub(crate) mod conv;
mod device;
pub(crate) mod distill;
pub(crate) mod images;
pub(crate) mod margin;
pub(crate) mod rows;
pub(crate) mod update;

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cudnn")]
mod cudnn;
#[cfg(test)]
mod host;
#[cfg(test)]
pub(crate) mod tests;

#[cfg(feature = "cuda")]
pub(crate) use cuda::{Cuda, Factors};

pub(crate) use device::{Array, Device, Element};

use candle_core::Result;

/// A device allocation, freed on drop.
pub(crate) struct Memory {
    /// Start address, aligned at least to the 16 bytes of a kernel's access.
    pub address: u64,
    /// Length in bytes.
    pub bytes: usize,
    /// Frees the memory on drop.
    pub _owner: Box<dyn std::any::Any + Send + Sync>,
}

/// A kernel argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arg {
    /// A device address; 0 is null.
    Pointer(u64),
    I32(i32),
    I64(i64),
    F32(f32),
}

/// Launch dimensions of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Number of blocks in x and y.
    pub grid: [u32; 2],
    /// Threads per block.
    pub block: u32,
    /// Shared memory per block.
    pub shared_bytes: u32,
}

/// A matrix in device memory, row-major.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub address: u64,
    pub element: Element,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Whether the matrix is read transposed.
    pub is_transposed: bool,
}

impl Matrix {
    /// Returns the transposed matrix.
    pub fn transposed(self) -> Self {
        Self { is_transposed: !self.is_transposed, ..self }
    }
}

/// `c: (m, n) = alpha * a: (m, k) * b: (k, n) + beta * c`, accumulated in f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    pub alpha: f32,
    pub beta: f32,
}

/// One pass of a convolution; all arrays have the same element type.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cudnn"), expect(dead_code, reason = "only cuDNN has a way of its own"))]
pub(crate) struct Convolution<'a> {
    pub conv: &'a conv::Conv,
    pub pass: Pass,
    pub element: Element,
    /// Address of the input or its gradient; `w` is that of the filters or theirs, `y` that of the output or its own.
    pub x: u64,
    pub w: u64,
    pub y: u64,
}

/// Pass of a [`Convolution`]: which of its three arrays is computed from the other two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Pass {
    Forward,
    GradX,
    GradW,
}

/// A device that runs kernels in the order of their launches.
pub(crate) trait Gpu: Send + Sync {
    /// Allocates uninitialised memory.
    fn alloc(&self, bytes: usize) -> Result<Memory>;
    /// Copies bytes to the device.
    fn write(&self, to: u64, bytes: &[u8]) -> Result<()>;
    /// Waits for all queued work, then copies bytes from the device.
    fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()>;
    /// Fills memory with zeros.
    fn zero(&self, at: u64, bytes: usize) -> Result<()>;
    /// Runs a kernel of `kernels/`.
    fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()>;
    /// Multiplies matrices.
    fn multiply(&self, product: &Product) -> Result<()>;
    /// Runs a convolution pass with the device's own library; returns false, with nothing done, if it has none.
    fn convolve(&self, _pass: &Convolution) -> Result<bool> {
        Ok(false)
    }
}
