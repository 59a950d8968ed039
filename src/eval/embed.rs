//! Computes embeddings of images.

use std::ops::{Index, Range};

use candle_core::Tensor;
use image::RgbImage;
use image::imageops::flip_horizontal;

use crate::data::Pixels;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::ops::normalize::l2_normalize;
use crate::parallel;

/// Largest difference from 1 of the length of a scaled embedding: far more than rounding.
const LENGTH_TOLERANCE: f64 = 1e-2;

/// Embeddings, one per row, of length 1 unless [`EmbedConfig::normalize`] is off.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    values: Vec<f32>,
    dim: usize,
}

impl Embeddings {
    /// Returns embeddings of `dim` elements each, from row-major `values`.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when `dim` is 0, `values` is not a whole number of rows, or a value is NaN or infinite.
    pub fn new(values: Vec<f32>, dim: usize) -> Result<Self> {
        if dim == 0 || !values.len().is_multiple_of(dim) {
            let what = format!("expected embeddings of {dim} elements, found {} elements in total", values.len());
            return Err(Error::Evaluation(what));
        }
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            let what = format!("embedding {}: expected finite elements, found {}", i / dim, values[i]);
            return Err(Error::Evaluation(what));
        }
        Ok(Self { values, dim })
    }

    /// Number of embeddings.
    pub fn len(&self) -> usize {
        self.values.len() / self.dim
    }

    /// Whether there are no embeddings.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Returns the given rows, in the given order.
    pub(super) fn select(&self, rows: impl IntoIterator<Item = usize>) -> Self {
        Self { values: rows.into_iter().flat_map(|i| &self[i]).copied().collect(), dim: self.dim }
    }

    /// All values, row-major.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Number of elements of an embedding.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Returns embedding `i`; none if there is no such embedding.
    pub fn get(&self, i: usize) -> Option<&[f32]> {
        (i < self.len()).then(|| &self[i])
    }
}

impl Index<usize> for Embeddings {
    type Output = [f32];

    /// Returns embedding `i`; panics, as a slice does, if there is no such embedding.
    fn index(&self, i: usize) -> &[f32] {
        &self.values[i * self.dim..][..self.dim]
    }
}

/// Settings of [`embed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbedConfig {
    /// Number of images per batch; with `flip` the network gets twice as many.
    pub batch_size: usize,
    /// Whether to add the embedding of the mirrored image, as is usual in the field.
    pub flip: bool,
    /// Whether to scale embeddings to length 1. Off for template pooling, where an embedding's length is part of its
    /// weight.
    pub normalize: bool,
}

impl Default for EmbedConfig {
    fn default() -> Self {
        Self { batch_size: 32, flip: true, normalize: true }
    }
}

/// Returns `normalize(f(x) + f(flip x))` of `num_images` images; `config` can turn off the flip and the normalisation.
///
/// `image(i)` returns the aligned crop `i`; `progress(n)` is called after each batch with the number of images done.
///
/// # Errors
/// When an image or the network fails, or an embedding is not finite.
pub fn embed(
    model: &Model,
    num_images: usize,
    image: impl Fn(usize) -> Result<RgbImage> + Sync,
    config: EmbedConfig,
    mut progress: impl FnMut(usize),
) -> Result<Embeddings> {
    let network = model.inference(batch_size(num_images, config))?;
    embed_each(model, num_images, &image, config, &mut |pixels| network.run_pixels(pixels), &mut progress)
}

/// Returns the embeddings of [`embed`] and, of each image, the score of the model's mask head, 0 to 1; none if the model
/// has no head. With the mirror image, the score is the mean of both.
///
/// # Errors
/// Same as [`embed`].
pub fn embed_with_masks(
    model: &Model,
    num_images: usize,
    image: impl Fn(usize) -> Result<RgbImage> + Sync,
    config: EmbedConfig,
    mut progress: impl FnMut(usize),
) -> Result<(Embeddings, Option<Vec<f32>>)> {
    let Some(network) = model.mask_inference(batch_size(num_images, config))? else {
        return Ok((embed(model, num_images, image, config, progress)?, None));
    };
    let mut scores = Vec::new();
    let mut run = |pixels: &Pixels| {
        let (embeddings, of_images) = network.run_pixels(pixels)?;
        if config.flip {
            let (as_is, mirrored) = of_images.split_at(of_images.len() / 2);
            scores.extend(as_is.iter().zip(mirrored).map(|(a, b)| 0.5 * (a + b)));
        } else {
            scores.extend(of_images);
        }
        Ok(embeddings)
    };
    let embeddings = embed_each(model, num_images, &image, config, &mut run, &mut progress)?;
    Ok((embeddings, Some(of_all_ranks(model, scores, num_images, config, 1)?)))
}

