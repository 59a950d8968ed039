//! A GPU that computes nothing: how much memory works hold and how many kernels they launch, found out on any machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Result;

use super::{Machine, Precision};
use crate::gpu::{Arg, Convolution, Device, Gpu, Launch, Memory, Product};

/// Counts what is asked of it. Convolutions count as one call each, as by cuDNN.
#[derive(Debug, Default)]
struct Dry {
    next: AtomicU64,
    calls: Arc<Calls>,
}

/// The calls of a machine that computes nothing.
#[derive(Debug, Default)]
pub struct Calls {
    num: AtomicU64,
    flops: AtomicU64,
}

impl Calls {
    /// Kernels, products, convolutions, copies and fills so far.
    pub fn num(&self) -> u64 {
        self.num.load(Ordering::Relaxed)
    }

    /// Multiplications and additions of products and convolutions so far.
    pub fn flops(&self) -> u64 {
        self.flops.load(Ordering::Relaxed)
    }
}

/// Returns a machine that computes nothing, for [`Machine::gpu_bytes`], and its calls.
pub fn dry(precision: Precision) -> (Machine, Arc<Calls>) {
    let gpu = Dry::default();
    let calls = gpu.calls.clone();
    let device = Device::new(Box::new(gpu));
    (Machine { gpu: Some(super::Gpu { device, precision, name: "dry".into() }) }, calls)
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
        // Behind the null pointer.
        let address = 256 + self.next.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(Memory { address, bytes, _owner: Box::new(()) })
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        self.count(0)
    }

    fn read(&self, _: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        self.count(0)
    }

    fn zero(&self, _: u64, _: usize) -> Result<()> {
        self.count(0)
    }

    fn launch(&self, _: &str, _: Launch, _: &[Arg]) -> Result<()> {
        self.count(0)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        self.count(product.m * product.n * product.k)
    }

    fn convolve(&self, pass: &Convolution) -> Result<bool> {
        let [n, ho, wo, _] = pass.conv.y();
        // Each pixel of the result meets each filter once.
        self.count(n * ho * wo * pass.conv.num_weights()).map(|()| true)
    }
}
