//! Networks in training.

use std::collections::BTreeMap;

use candle_core::{DType, Device, ModuleT, Result, Tensor, bail};

use super::inference::{device_images, device_pixels, unsupported};
use super::{Model, ModelConfig};
use crate::machine::Machine;
use crate::nn::engine::{Activations, Network, Recording};
use crate::nn::{DeviceParams, Dropout, Group};
use crate::ops::backend::Kernels;
use crate::ops::cpu::Cpu;
use crate::preprocessing::{Pixels, Preprocessing};

/// A network without its parameters.
#[derive(Clone, Debug)]
pub(crate) struct Outline {
    config: ModelConfig,
    preprocessing: Preprocessing,
    machine: Machine,
    dropout: Option<Dropout>,
}

impl Outline {
    pub fn of(model: &Model) -> Self {
        let (config, preprocessing) = (model.config().clone(), model.preprocessing().clone());
        Self { config, preprocessing, machine: model.machine().clone(), dropout: model.params().dropout().cloned() }
    }

    /// Returns a frozen network with these parameters and buffers.
    pub fn model(&self, state: BTreeMap<String, Tensor>) -> Result<Model> {
        let model = Model::frozen(&self.config, state, &Device::Cpu)?;
        Ok(model.with_preprocessing(self.preprocessing.clone()).on(&self.machine))
    }

    /// Dropout of the features in training, if the network has it.
    pub fn dropout(&self) -> Option<&Dropout> {
        self.dropout.as_ref()
    }
}

/// A network prepared for training on a device. Parameters in its calls are those that it was prepared with.
#[derive(Debug)]
pub(crate) struct Trainable<B: Kernels> {
    how: How<B>,
    outline: Outline,
}

#[derive(Debug)]
enum How<B: Kernels> {
    Fused(Box<Network<B>>),
    /// Layer by layer, for networks that the engine does not support.
    Layers(Box<Model>),
}

/// A recorded forward pass, for its backward pass.
#[derive(Debug)]
pub(crate) enum Recorded<'a, B: Kernels> {
    Fused(Box<Recording<'a, B>>),
    /// The embeddings, with candle's graph.
    Layers(Tensor, &'a Model),
}

impl<B: Kernels> Trainable<B> {
    /// Prepares a network for training and moves its parameters to the device.
    ///
    /// # Errors
    /// When the device does not support the network or runs out of memory.
    pub fn new(backend: &B, model: Model, activations: Activations) -> Result<(Self, DeviceParams<B>)> {
        backend.check_training()?;
        let (side, outline) = (model.config().input_size, Outline::of(&model));
        let parts = model.params().parts();
        let (how, orders) = match Network::training(model.graph(), model.params(), side, backend, activations) {
            Some(network) => {
                // So that each parameter is freed once it is copied.
                drop(model);
                let orders = network.orders();
                (How::Fused(Box::new(network)), orders)
            }
            None if !B::RUNS_LAYERS => bail!("{}", unsupported(&model, backend)),
            None if activations == Activations::Recomputed => bail!(
                "{:?} is trained layer by layer, which keeps all activations: no activation checkpointing",
                model.config()
            ),
            None => (How::Layers(Box::new(model)), BTreeMap::new()),
        };
        Ok((Self { how, outline }, DeviceParams::new(backend, parts, orders)?))
    }

    /// Returns the embeddings `(N, embedding_size)` of 8-bit images in training mode, which uses dropout and batch
    /// statistics, and updates the running ones.
    ///
    /// # Errors
    /// When the images have another size, or a norm gets only one value per channel.
    pub fn record(&self, params: &mut DeviceParams<B>, images: &Pixels) -> crate::Result<(B::Array, Recorded<'_, B>)> {
        let Outline { config, preprocessing, .. } = &self.outline;
        match &self.how {
            How::Fused(network) => {
                let images = device_pixels(params.backend(), images, config, preprocessing)?;
                Ok(self.record_fused(network, params, images)?)
            }
            How::Layers(_) => Ok(self.record_tensor(params, &images.to_tensor(preprocessing, &Device::Cpu)?)?),
        }
    }

    /// Like [`Self::record`], from preprocessed images `(N, 3, S, S)`.
    fn record_tensor(&self, params: &mut DeviceParams<B>, images: &Tensor) -> Result<(B::Array, Recorded<'_, B>)> {
        match &self.how {
            How::Fused(network) => {
                let images = device_images(params.backend(), images, self.outline.config.input_size)?;
                self.record_fused(network, params, images)
            }
            How::Layers(model) => {
                model.params().load(&params.state()?)?;
                let embeddings = model.forward_t(images, true)?;
                params.load_buffers(model.params())?;
                let values = params.backend().upload(embeddings.flatten_all()?.to_vec1()?)?;
                Ok((values, Recorded::Layers(embeddings, model)))
            }
        }
    }

    fn record_fused<'a>(
        &'a self,
        network: &'a Network<B>,
        params: &mut DeviceParams<B>,
        (images, n): (B::Images, usize),
    ) -> Result<(B::Array, Recorded<'a, B>)> {
        let (embeddings, recording) = network.record(params, (&images, n), self.outline.dropout())?;
        Ok((embeddings, Recorded::Fused(Box::new(recording))))
    }

    /// Approximate peak size, in bytes, of the activations of `n` images and their gradients; none for a network that
    /// runs layer by layer, and on a GPU.
    pub fn activation_bytes(&self, n: usize) -> Option<usize> {
        match &self.how {
            How::Fused(network) if B::IS_SYNCHRONOUS => Some(network.activation_bytes(n)),
            How::Fused(_) | How::Layers(_) => None,
        }
    }
}

