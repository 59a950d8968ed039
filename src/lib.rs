//! Mask-invariant face recognition in pure Rust on candle: the system of "Mask-invariant Face Recognition through
//! Template-level Knowledge Distillation" (Huber et al., FG 2021).
//!
//! A frozen teacher sees clean faces; a student sees the same faces, half of them masked, and learns to reproduce the
//! teacher's embeddings. [`train::Experiment`] runs the whole experiment and [`eval::evaluate`] measures the result;
//! the modules below are their parts and can be used on their own.
//!
//! Two aligned faces, and how alike they are:
//!
//! ```no_run
//! use std::path::Path;
//!
//! use maskinv::data::read_face;
//! use maskinv::eval::{EmbedConfig, dot, embed};
//! use maskinv::models::load_model;
//!
//! # fn main() -> maskinv::Result<()> {
//! let model = load_model(Path::new("runs/demo/hg"), None)?.model;
//! let faces = ["ann.jpg", "ann-masked.jpg"];
//! let embeddings = embed(&model, 2, |i| read_face(Path::new(faces[i])), EmbedConfig::default(), |_| {})?;
//! println!("cosine {:.3}", dot(&embeddings[0], &embeddings[1]));
//! # Ok(())
//! # }
//! ```
//!
//! Settings are structs with public fields and a `Default`: write `..Default::default()` after the fields that you set,
//! and later versions may add others. Types of [`candle_core`], [`image`], [`rand_chacha`], [`safetensors`] and
//! [`serde_json`] are those of the crates re-exported here.
#![deny(missing_docs)]
#![deny(clippy::undocumented_unsafe_blocks)]

#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
pub mod data;
pub mod dist;
pub mod error;
pub mod eval;
pub mod face;
#[cfg_attr(not(feature = "cli"), allow(dead_code, unused_imports, reason = "some of it serves the program alone"))]
mod files;
#[cfg(feature = "gallery")]
pub mod gallery;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod gpu;
mod lists;
pub mod losses;
pub mod machine;
pub mod models;
pub mod nn;
mod npy;
pub mod ops;
pub mod optim;
mod parallel;
mod pickle;
pub mod preprocessing;
mod protobuf;
pub mod records;
#[cfg(feature = "report")]
pub mod report;
pub(crate) mod tensorboard;
#[doc(hidden)]
pub mod testing;
pub mod train;
pub mod vectors;
pub mod weights;
#[doc(hidden)]
pub mod workers;

pub use candle_core;
pub use error::{Error, Result};
pub use image;
pub use rand_chacha;
pub use safetensors;
pub use serde_json;
