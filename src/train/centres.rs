//! Class centres from embeddings: a classifier that fits the backbone before the first step.

use candle_core::{Device, ModuleT, Tensor};
use rayon::prelude::*;

use crate::data::{Dataset, Pixels};
use crate::error::{Error, Result};
use crate::models::Model;
use crate::ops::normalize::l2_normalize;

/// Images that go through the network together.
const BATCH: usize = 32;

/// Returns the mean normalised embedding of each identity's images, as they are, `(embedding_size, identities)`, f32;
/// `progress(done, total)` counts images.
///
/// # Errors
/// When an image cannot be read or the network fails.
pub(super) fn mean_embeddings(
    model: &Model,
    dataset: &dyn Dataset,
    mut progress: impl FnMut(usize, usize),
) -> Result<Tensor> {
    let (dim, classes) = (model.config().embedding_size, dataset.num_identities());
    let too_large = || Error::Training(format!("{classes} class centres of {dim} elements are too many"));
    let mut sums = vec![0f32; dim.checked_mul(classes).ok_or_else(too_large)?];
    let indices: Vec<usize> = (0..dataset.len()).collect();
    for batch in indices.chunks(BATCH) {
        let images = batch.par_iter().map(|&i| Ok(dataset.get(i)?.image)).collect::<Result<Vec<_>>>()?;
        let mut pixels = Pixels::new(model.config().input_size);
        images.iter().for_each(|image| pixels.push(image));
        let y = model.forward_t(&pixels.to_tensor(model.preprocessing(), &Device::Cpu)?, false)?;
        for (&i, embedding) in batch.iter().zip(l2_normalize(&y, 1)?.to_vec2::<f32>()?) {
            let sum = &mut sums[dim * dataset.label(i) as usize..][..dim];
            sum.iter_mut().zip(embedding).for_each(|(sum, v)| *sum += v);
        }
        progress(batch.last().map_or(0, |last| last + 1), dataset.len());
    }
    let centres = Tensor::from_vec(sums, (classes, dim), &Device::Cpu)?;
    Ok(l2_normalize(&centres, 1)?.t()?.contiguous()?)
}
