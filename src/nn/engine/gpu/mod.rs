//! The fused engine on a GPU: runs the same programs as on the CPU, built on [`crate::gpu`].
//!
//! Activations have the type of the network's products (bf16, f16 or f32). Parameters are f32, with a copy in that
//! type. Statistics, gradients of parameters and everything after a fully connected layer are f32. An activation is
//! stored before its norm, as on the CPU. A convolution reads a normalised, activated copy of its input, which the
//! backward pass recomputes. Parameters, gradients and moments are contiguous, so an update is one pass.

mod network;
mod params;
mod recording;

pub(crate) use network::Network;
pub(crate) use recording::Recording;

#[cfg(test)]
mod tests;
