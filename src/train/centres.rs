//! Initial class centres computed from embeddings, so that the head fits the backbone from the first step.

use candle_core::{Device, Tensor};

use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::eval::{EmbedConfig, embed};
use crate::models::Model;
use crate::ops::normalize::l2_normalize;

/// Returns the L2-normalised mean of each identity's normalised embeddings, `(embedding_size, identities)`, f32. Images
/// are neither flipped nor augmented. `progress(done, total)` counts images.
///
/// # Errors
/// When an image cannot be read or the network fails.
pub(super) fn mean_embeddings(
    model: &Model,
    dataset: &dyn Dataset,
    mut progress: impl FnMut(usize, usize),
) -> Result<Tensor> {
    let (dim, classes) = (model.config().embedding_size, dataset.num_classes());
    let too_large = || Error::Training(format!("{classes} class centres of {dim} elements are too many"));
    let mut sums = vec![0f32; dim.checked_mul(classes).ok_or_else(too_large)?];
    let config = EmbedConfig { flip: false, ..EmbedConfig::default() };
    let image = |i| Ok(dataset.get(i)?.image);
    let embeddings = embed(model, dataset.len(), image, config, |done| progress(done, dataset.len()))?;
    for i in 0..dataset.len() {
        let Some(class) = dataset.class(i) else { continue };
        let sum = &mut sums[dim * class as usize..][..dim];
        sum.iter_mut().zip(&embeddings[i]).for_each(|(sum, v)| *sum += v);
    }
    let centres = Tensor::from_vec(sums, (classes, dim), &Device::Cpu)?;
    Ok(l2_normalize(&centres, 1)?.t()?.contiguous()?)
}
