//! The fused engine: a whole network as a few steps over activations, on any device.
//!
//! Batch norm and PReLU are not steps of their own. They are a view of an activation: a scale, a shift and a slope per
//! channel that the next convolution applies while it loads. So an activation is stored once, before its norm, and an
//! IResNet block keeps three of them for the backward pass: its input and the results of its two convolutions.
//!
//! A network's graph becomes a program of steps and views (`program.rs`), the program a tape of tasks on buffers
//! (`tape.rs`), which `network.rs` runs with the kernels of a device. Inference is the same with norms folded
//! (`fold.rs`) and no backward pass.

mod fold;
mod network;
mod program;
mod schedule;
mod tape;
#[cfg(test)]
mod tests;

pub(crate) use network::{InferenceNetwork, Lowered, Network, Recording};
pub use schedule::Activations;
