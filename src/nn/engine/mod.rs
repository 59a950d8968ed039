//! The fused engine: a whole network in f32 on the CPU as a few steps over activations.
//!
//! Batch norm and PReLU are not steps of their own. They are a view of an activation: a scale, a shift and a slope per
//! channel that the next convolution applies while it loads. So an activation is stored once, before its norm, and an
//! IResNet block keeps three of them for the backward pass: its input and the results of its two convolutions. [`Plan`]
//! is for inference, with norms folded into the preceding convolutions; [`Recording`] is a forward pass in training
//! that can run its backward pass.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod gpu;
mod layout;
mod memory;
mod plan;
mod program;
mod recording;
mod schedule;
mod tape;

pub use plan::Plan;
pub use recording::{Engine, Recording};
pub use schedule::Activations;
