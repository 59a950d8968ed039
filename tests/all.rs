//! The integration tests, one binary.

mod align;
mod circles;
mod cli;
mod cli_data;
mod cli_edges;
mod cli_metrics;
mod cli_models;
mod cli_report;
mod cli_runs;
mod decode;
mod demonstration;
mod engine;
mod eval_metrics;
mod face;
mod fixture;
mod folder;
mod foreign;
mod formats;
#[cfg(feature = "gallery")]
mod gallery;
mod hostility;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
mod hub_server;
mod layers;
mod layout;
mod loader;
mod losses;
mod margin_loss;
mod margin_reference;
mod mask;
mod means;
mod models;
mod mxnet;
mod onnx;
mod onnx_forms;
mod ops;
mod pairs;
mod photo_kit;
mod photo_pairs;
mod photos;
mod pytorch;
mod pytorch_forms;
#[cfg(feature = "mpi")]
mod ranks;
#[cfg(feature = "parquet")]
mod real_faces;
mod recordio;
mod resume;
mod source;
#[cfg(all(feature = "cudnn", unix))]
mod stand_in;
mod students;
mod templates;
mod train;
mod verification;
