//! Differentiable operations that candle lacks or implements poorly (convolution gradients, batch norm in training,
//! PReLU, the margin softmax). Activations are channels-last: `(N, H, W, C)`.
//!
//! An op is a documented function and a CPU kernel; some have a `*_reference` made of candle's tensor ops for the
//! tests.

pub mod adamw;
pub mod batch_norm;
pub mod centres;
pub mod conv;
pub mod distance;
pub mod margin_loss;
pub mod normalize;
pub mod pool;
pub mod prelu;
pub mod rank;
pub mod search;
pub mod sgd;

pub(crate) mod backend;
pub(crate) mod channels;
pub(crate) mod concat;
pub(crate) mod cpu;
pub(crate) mod linear;
pub(crate) mod pixels;
pub(crate) mod slice;
pub(crate) mod update;

mod gemm;
mod lanes;
mod rows;
mod scratch;
mod simd;
