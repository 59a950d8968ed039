//! The integration tests, one binary.

mod eval_metrics;
mod fixture;
mod folder;
mod losses;
mod mask;
mod models;
mod ops;
mod pairs;
