//! A learned map from the student's embeddings to a teacher's of another length.

use candle_core::{DType, Device, Result, Tensor};

use crate::nn::{Init, Params};

/// Name of the matrix among the parameters.
pub(super) const WEIGHT: &str = "weight";

/// A matrix that maps embeddings of one length to another, trained with the student (the regressor of FitNets, Romero
/// et al., ICLR 2015, section 2.2), so that a teacher's embeddings may have any length. It is used in training only.
#[derive(Debug)]
pub struct Projection {
    weight: Tensor,
    params: Params,
}

impl Projection {
    /// Creates `weight: (to, from)`, uniform in `+-1 / sqrt(from)`, drawn from `seed`.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub fn new(from: usize, to: usize, device: &Device, seed: u64) -> Result<Self> {
        let mut params = Params::new(DType::F32, device, seed);
        let weight = params.root().param(WEIGHT, (to, from), Init::Uniform(1.0 / (from.max(1) as f64).sqrt()))?;
        Ok(Self { weight, params })
    }

    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The matrix, `(to, from)`, outside any graph.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn weight(&self) -> Tensor {
        self.weight.detach()
    }

    /// Projects embeddings `(N, from)` to `(N, to)`.
    ///
    /// # Errors
    /// When their length is not `from`.
    pub fn forward(&self, embedding: &Tensor) -> Result<Tensor> {
        embedding.matmul(&self.weight.t()?)
    }
}
