//! GPU compute: memory, kernels (`kernels/*.cu`), matrix products and convolutions behind one trait, [`Gpu`].
//!
//! `cuda/` drives a real GPU. The tests run the same kernel sources on the CPU (`host.rs`), so all code built on
//! [`Gpu`] is compared with the CPU ops on every machine. Work is queued: only [`Array::read`] waits for it.

mod backend;
pub(crate) mod batch_norm;
pub(crate) mod concat;
mod conv;
mod device;
mod distill;
mod exchange;
mod images;
mod kernels;
pub(crate) mod margin;
mod pixels;
mod pool;
pub(crate) mod rows;
mod update;

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod host;
#[cfg(test)]
pub(crate) mod tests;

#[cfg(feature = "cuda")]
pub(crate) use cuda::{Cuda, Factors};

use device::fits;
pub(crate) use device::{Array, Device, Element, GpuBackend};

#[cfg(feature = "cuda")]
use std::collections::BTreeMap;

use candle_core::{Result, bail};

use crate::dist::{Collective, Ranks};

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
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg<'a> {
    /// The address of the array's first element.
    Array(&'a Array),
    /// The address 0.
    Null,
    I32(i32),
    I64(i64),
    F32(f32),
}

#[cfg(feature = "cuda")]
impl Arg<'_> {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Array(_) | Self::Null | Self::I64(_) => 8,
            Self::I32(_) | Self::F32(_) => 4,
        }
    }
}

impl<'a> From<Option<&'a Array>> for Arg<'a> {
    fn from(array: Option<&'a Array>) -> Self {
        array.map_or(Self::Null, Self::Array)
    }
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

/// An array as a matrix, row-major.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    pub array: &'a Array,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Whether the matrix is read transposed.
    pub is_transposed: bool,
}

impl Matrix<'_> {
    pub fn element(&self) -> Element {
        self.array.element()
    }

    /// Returns the transposed matrix.
    pub fn transposed(self) -> Self {
        Self { is_transposed: !self.is_transposed, ..self }
    }
}

/// `c: (m, n) = alpha * a: (m, k) * b: (k, n) + beta * c`, accumulated in f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Matrix<'a>,
    pub b: Matrix<'a>,
    pub c: Matrix<'a>,
    pub alpha: f32,
    pub beta: f32,
}

/// Where a collective operation reads and writes: the same place, or two that do not overlap.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only GPUs can be connected"))]
pub(crate) struct Transfer {
    pub from: u64,
    pub to: u64,
    /// Number of elements that this rank gives.
    pub len: usize,
}

/// One pass of a convolution; all arrays have the same element type.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cudnn"), expect(dead_code, reason = "only cuDNN has a way of its own"))]
pub(crate) struct Convolution<'a> {
    pub conv: &'a conv::Conv,
    pub pass: Pass,
    /// The input or its gradient.
    pub x: &'a Array,
    /// The filters or their gradient.
    pub w: &'a Array,
    /// The output or its gradient.
    pub y: &'a Array,
}

/// Pass of a [`Convolution`]: which of its three arrays is computed from the other two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Pass {
    Forward,
    GradX,
    GradW,
}

impl Pass {
    pub const ALL: [Self; 3] = [Self::Forward, Self::GradX, Self::GradW];

    pub fn title(self) -> &'static str {
        match self {
            Self::Forward => "output",
            Self::GradX => "gradient of the input",
            Self::GradW => "gradient of the filters",
        }
    }
}

/// How a convolution's pass runs.
#[derive(Clone, Debug)]
pub(crate) struct Planned {
    pub conv: conv::Conv,
    pub pass: Pass,
    pub element: Element,
    /// The library's algorithm and math; none if patches are multiplied instead.
    pub algorithm: Option<String>,
    /// Time that was measured.
    pub ms: Option<f32>,
    /// Bytes of workspace.
    pub workspace: usize,
}

/// A device that runs kernels in the order of their launches. What trusts an address or a size is unsafe here, and
/// called where they are checked: in [`Array`] and [`Device`], and by the functions that launch kernels.
pub(crate) trait Gpu: Send + Sync {
    /// Allocates uninitialised memory.
    fn alloc(&self, bytes: usize) -> Result<Memory>;
    /// Copies bytes to the device.
    ///
    /// # Safety
    /// The bytes from the address on lie in memory of this device that is not freed.
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()>;
    /// Waits for all queued work, then copies bytes from the device.
    ///
    /// # Safety
    /// As for [`Self::write`].
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()>;
    /// Fills memory with zeros.
    ///
    /// # Safety
    /// As for [`Self::write`].
    unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()>;
    /// Copies bytes from the device to the device: what the bandwidth of kernels is compared with.
    ///
    /// # Safety
    /// As for [`Self::write`], of both addresses; the two do not overlap.
    #[cfg(feature = "cuda")]
    unsafe fn copy(&self, _to: u64, _from: u64, _bytes: usize) -> Result<()> {
        bail!("this device copies nothing")
    }
    /// Runs a kernel of `kernels/`.
    ///
    /// # Safety
    /// The arguments have the types of the kernel's parameters, in their order, the arrays are this device's, and with
    /// these sizes and this launch the kernel reads and writes inside of them.
    unsafe fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()>;
    /// Multiplies matrices.
    ///
    /// # Safety
    /// The matrices have the product's sizes and lie in their arrays, which are this device's.
    unsafe fn multiply(&self, product: &Product) -> Result<()>;
    /// Connects the device with those of all other ranks, of which each needs one of its own. Returns false if they
    /// cannot reach each other; all ranks get the same answer.
    ///
    /// # Errors
    /// When a rank does not take part, or the devices' library fails.
    fn connect(&self, _ranks: &Ranks) -> crate::Result<bool> {
        Ok(false)
    }
    /// Queues a collective operation on connected devices for each of these transfers: it begins once all work queued
    /// before is done, and what is queued later does not wait for it.
    ///
    /// # Safety
    /// The transfers lie in arrays of this device, which are kept, and only read or only written by this operation,
    /// until [`Self::await_collectives`].
    unsafe fn collect(&self, _how: Collective, _element: Element, _transfers: &[Transfer]) -> Result<()> {
        bail!("this device is not connected")
    }
    /// Lets all work that is queued later wait for the collective operations queued so far.
    fn await_collectives(&self) -> Result<()> {
        Ok(())
    }
    /// Runs a convolution pass with the device's own library; returns false, with nothing done, if it has none.
    ///
    /// # Safety
    /// The arrays have the convolution's sizes and one type, and are this device's.
    unsafe fn convolve(&self, _pass: &Convolution) -> Result<bool> {
        Ok(false)
    }
    /// What is known of the convolutions that the library was asked for.
    fn planned(&self) -> Vec<Planned> {
        Vec::new()
    }
    /// What this device is and uses: titles and values.
    fn facts(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
    /// Begins to measure the time of each call, by its name.
    #[cfg(feature = "cuda")]
    fn start_profile(&self) -> Result<()> {
        bail!("this device measures no times")
    }
    /// Ends measuring and returns the number of calls and their milliseconds, by name.
    #[cfg(feature = "cuda")]
    fn end_profile(&self) -> Result<BTreeMap<String, (usize, f64)>> {
        bail!("this device measures no times")
    }
    /// Returns what is worth saying and was not said yet, such as that something runs a slower way.
    fn take_notices(&self) -> Vec<String> {
        Vec::new()
    }
}
