//! The fused engine on a GPU: the same programs as on the CPU, in terms of [`crate::gpu`].
//!
//! Activations have the type of the network's products (bf16, f16 or f32), parameters are f32 with a copy in that type,
//! statistics, gradients of parameters and what follows a fully connected layer are f32. An activation is stored before
//! its norm, as on the CPU; a convolution behind a norm reads a copy that the norm was applied to, which the backward pass
//! makes again. Parameters, gradients and moments lie one behind the other, so an update is one pass.

mod network;
mod params;
mod recording;

pub(crate) use network::Network;
pub(crate) use params::{DeviceParams, Group};
pub(crate) use recording::Recording;

#[cfg(test)]
mod tests;
