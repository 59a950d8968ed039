//! The integration tests, one binary.

mod fixture;
mod losses;
mod models;
mod ops;
