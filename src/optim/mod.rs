//! The optimiser and the learning-rate schedules.

mod optimizer;
mod schedule;

pub use optimizer::{OptimConfig, OptimKind, Optimizer, clip_scale, grad_norm};
pub use schedule::{ScheduleConfig, ScheduleKind};
