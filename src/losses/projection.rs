//! A learned map from the student's embeddings to a teacher's of another length.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result};

use crate::nn::{DeviceParams, Init, Params};
use crate::ops::backend::Backend;

/// A matrix that maps embeddings of one length to another, trained with the student (the regressor of FitNets, Romero
/// et al., ICLR 2015, section 2.2), so that a teacher's embeddings may have any length. It is used in training only.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Projection {
    pub from: usize,
    pub to: usize,
}

impl Projection {
    /// Returns `weight: (to, from)`, uniform in `+-1 / sqrt(from)`, drawn from `seed`.
    ///
    /// # Errors
    /// When memory cannot be allocated, or the device needs other lengths.
    pub fn params<B: Backend>(self, backend: &B, seed: u64) -> Result<DeviceParams<B>> {
        let Self { from, to } = self;
        backend.check_embedding_size(from).and(backend.check_embedding_size(to))?;
        let mut params = Params::new(DType::F32, &Device::Cpu, seed);
        params.root().param("weight", (to, from), Init::Uniform(1.0 / (from.max(1) as f64).sqrt()))?;
        DeviceParams::new(backend, params.parts(), BTreeMap::new())
    }

    /// Projects `n` embeddings `(n, from)` to `(n, to)`.
    pub fn forward<B: Backend>(self, params: &DeviceParams<B>, embeddings: &B::Array, n: usize) -> Result<B::Array> {
        let weight = &params.values(crate::nn::Group::Trained).wide;
        params.backend().linear(embeddings, weight, [n, self.from, self.to])
    }

    /// Returns the gradient of the embeddings from that of the projected ones; writes that of the matrix.
    pub fn backward<B: Backend>(
        self,
        params: &mut DeviceParams<B>,
        embeddings: &B::Array,
        gradient: &B::Array,
        n: usize,
    ) -> Result<B::Array> {
        let backend = params.backend().clone();
        let (weight, of_weight) = params.values_and_grads();
        backend.linear_backward(embeddings, weight, gradient, [n, self.from, self.to], of_weight)
    }
}