impl<B: Kernels> Recorded<'_, B> {
    /// Writes the gradients of the trained parameters from that of the embeddings.
    ///
    /// # Errors
    /// When the gradient has another size, or a parameter receives none.
    pub fn backward(self, params: &mut DeviceParams<B>, gradient: &B::Array) -> Result<()> {
        let (embeddings, model) = match self {
            Self::Fused(recording) => return recording.backward(params, gradient),
            Self::Layers(embeddings, model) => (embeddings, model),
        };
        let gradient = params.backend().read(gradient)?.into_owned();
        let gradient = Tensor::from_vec(gradient, embeddings.shape(), &Device::Cpu)?;
        let found = (embeddings * gradient)?.sum_all()?.backward()?;
        // A silently skipped parameter would never train.
        let missing = model.params().trainable().filter(|(_, var)| found.get(var).is_none());
        let missing: Vec<&str> = missing.map(|(name, _)| name).collect();
        if !missing.is_empty() {
            let shown = missing[..missing.len().min(20)].join(", ");
            bail!("{} trainable parameters received no gradient: {shown}", missing.len());
        }
        let vars: BTreeMap<_, _> = model.params().trainable().collect();
        params.set_grads(|name| match vars.get(name).and_then(|var| found.get(var)) {
            Some(gradient) => Ok(gradient.clone()),
            None => bail!("{name} is not trained"),
        })
    }
}

/// A network in training on the CPU, for training loops of your own.
#[derive(Debug)]
pub struct Training {
    network: Trainable<Cpu>,
    params: DeviceParams<Cpu>,
}

/// A recorded forward pass, for its backward pass.
#[derive(Debug)]
pub struct RecordedPass<'a> {
    recorded: Recorded<'a, Cpu>,
    params: &'a mut DeviceParams<Cpu>,
    size: usize,
}

impl Model {
    /// Returns the network in training on the CPU. Parameters that are frozen now stay frozen.
    ///
    /// # Errors
    /// When the parameters are not f32, or with [`Activations::Recomputed`] when the network runs layer by layer, which
    /// keeps all activations.
    pub fn into_training(self, activations: Activations) -> Result<Training> {
        let (network, params) = Trainable::new(&Cpu, self, activations)?;
        Ok(Training { network, params })
    }
}

impl Training {
    /// Returns the embeddings `(N, embedding_size)`, outside any graph, of images `(N, 3, S, S)`, f32, and a recording
    /// for the backward pass. Training mode uses dropout and batch statistics, which update the running ones.
    ///
    /// # Errors
    /// When the images have another size or type, or a norm gets only one value per channel.
    pub fn record(&mut self, images: &Tensor) -> Result<(Tensor, RecordedPass<'_>)> {
        let Self { network, params } = self;
        let size = network.outline.config.embedding_size;
        let (embeddings, recorded) = network.record_tensor(params, images)?;
        let embeddings = Tensor::from_vec(embeddings, ((), size), &Device::Cpu)?;
        Ok((embeddings, RecordedPass { recorded, params, size }))
    }

    /// Returns the gradients of the trained parameters by name, as the last backward pass wrote them.
    ///
    /// # Errors
    /// When memory for the copies cannot be allocated.
    pub fn gradients(&self) -> Result<BTreeMap<String, Tensor>> {
        self.params.named(self.params.grads(), Group::Trained)
    }

    /// Returns the network with its current weights, frozen.
    ///
    /// # Errors
    /// When memory for the copy cannot be allocated.
    pub fn model(&self) -> Result<Model> {
        self.network.outline.model(self.params.state()?)
    }

    /// Returns the approximate peak memory, in bytes, of activations and their gradients for a batch of `n` images;
    /// none for a network that runs layer by layer.
    pub fn activation_bytes(&self, n: usize) -> Option<usize> {
        self.network.activation_bytes(n)
    }

    pub(crate) fn params(&self) -> &DeviceParams<Cpu> {
        &self.params
    }

    pub(crate) fn params_mut(&mut self) -> &mut DeviceParams<Cpu> {
        &mut self.params
    }
}

impl RecordedPass<'_> {
    /// Writes the gradients of all trained parameters from that of the embeddings, `(N, embedding_size)`, f32.
    ///
    /// # Errors
    /// When the gradient's shape is not that of the embeddings, or a parameter receives none.
    pub fn backward(self, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?;
        match gradient.dims() {
            [_, size] if *size == self.size => {}
            dims => bail!("backward: expected a gradient (N, {}), found {dims:?}", self.size),
        }
        self.recorded.backward(self.params, &gradient.flatten_all()?.to_vec1()?)
    }
}
