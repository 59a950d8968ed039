//! Networks as graphs of layers with named parameters, the engine that runs them, and their form as candle's modules.
//! Activations are channels-last.

mod device_params;
mod dropout;
pub mod engine;
mod graph;
mod layers;
mod module;
mod params;
mod quantisation;

pub(crate) use device_params::{DeviceParams, Group};
pub use dropout::Dropout;
pub use graph::{Graph, Layer, Node, NodeId, Op};
pub use layers::squeeze_excitation;
pub(crate) use params::standard_normal;
pub use params::{Init, Params, Scope};
pub use quantisation::{Quantisation, QuantisedConv};
