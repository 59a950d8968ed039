//! Optimisers and learning-rate schedules.

#[cfg(any(test, feature = "cuda"))]
mod on_gpu;
mod optimizer;
mod schedule;

#[cfg(any(test, feature = "cuda"))]
pub(crate) use on_gpu::GpuOptimizer;
pub(crate) use optimizer::{NUM_STEPS, num_steps};
pub use optimizer::{OptimConfig, OptimKind, Optimizer, clip_scale, grad_norm};
pub use schedule::{ScheduleConfig, ScheduleKind};
