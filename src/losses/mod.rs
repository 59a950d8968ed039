//! Training objectives: the margin loss of a classification head, and template-level distillation.

mod distill;
mod margin;
mod projection;
mod sampling;

pub use crate::ops::centres::pull_centres;
pub use crate::ops::distance::{DistillKind, distillation_loss};
pub use crate::ops::margin_loss::{MarginForm, MarginGradient, PlusMatching, match_margins};
pub use crate::ops::rank::{RankRows, RankThresholds, rank_loss_with_gradient};
pub use distill::{CentreKind, DistillConfig};
pub use margin::{MarginConfig, MarginHead, MarginKind, cosines};
pub(crate) use projection::Projection;
pub(crate) use sampling::sample_classes;
