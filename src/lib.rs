//! Mask-invariant face recognition in pure Rust.
#![deny(missing_docs)]
#![deny(clippy::undocumented_unsafe_blocks)]

pub mod error;
pub mod losses;
pub mod models;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod testing;

pub use error::{Error, Result};
