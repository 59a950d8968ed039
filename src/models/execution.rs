//! Execution of a network: by the fused engine if it supports the network, else layer by layer.

use std::fmt;
use std::ops::Deref;

use candle_core::{Device, ModuleT, Result, Tensor};
use serde::Serialize;

#[cfg(any(test, feature = "cuda"))]
use super::OnGpu;
use super::{Model, Net};
use crate::nn::engine::Plan;
use crate::nn::{Dropout, Graph};
use crate::preprocessing::Pixels;

/// A network prepared for inference with its current weights.
#[derive(Debug)]
pub enum Inference<'a> {
    /// A plan of the fused engine, with norms folded and filters packed.
    Plan(Box<Plan>),
    /// Layer by layer, for networks that the engine does not support.
    Layers(Kept<'a>),
    /// On a GPU.
    #[cfg(any(test, feature = "cuda"))]
    Gpu(Box<OnGpu>),
}

/// A borrowed or owned network.
#[derive(Debug)]
pub enum Kept<'a> {
    /// A borrowed network.
    Borrowed(&'a Model),
    /// An owned network.
    Owned(Box<Model>),
}

impl Deref for Kept<'_> {
    type Target = Model;

    fn deref(&self) -> &Model {
        match self {
            Self::Borrowed(model) => model,
            Self::Owned(model) => model,
        }
    }
}

impl Inference<'_> {
    /// Returns the embeddings `(N, embedding_size)`, not normalised, of images `(N, 3, S, S)`, preprocessed as
    /// [`Model::preprocessing`] says.
    ///
    /// # Errors
    /// When the images have another size or type.
    pub fn run(&self, images: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plan(plan) => plan.run(images),
            Self::Layers(model) => model.forward_t(images, false),
            #[cfg(any(test, feature = "cuda"))]
            Self::Gpu(network) => network.run(images),
        }
    }

    /// Returns the embeddings `(N, embedding_size)`, not normalised, of 8-bit images of `model`'s input size; a GPU
    /// preprocesses them itself.
    ///
    /// # Errors
    /// When the images have another size.
    pub(crate) fn run_pixels(&self, images: &Pixels, model: &Model) -> crate::Result<Tensor> {
        match self {
            #[cfg(any(test, feature = "cuda"))]
            Self::Gpu(network) => Ok(network.run_rgb(&images.values)?),
            network => Ok(network.run(&images.to_tensor(model.preprocessing(), &Device::Cpu)?)?),
        }
    }
}

/// How a pass of a convolution runs on a GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConvolutionPass {
    /// What is computed: the output, or a gradient.
    pub pass: &'static str,
    /// Images, height, width and channels in, channels out, filter, stride.
    pub convolution: String,
    /// Algorithm and math.
    pub algorithm: String,
    /// Time that the library measured, in milliseconds.
    pub milliseconds: Option<f32>,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
}

/// Prints a row of a table: convolution, pass, milliseconds, megabytes of workspace, algorithm.
impl fmt::Display for ConvolutionPass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pass, convolution, algorithm, milliseconds, workspace_bytes } = self;
        let ms = milliseconds.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.4}"));
        let megabytes = *workspace_bytes as f64 / 1e6;
        write!(f, "{convolution:36}  {pass:23}  {ms:>9}  {megabytes:>9.1}  {algorithm}")
    }
}

impl ConvolutionPass {
    /// Heads of the columns that a row prints.
    pub fn heads() -> String {
        format!("{:36}  {:23}  {:>9}  {:>9}  algorithm", "convolution", "pass", "ms", "MB")
    }
}

impl Model {
    /// Returns the network for inference, prepared for batches of about `batch_size` images; other sizes work, but may
    /// be slower.
    ///
    /// # Errors
    /// When a parameter cannot be read, or the model's GPU runs out of memory or its engine does not support the
    /// network.
    pub fn inference(&self, batch_size: usize) -> Result<Inference<'_>> {
        #[cfg(any(test, feature = "cuda"))]
        if self.machine.gpu().is_some() {
            return Ok(Inference::Gpu(Box::new(OnGpu::upload(self)?)));
        }
        let layers = || Inference::Layers(Kept::Borrowed(self));
        Ok(self.plan(batch_size)?.map_or_else(layers, |plan| Inference::Plan(Box::new(plan))))
    }

    /// Like [`Self::inference`], but drops the weights as they are packed: less memory at the peak and afterwards.
    ///
    /// # Errors
    /// Same as [`Self::inference`].
    pub fn into_inference(self, batch_size: usize) -> Result<Inference<'static>> {
        #[cfg(any(test, feature = "cuda"))]
        if self.machine.gpu().is_some() {
            return Ok(Inference::Gpu(Box::new(OnGpu::upload(&self)?)));
        }
        let (graph, images) = (Graph::of(&self), [batch_size, self.config.input_size]);
        if !Plan::fits(&graph, &self.params, images) {
            return Ok(Inference::Layers(Kept::Owned(Box::new(self))));
        }
        let Self { net, params, .. } = self;
        // The layers hold the weights too.
        drop(net);
        Ok(Inference::Plan(Box::new(Plan::consuming(&graph, params, images)?)))
    }

    /// Returns how each pass of each different convolution of `n` images runs on the model's GPU, after running it once;
    /// nothing for the CPU.
    ///
    /// # Errors
    /// When the GPU's engine does not support the network, or it runs out of memory.
    pub fn convolutions(&self, n: usize) -> Result<Vec<ConvolutionPass>> {
        #[cfg(any(test, feature = "cuda"))]
        if self.machine.gpu().is_some() {
            return OnGpu::upload(self)?.convolutions(n);
        }
        let _ = n;
        Ok(Vec::new())
    }

    /// Dropout of the features in training, if the network has it.
    pub(crate) fn dropout(&self) -> Option<&Dropout> {
        match &self.net {
            Net::IResNet(net) => Some(net.dropout()),
            Net::MobileFaceNet(_) => None,
        }
    }

    fn plan(&self, batch_size: usize) -> Result<Option<Plan>> {
        Plan::of(&Graph::of(self), &self.params, [batch_size, self.config.input_size])
    }
}
