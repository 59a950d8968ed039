//! A batch of images as a network on the CPU reads it.

use candle_core::Tensor;

/// Images as the CPU takes them.
#[derive(Debug)]
pub enum CpuImages {
    /// `(N, C, H, W)`.
    Planes(Tensor),
    /// `(N, H, W, C)`, as the engine computes.
    Rows(Vec<f32>),
}
