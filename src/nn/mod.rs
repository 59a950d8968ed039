//! Layers, their named parameters, and the engine that runs whole networks. Activations are channels-last.

pub mod engine;
mod gradients;
mod graph;
mod layers;
mod params;
mod pool;

pub use gradients::Gradients;
pub use graph::{Graph, Node, NodeId, Op, Trace};
pub use layers::{BatchNorm, Conv2d, Dropout, Linear, PRelu, SqueezeExcitation};
pub(crate) use params::standard_normal;
pub use params::{Init, Params, Scope};
pub(crate) use pool::Pool;
