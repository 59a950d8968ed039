//! From images to embeddings.

use candle_core::{Device, Tensor};
use image::RgbImage;
use image::imageops::flip_horizontal;
use rayon::prelude::*;

use crate::data::Pixels;
use crate::error::Result;
use crate::models::{Inference, Model};
use crate::ops::normalize::l2_normalize;

/// L2-normalised embeddings, one a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    values: Vec<f32>,
    dim: usize,
}

impl Embeddings {
    /// All values, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Length of an embedding.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Returns embedding `i`, of length 1.
    ///
    /// # Panics
    /// When there is no row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.dim..][..self.dim]
    }

    /// Returns the cosine of rows `i` of `self` and `j` of `other`, summed in f64.
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
}

impl Default for EmbedConfig {
    fn default() -> Self {
        Self { batch_size: 32, flip: true }
    }
}

/// Returns `normalize(f(x) + f(flip x))` of `num_images` images, or `normalize(f(x))` without the flip.
///
/// `image(i)` gives the aligned crop `i`; `progress(n)` is called after each batch with the images done so far.
///
/// # Errors
/// When an image or the network fails.
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
        let y = l2_normalize(&y, 1)?;
        values.extend(y.flatten_all()?.to_vec1::<f32>()?);
        first = last;
        progress(last);
    }
    Ok(Embeddings { values, dim })
}

/// The embeddings of 8-bit images, which a GPU preprocesses itself.
fn run(network: &Inference, model: &Model, pixels: &Pixels) -> Result<Tensor> {
    #[cfg(any(test, feature = "cuda"))]
    if let Inference::Gpu(network) = network {
        return Ok(network.run_rgb(&pixels.values)?);
    }
    Ok(network.run(&pixels.to_tensor(model.preprocessing(), &Device::Cpu)?)?)
}
