//! The fused engine: a whole network as a few steps over activations, on any device.
//!
//! Batch norm and PReLU are not steps of their own. They are a view of an activation: a scale, a shift and a slope per
//! channel that the next convolution applies while it loads. So an activation is stored once, before its norm, and an
//! IResNet block keeps three of them for the backward pass: its input and the results of its two convolutions.
//!
//! A network's graph becomes a program of steps and views (`program.rs`), the program a tape of tasks on buffers
//! (`tape.rs`), whose forward pass `network.rs` runs with the kernels of a device. Training (`training.rs`) adds the
//! backward pass, and inference (`inference.rs`) folds norms and sums into convolutions (`fold.rs`).

mod fold;
mod inference;
mod lowered;
mod network;
mod program;
mod quantised;
mod schedule;
mod tape;
#[cfg(test)]
mod tests;
mod training;

pub(crate) use inference::InferenceNetwork;
pub(crate) use lowered::Lowered;
pub use schedule::Activations;
pub(crate) use training::{Recording, SharedBatch, TrainingNetwork};
