//! What can be said of a network's weights without running it.

use candle_core::{DType, Result, Tensor};
use sha2::{Digest, Sha256};

use super::Model;
use super::layout::COUNTER;
use crate::files::hex;
use crate::ops::slice::Values;
use crate::parallel;

impl Model {
    /// Returns the SHA-256 of every parameter and buffer that embeddings depend on, with its name, as f32, in name
    /// order: 64 hexadecimal digits; of a quantised network, those of the numbers that its integers stand for, and the
    /// ranges of its activations. Batch norm's counters of batches do not count, and not every file has them. A
    /// network of [`Arch::Onnx`](super::Arch::Onnx) has a digest of its graph, its weights and the output's name.
    ///
    /// # Errors
    /// When the values cannot be read.
    pub fn weights_digest(&self) -> Result<String> {
        if let Some(network) = &self.foreign {
            return Ok(network.digest().to_owned());
        }
        let mut hasher = Sha256::new();
        let is_counter = |name: &str| name.ends_with(COUNTER);
        for (name, tensor) in self.params().all().into_iter().filter(|(name, _)| !is_counter(name)) {
            hasher.update(name.as_bytes());
            let values = flat(&tensor)?;
            for part in Values::of("digest", &values)?.chunks(4096) {
                let bytes: Vec<u8> = part.iter().flat_map(|value| value.to_le_bytes()).collect();
                hasher.update(bytes);
            }
        }
        for (path, layer) in self.quantised().iter().flat_map(|quantised| &quantised.layers) {
            hasher.update(path.as_bytes());
            hasher.update(layer.input.scale.to_le_bytes());
            hasher.update([layer.input.zero]);
        }
        Ok(hex(&hasher.finalize()))
    }

    /// Returns the number of parameters and buffers with a value that is not finite, and the name of the first.
    ///
    /// # Errors
    /// When the values cannot be read.
    pub fn not_finite(&self) -> Result<Option<(usize, String)>> {
        let all: Vec<(&str, Tensor)> = self.params().all().into_iter().filter(|(_, t)| t.dtype().is_float()).collect();
        let is_broken = parallel::try_map(all.len(), |i| {
            let values = flat(&all[i].1)?;
            Ok::<_, candle_core::Error>(Values::of("finite", &values)?.iter().any(|value| !value.is_finite()))
        })?;
        let broken = all.iter().zip(is_broken).filter(|(_, is_broken)| *is_broken);
        let names: Vec<&str> = broken.map(|((name, _), _)| *name).collect();
        Ok(names.first().map(|first| (names.len(), (*first).to_owned())))
    }
}

/// Returns a tensor's values as f32 in one row, without a copy where possible.
fn flat(tensor: &Tensor) -> Result<Tensor> {
    tensor.flatten_all()?.to_dtype(DType::F32)
}