/// Images that the network gets at a time.
fn batch_size(num_images: usize, config: EmbedConfig) -> usize {
    (if config.flip { 2 } else { 1 }) * config.batch_size.min(num_images)
}

fn embed_each(
    model: &Model,
    num_images: usize,
    image: &(dyn Fn(usize) -> Result<RgbImage> + Sync),
    config: EmbedConfig,
    run: &mut dyn FnMut(&Pixels) -> Result<Tensor>,
    progress: &mut dyn FnMut(usize),
) -> Result<Embeddings> {
    let (size, dim) = (model.config().input_size, model.config().embedding_size);
    let (mut values, ranks) = (Vec::new(), model.machine().ranks());
    for Range { start: first, end: last } in batches(num_images, config).skip(ranks.rank()).step_by(ranks.size()) {
        let images = parallel::try_map(last - first, |i| image(first + i))?;
        let mut pixels = Pixels::new(size);
        images.iter().for_each(|image| pixels.push(image));
        if config.flip {
            images.iter().for_each(|image| pixels.push(&flip_horizontal(image)));
        }
        let n = last - first;
        let mut y = run(&pixels)?;
        if config.flip {
            y = (y.narrow(0, 0, n)? + y.narrow(0, n, n)?)?;
        }
        if config.normalize {
            y = l2_normalize(&y, 1)?;
        }
        let y = y.flatten_all()?.to_vec1::<f32>()?;
        if config.normalize {
            check_lengths(&y, dim, first)?;
        }
        values.extend(y);
        progress(last);
    }
    Embeddings::new(of_all_ranks(model, values, num_images, config, dim)?, dim)
}

/// The images of each batch.
fn batches(num_images: usize, config: EmbedConfig) -> impl Iterator<Item = Range<usize>> {
    let size = config.batch_size.max(1);
    (0..num_images).step_by(size).map(move |first| first..(first + size).min(num_images))
}

/// Returns the rows of all images, `width` elements each, from those of each rank, which has its share of the batches.
/// The batches are the same on any number of ranks, and so are the embeddings.
fn of_all_ranks(
    model: &Model,
    own: Vec<f32>,
    num_images: usize,
    config: EmbedConfig,
    width: usize,
) -> Result<Vec<f32>> {
    let ranks = model.machine().ranks();
    if ranks.is_single() {
        return Ok(own);
    }
    let mut by_rank: Vec<_> = ranks.gather_f32(&own)?.into_iter().map(Vec::into_iter).collect();
    let mut all = Vec::with_capacity(num_images * width);
    for (batch, images) in batches(num_images, config).enumerate() {
        all.extend(by_rank[batch % ranks.size()].by_ref().take(images.len() * width));
    }
    match all.len() == num_images * width {
        true => Ok(all),
        false => Err(Error::Ranks(format!("expected {num_images} embeddings on all ranks together, found fewer"))),
    }
}

/// Checks that the rows of `y` have length 1: zeros keep length 0, and of an overflow only zeros or NaN are left.
fn check_lengths(y: &[f32], dim: usize, first: usize) -> Result<()> {
    for (row, number) in y.chunks_exact(dim).zip(first + 1..) {
        let length = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        // NaN is no close length either.
        if (length - 1.0).abs() > LENGTH_TOLERANCE || length.is_nan() {
            let what = format!(
                "the embedding of image {number} has no length to scale to 1: it is zero, not finite or too large; are the \
                 weights and the preprocessing right?"
            );
            return Err(Error::Evaluation(what));
        }
    }
    Ok(())
}
