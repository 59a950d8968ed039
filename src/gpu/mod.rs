//! Computing on a GPU: memory, kernels (`kernels/*.cu`), matrix products and convolutions behind one trait.
//!
//! `cuda.rs` is the GPU. The tests run the same kernel sources on the CPU (`host.rs`), so what is written here in
//! terms of [`Gpu`] is compared with the CPU's ops on every machine. Work is queued: nothing waits but [`Array::read`].

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

/// A piece of device memory, freed when it is dropped.
pub(crate) struct Memory {
    /// Where it begins; a multiple of 256.
    pub address: u64,
    /// Its length.
    pub bytes: usize,
    /// Frees it when it is dropped.
    pub _owner: Box<dyn std::any::Any + Send + Sync>,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arg {
    /// A place in device memory; 0 for none.
    Pointer(u64),
    I32(i32),
    I64(i64),
    F32(f32),
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Blocks.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub block: u32,
    /// Shared memory of a block.
    pub shared_bytes: u32,
}

/// A matrix in device memory, row-major.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub address: u64,
    pub element: Element,
    /// Elements from a row to the next.
    pub stride: usize,
    /// Whether it is read with rows and columns exchanged.
    pub is_transposed: bool,
}

impl Matrix {
    /// With rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self { is_transposed: !self.is_transposed, ..self }
    }
}

/// `c: (m, n) = alpha * a: (m, k) * b: (k, n) + beta * c`, summed up in f32.
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

/// A pass of a convolution whose arrays have one type.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cudnn"), expect(dead_code, reason = "only cuDNN has a way of its own"))]
pub(crate) struct Convolution<'a> {
    pub conv: &'a conv::Conv,
    pub pass: Pass,
    pub element: Element,
    /// The input or its gradient, the filters or theirs, the result or its gradient.
    pub x: u64,
    pub w: u64,
    pub y: u64,
}

/// What a [`Convolution`] computes from the other two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Pass {
    Forward,
    GradX,
    GradW,
}

/// A machine that runs kernels in the order in which they are given.
pub(crate) trait Gpu: Send + Sync {
    /// Returns memory of any content.
    fn alloc(&self, bytes: usize) -> Result<Memory>;
    /// Copies to the device.
    fn write(&self, to: u64, bytes: &[u8]) -> Result<()>;
    /// Waits for all work so far, and copies from the device.
    fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()>;
    /// Fills with zeros.
    fn zero(&self, at: u64, bytes: usize) -> Result<()>;
    /// Runs a kernel of `kernels/`.
    fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()>;
    /// Multiplies matrices.
    fn multiply(&self, product: &Product) -> Result<()>;
    /// Carries out a pass of a convolution, if the machine has a way of its own for it: false, if nothing was done.
    fn convolve(&self, _pass: &Convolution) -> Result<bool> {
        Ok(false)
    }
}
