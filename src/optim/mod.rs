//! Optimisers, learning-rate schedules, averages of weights.

mod average;
mod component;
mod optimizer;
mod schedule;

pub(crate) use average::Average;
pub(crate) use component::Component;
pub(crate) use optimizer::SampledCentres;
pub use optimizer::{OptimConfig, OptimKind, Optimizer};
pub use schedule::{ScheduleConfig, ScheduleKind};
