//! Shared code of the GPU tests. They run on the CPU (`host.rs`) or, in a build with `cuda` and with `MASKINV_GPU` set
//! to a number, on that GPU with the same comparisons.

use candle_core::{DType, Result, Tensor};
use half::{bf16, f16};

use super::host::Host;
use super::{Array, Device, Element, Gpu};
use crate::testing::{Tol, assert_close, fill};

/// Number of the GPU that the tests run on; none on the CPU.
fn number() -> Option<String> {
    std::env::var("MASKINV_GPU").ok().filter(|number| number != "host")
}

/// Whether a library computes convolutions, which rounds the gradient of the filters to the activations' type.
pub(crate) fn rounds_gradients() -> bool {
    number().is_some() && cfg!(feature = "cudnn")
}

/// The device that the tests run on.
pub(crate) fn device() -> Device {
    device_of_rank(0)
}

/// The device of one of several ranks: on GPUs one of its own, if there are enough.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the CPU is every rank's"))]
pub(crate) fn device_of_rank(rank: usize) -> Device {
    let number = number();
    #[cfg(not(feature = "cuda"))]
    assert_eq!(number, None, "MASKINV_GPU names a GPU: build with --features cuda");
    #[cfg(feature = "cuda")]
    if let Some(number) = number {
        let number: usize = number.parse().expect("MASKINV_GPU is the number of a GPU");
        let num = super::Cuda::count().expect("there is a driver");
        let gpu = super::Cuda::new((number + rank) % num, super::Factors::Exact).expect("the GPU opens");
        return Device::new(Box::new(gpu));
    }
    Device::new(Box::new(Host::new()) as Box<dyn Gpu>)
}

/// Whether the devices of as many ranks reach each other.
#[cfg_attr(not(feature = "cuda"), expect(unused_variables, reason = "the CPU is every rank's"))]
pub(crate) fn are_connected(size: usize) -> bool {
    #[cfg(feature = "cuda")]
    if number().is_some() {
        return super::Cuda::count().is_ok_and(|num| num >= size) && super::Cuda::has_nccl();
    }
    false
}

/// Element types of activations.
pub(crate) const ELEMENTS: [Element; 3] = [Element::F32, Element::Bf16, Element::F16];

/// Values in `[lo, hi)` that depend on `name`.
pub(crate) fn numbers(name: &str, len: usize, [lo, hi]: [f64; 2]) -> Vec<f32> {
    let values = fill(name, &[len], lo, hi).and_then(|x| x.to_dtype(DType::F32)?.to_vec1());
    values.expect("memory for a test's values")
}

/// Values rounded to the element type.
pub(crate) fn rounded(values: &[f32], element: Element) -> Vec<f32> {
    let round = |x: &f32| match element {
        Element::Bf16 => bf16::from_f32(*x).to_f32(),
        Element::F16 => f16::from_f32(*x).to_f32(),
        _ => *x,
    };
    values.iter().map(round).collect()
}

pub(crate) fn upload(device: &Device, values: &[f32], element: Element) -> Result<Array> {
    match element {
        Element::Bf16 => device.upload(&values.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>()),
        Element::F16 => device.upload(&values.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>()),
        _ => device.upload(values),
    }
}

pub(crate) fn read(array: &Array) -> Result<Vec<f32>> {
    Ok(match array.element() {
        Element::Bf16 => array.read::<bf16>()?.into_iter().map(bf16::to_f32).collect(),
        Element::F16 => array.read::<f16>()?.into_iter().map(f16::to_f32).collect(),
        _ => array.read()?,
    })
}

/// Like [`assert_close`]: allows `tol` plus one rounding to the element type.
pub(crate) fn close(what: &str, actual: &Array, expected: &[f32], tol: f64) -> Result<()> {
    let rounding = match actual.element() {
        Element::Bf16 => 1.0 / 256.0,
        Element::F16 => 1.0 / 2048.0,
        _ => 0.0,
    };
    let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
    assert!(largest.is_finite(), "{what}: the expected values are not finite");
    let tensor = |x: &[f32]| Tensor::from_slice(x, x.len(), &candle_core::Device::Cpu);
    let tol = Tol { abs: tol * f64::from(largest), rel: tol + rounding };
    assert_close(what, &tensor(&read(actual)?)?, &tensor(expected)?, tol)
}
