//! Layers, their named parameters, and the engine that runs whole networks. Activations are channels-last.

mod device_params;
pub mod engine;
mod graph;
mod layers;
mod params;

pub(crate) use device_params::{DeviceParams, Group};
pub use graph::{Graph, Node, NodeId, Op, Trace};
pub use layers::{BatchNorm, Conv2d, Dropout, Linear, PRelu, SqueezeExcitation};
pub(crate) use params::standard_normal;
pub use params::{Init, Params, Scope};
