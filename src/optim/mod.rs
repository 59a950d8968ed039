//! The optimiser and the learning-rate schedules.

mod schedule;
mod sgd;

pub use schedule::{ScheduleConfig, ScheduleKind};
pub use sgd::{Sgd, SgdConfig, clip_scale, grad_norm};
