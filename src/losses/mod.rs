//! Training objectives: the margin loss of a classification head, and template-level distillation.

mod distill;
mod elastic;
mod margin;
#[cfg(any(test, feature = "cuda"))]
mod on_gpu;
mod projection;

pub use distill::{DistillConfig, DistillKind, distillation_loss};
pub use elastic::{PlusMatching, match_margins};
pub use margin::{MarginConfig, MarginHead, MarginKind, MarginStep, cosines};
#[cfg(any(test, feature = "cuda"))]
pub(crate) use on_gpu::{GpuHead, GpuProjection};
pub use projection::Projection;
