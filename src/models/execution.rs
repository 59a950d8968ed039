//! How a network is carried out: by the fused engine where that can, else layer by layer.

use std::ops::Deref;

use candle_core::{ModuleT, Result, Tensor, bail};

#[cfg(any(test, feature = "cuda"))]
use super::OnGpu;
use super::{Model, Net};
use crate::nn::engine::{Engine, Keep, Plan, Recording};
use crate::nn::{Dropout, Gradients, Graph, Params};

/// A network for inference, with the weights that it had when this was made.
#[derive(Debug)]
pub enum Inference<'a> {
    /// Norms folded, filters packed.
    Plan(Box<Plan>),
    /// Layer by layer, for what the engine lacks.
    Layers(Kept<'a>),
    /// On a GPU.
    #[cfg(any(test, feature = "cuda"))]
    Gpu(Box<OnGpu>),
}

/// A network that is somebody else's, or not.
#[derive(Debug)]
pub enum Kept<'a> {
    /// Somebody else's.
    Borrowed(&'a Model),
    /// Nobody else's.
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
    /// When the images are of another size or type.
    pub fn run(&self, images: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plan(plan) => plan.run(images),
            Self::Layers(model) => model.forward_t(images, false),
            #[cfg(any(test, feature = "cuda"))]
            Self::Gpu(network) => network.run(images),
        }
    }
}

/// What the training of one network keeps from step to step.
#[derive(Debug)]
pub struct Training {
    engine: Option<Engine>,
}

/// A forward pass in training that knows its backward.
#[derive(Debug)]
pub enum Recorded<'a> {
    /// By the fused engine.
    Fused(Box<Recording<'a>>),
    /// Layer by layer: the embeddings, with candle's graph.
    Layers(Tensor, &'a Params),
}

impl Training {
    /// Returns about how many bytes the activations of a batch of `n` images and their gradients take at the peak; none for a network that
    /// goes layer by layer.
    pub fn activation_bytes(&self, n: usize) -> Option<usize> {
        Some(self.engine.as_ref()?.activation_bytes(n))
    }

    /// Returns the embeddings `(N, embedding_size)`, outside any graph, of images `(N, 3, S, S)` in training mode: batch
    /// statistics, which enter the running ones, and dropout. `model` is that of [`Model::training`].
    ///
    /// # Errors
    /// When the images are of another size or type, or a batch has one value per channel.
    pub fn record<'a>(&'a self, model: &'a Model, images: &Tensor) -> Result<(Tensor, Recorded<'a>)> {
        let side = model.config.input_size;
        match &self.engine {
            Some(engine) => {
                if images.dims().get(1..) != Some(&[3, side, side]) || images.elem_count() == 0 {
                    bail!("expected images (N, 3, {side}, {side}), found {:?}", images.shape());
                }
                let (embedding, recording) = engine.record(&model.params, images, model.dropout())?;
                Ok((embedding, Recorded::Fused(Box::new(recording))))
            }
            None => {
                let embedding = model.forward_t(images, true)?;
                Ok((embedding.detach(), Recorded::Layers(embedding, &model.params)))
            }
        }
    }
}

impl Recorded<'_> {
    /// Returns the gradients of all trained parameters from that of the embeddings.
    ///
    /// # Errors
    /// When the gradient's shape is not that of the embeddings, or a parameter receives none.
    pub fn backward(self, grad: &Tensor) -> Result<Gradients> {
        match self {
            Self::Fused(recording) => recording.backward(grad),
            Self::Layers(embedding, params) => {
                Gradients::of(params, &(embedding * grad.detach())?.sum_all()?.backward()?)
            }
        }
    }
}

impl Model {
    /// Returns the network for inference, of about `batch_size` images at once; others are slower at the most.
    ///
    /// # Errors
    /// When a parameter cannot be read, or the model's GPU has no memory or no way for it.
    pub fn inference(&self, batch_size: usize) -> Result<Inference<'_>> {
        #[cfg(any(test, feature = "cuda"))]
        if self.machine.gpu().is_some() {
            return Ok(Inference::Gpu(Box::new(OnGpu::upload(self)?)));
        }
        let layers = || Inference::Layers(Kept::Borrowed(self));
        Ok(self.plan(batch_size)?.map_or_else(layers, |plan| Inference::Plan(Box::new(plan))))
    }

    /// As [`Self::inference`], giving up the weights as they are packed: less memory at the peak, and later.
    ///
    /// # Errors
    /// When a parameter cannot be read.
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

    /// What drops features in training, if the network has it.
    pub(crate) fn dropout(&self) -> Option<&Dropout> {
        match &self.net {
            Net::IResNet(net) => Some(net.dropout()),
            Net::MobileFaceNet(_) => None,
        }
    }

    fn plan(&self, batch_size: usize) -> Result<Option<Plan>> {
        Plan::of(&Graph::of(self), &self.params, [batch_size, self.config.input_size])
    }

    /// Returns what the training of this network keeps from step to step.
    pub fn training(&self) -> Training {
        Training { engine: self.engine(Keep::All) }
    }

    /// As [`Self::training`], with less of a forward pass in memory: some blocks' results, from which the backward pass computes the rest
    /// again, bit for bit.
    ///
    /// # Errors
    /// When the network goes layer by layer, which keeps everything.
    pub fn recomputing(&self) -> Result<Training> {
        match self.engine(Keep::Some) {
            Some(engine) => Ok(Training { engine: Some(engine) }),
            None => bail!(
                "{:?} is trained layer by layer, which keeps all activations: they cannot be computed again",
                self.config
            ),
        }
    }

    fn engine(&self, keep: Keep) -> Option<Engine> {
        Engine::of(&Graph::of(self), &self.params, self.config.input_size, keep)
    }
}
