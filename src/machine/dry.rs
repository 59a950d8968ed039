//! A dry-run GPU: counts memory and kernel launches without a GPU and computes nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Result;

use super::{Machine, Precision};
use crate::gpu::{Arg, Convolution, Device, Gpu, Launch, Memory, Product};

/// A dry-run GPU that counts its calls. A convolution counts as one call, as with cuDNN.
#[derive(Debug, Default)]
struct Dry {
    next: AtomicU64,
    calls: Arc<Calls>,
}

/// Counts of the calls to a dry-run GPU.
#[derive(Debug, Default)]
pub struct Calls {
    num: AtomicU64,
    flops: AtomicU64,
}

impl Calls {
    /// Number of kernel launches, matrix products, convolutions, copies and fills so far.
    pub fn num(&self) -> u64 {
        self.num.load(Ordering::Relaxed)
    }

    /// Number of multiplications and additions in matrix products and convolutions so far.
    pub fn flops(&self) -> u64 {
        self.flops.load(Ordering::Relaxed)
    }
}

/// Returns a machine with a dry-run GPU, whose memory [`Machine::gpu_bytes`] counts, and the counts of its calls.
pub fn dry(precision: Precision) -> (Machine, Arc<Calls>) {
    let gpu = Dry::default();
    let calls = gpu.calls.clone();
    let device = Device::new(Box::new(gpu));
    (Machine { gpu: Some(super::Gpu { device, precision, name: "dry".into() }), ..Machine::default() }, calls)
}

impl Dry {
    fn count(&self, multiplications: usize) -> Result<()> {
        self.calls.num.fetch_add(1, Ordering::Relaxed);
        self.calls.flops.fetch_add(2 * multiplications as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Gpu for Dry {
    fn alloc(&self, bytes: usize) -> Result<Memory> {
        // Never the null pointer.
        let address = 256 + self.next.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Memory { address, bytes, _owner: Box::new(()) })
    }

    unsafe fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        self.count(0)
    }

    unsafe fn read(&self, _: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        self.count(0)
    }

    unsafe fn zero(&self, _: u64, _: usize) -> Result<()> {
        self.count(0)
    }

    unsafe fn launch(&self, _: &str, _: Launch, _: &[Arg]) -> Result<()> {
        self.count(0)
    }

    unsafe fn multiply(&self, product: &Product) -> Result<()> {
        self.count(product.m * product.n * product.k)
    }

    unsafe fn convolve(&self, pass: &Convolution) -> Result<bool> {
        let [n, ho, wo, _] = pass.conv.y();
        // Every weight is used once per output pixel.
        self.count(n * ho * wo * pass.conv.num_weights()).map(|()| true)
    }
}
