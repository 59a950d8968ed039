//! A build without a runtime for networks of other architectures.

use std::convert::Infallible;

use super::{Array, Output};
use crate::error::missing_feature;
use crate::weights::OnnxFiles;

/// No runtime.
#[derive(Debug)]
pub(super) struct Runtime(Infallible);

impl Runtime {
    pub fn open(_: OnnxFiles) -> Result<Self, String> {
        Err(missing_feature("any-onnx"))
    }

    pub fn input(&self) -> Vec<Option<usize>> {
        match self.0 {}
    }

    pub fn num_parameters(&self) -> usize {
        match self.0 {}
    }

    pub fn shapes(&self, _: Array) -> Result<Vec<Output>, String> {
        match self.0 {}
    }

    pub fn run(&self, _: Array, _: &str) -> Result<Array, String> {
        match self.0 {}
    }
}
