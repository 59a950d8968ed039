//! A build without a runtime for networks of other architectures.

use std::convert::Infallible;

use super::{Output, Values4};
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

    pub fn shapes(&self, _: Values4) -> Result<Vec<Output>, String> {
        match self.0 {}
    }

    pub fn run(&self, _: Values4, _: &str) -> Result<Values4, String> {
        match self.0 {}
    }
}
