//! The integration tests, one binary.

mod cli;
mod eval_metrics;
mod fixture;
mod folder;
mod layers;
mod loader;
mod losses;
mod mask;
mod models;
mod ops;
mod pairs;
mod source;
mod train;
