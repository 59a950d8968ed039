//! From images to embeddings.

use candle_core::{Device, Tensor};
use image::RgbImage;
use image::imageops::flip_horizontal;
use rayon::prelude::*;

use crate::data::Pixels;
use crate::error::{Error, Result};
use crate::models::{Inference, Model};
use crate::ops::normalize::l2_normalize;

/// Embeddings, one a row, of length 1 unless [`EmbedConfig::normalize`] says otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    values: Vec<f32>,
    dim: usize,
}

impl Embeddings {
    /// Returns embeddings of `dim` elements each, row after row.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when the values are no whole number of rows, or one is NaN or infinite.
    pub fn new(values: Vec<f32>, dim: usize) -> Result<Self> {
        if dim == 0 || !values.len().is_multiple_of(dim) {
            let what = format!("expected embeddings of {dim} elements, found {} elements in all", values.len());
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

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Returns these rows.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn select(&self, rows: impl IntoIterator<Item = usize>) -> Self {
        Self { values: rows.into_iter().flat_map(|i| self.row(i)).copied().collect(), dim: self.dim }
    }

    /// All values, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Length of an embedding.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Returns embedding `i`.
    ///
    /// # Panics
    /// When there is no row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.dim..][..self.dim]
    }

    /// Returns the product of rows `i` of `self` and `j` of `other`, summed in f64: the cosine of embeddings of length 1.
    ///
    /// # Panics
    /// When there are no such rows.
    pub fn cosine(&self, i: usize, other: &Self, j: usize) -> f64 {
        self.row(i).iter().zip(other.row(j)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }
}

/// How images become embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbedConfig {
    /// Images that go through the network together.
    pub batch_size: usize,
    /// Whether the embedding of the mirrored image is added, as the field evaluates.
    pub flip: bool,
    /// Whether embeddings are scaled to length 1; templates of several images weigh them by their length.
    pub normalize: bool,
}

impl Default for EmbedConfig {
    fn default() -> Self {
        Self { batch_size: 32, flip: true, normalize: true }
    }
}

/// Returns `normalize(f(x) + f(flip x))` of `num_images` images, without the flip or the normalisation if the settings say so.
///
/// `image(i)` gives the aligned crop `i`; `progress(n)` is called after each batch with the images done so far.
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
    let (size, dim) = (model.config().input_size, model.config().embedding_size);
    let mut values = Vec::with_capacity(num_images * dim);
    let network = model.inference(if config.flip { 2 } else { 1 } * config.batch_size.min(num_images))?;
    let mut first = 0;
    while first < num_images {
        let last = (first + config.batch_size.max(1)).min(num_images);
        let images = (first..last).into_par_iter().map(&image).collect::<Result<Vec<_>>>()?;
        let mut pixels = Pixels::new(size);
        images.iter().for_each(|image| pixels.push(image));
        if config.flip {
            images.iter().for_each(|image| pixels.push(&flip_horizontal(image)));
        }
        let n = last - first;
        let mut y = run(&network, model, &pixels)?;
        if config.flip {
            y = (y.narrow(0, 0, n)? + y.narrow(0, n, n)?)?;
        }
        if config.normalize {
            y = l2_normalize(&y, 1)?;
        }
        values.extend(y.flatten_all()?.to_vec1::<f32>()?);
        first = last;
        progress(last);
    }
    Embeddings::new(values, dim)
}

/// The embeddings of 8-bit images, which a GPU preprocesses itself.
fn run(network: &Inference, model: &Model, pixels: &Pixels) -> Result<Tensor> {
    #[cfg(any(test, feature = "cuda"))]
    if let Inference::Gpu(network) = network {
        return Ok(network.run_rgb(&pixels.values)?);
    }
    Ok(network.run(&pixels.to_tensor(model.preprocessing(), &Device::Cpu)?)?)
}
