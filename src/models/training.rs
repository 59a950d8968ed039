//! Networks in training.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::inference::{device_images, device_pixels};
use super::{Model, ModelConfig};
use crate::dist::Ranks;
use crate::machine::Machine;
use crate::nn::engine::{Activations, Recording, SharedBatch, TrainingNetwork};
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
    pub fn model(&self, state: BTreeMap<String, Tensor>) -> crate::Result<Model> {
        let model = Model::frozen(&self.config, state, &Device::Cpu)?;
        Ok(model.with_preprocessing(self.preprocessing.clone()).on(&self.machine))
    }

    /// Ranks that share the network's work.
    pub fn ranks(&self) -> &Ranks {
        self.machine.ranks()
    }

    /// Dropout of the features in training, if the network has it.
    pub fn dropout(&self) -> Option<&Dropout> {
        self.dropout.as_ref()
    }
}

/// A network prepared for training on a device. Parameters in its calls are those that it was prepared with.
#[derive(Debug)]
pub(crate) struct Trainable<B: Kernels> {
    network: TrainingNetwork<B>,
    outline: Outline,
}

impl<B: Kernels> Trainable<B> {
    /// Prepares a network for training and moves its parameters to the device.
    ///
    /// # Errors
    /// When the device does not support the network or runs out of memory.
    pub fn new(backend: &B, model: Model, activations: Activations) -> Result<(Self, DeviceParams<B>)> {
        backend.check_training()?;
        model.known()?;
        if model.quantised().is_some() {
            bail!("a quantised network cannot be trained: train the one that it was made of, and quantise it again");
        }
        let (side, outline) = (model.config().input_size, Outline::of(&model));
        let network = TrainingNetwork::new(model.graph(), model.params(), side, backend, activations)?;
        let parts = model.params().parts();
        // So that each parameter is freed once it is copied.
        drop(model);
        let params = DeviceParams::new(backend, parts, network.orders())?;
        Ok((Self { network, outline }, params))
    }

    /// Returns the embeddings `(N, embedding_size)` of 8-bit images in training mode, which uses dropout and batch
    /// statistics, and updates the running ones; `batch` is that of all ranks, if there are several.
    ///
    /// # Errors
    /// When the images have another size, or a norm gets only one value per channel.
    pub fn record<'a>(
        &'a self,
        params: &mut DeviceParams<B>,
        images: &Pixels,
        batch: Option<SharedBatch<'a>>,
    ) -> crate::Result<(B::Array, Recording<'a, B>)> {
        let Outline { config, preprocessing, .. } = &self.outline;
        let (images, n) = device_pixels(params.backend(), images, config, preprocessing)?;
        Ok(self.network.record(params, (&images, n), self.outline.dropout(), batch)?)
    }

    /// Like [`Self::record`], from preprocessed images `(N, 3, S, S)`.
    fn record_tensor(&self, params: &mut DeviceParams<B>, images: &Tensor) -> Result<(B::Array, Recording<'_, B>)> {
        let (images, n) = device_images(params.backend(), images, self.outline.config.input_size)?;
        self.network.record(params, (&images, n), self.outline.dropout(), None)
    }

    /// Approximate peak size, in bytes, of the activations of `n` images and their gradients.
    pub fn activation_bytes(&self, n: usize) -> usize {
        self.network.activation_bytes(n)
    }
}

/// A network in training on the CPU, for training loops of your own.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use maskinv::models::{Arch, Model, ModelConfig};
/// use maskinv::nn::engine::Activations;
/// use maskinv::optim::{OptimConfig, Optimizer};
///
/// # fn main() -> maskinv::Result<()> {
/// let config = ModelConfig { arch: Arch::R18, width: 0.125, input_size: 32, ..ModelConfig::default() };
/// let mut network = Model::new(&config, &Device::Cpu, 0)?.into_training(Activations::Kept)?;
/// let mut optimizer = Optimizer::new(&OptimConfig::default(), &network)?;
/// let images = Tensor::rand(-1f32, 1.0, (4, 3, 32, 32), &Device::Cpu)?;
/// let (embeddings, pass) = network.record(&images)?;
/// // Any loss: this one pulls all embeddings to zero.
/// pass.backward(&embeddings)?;
/// optimizer.step(&mut network, 0.01)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Training {
    network: Trainable<Cpu>,
    params: DeviceParams<Cpu>,
}

/// A recorded forward pass, for its backward pass.
#[derive(Debug)]
#[must_use = "a pass that does not go backward trains nothing"]
pub struct RecordedPass<'a> {
    recorded: Recording<'a, Cpu>,
    params: &'a mut DeviceParams<Cpu>,
    size: usize,
}

impl Model {
    /// Returns the network in training on the CPU. Parameters that are frozen now stay frozen.
    ///
    /// # Errors
    /// When the parameters are not f32 on the CPU, or a trained one takes no part in the network.
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
    pub fn model(&self) -> crate::Result<Model> {
        self.network.outline.model(self.params.state()?)
    }

    /// Returns the approximate peak memory, in bytes, of activations and their gradients for a batch of `n` images.
    pub fn activation_bytes(&self, n: usize) -> usize {
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
    /// When the gradient's shape is not that of the embeddings.
    pub fn backward(self, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?;
        match gradient.dims() {
            [_, size] if *size == self.size => {}
            dims => bail!("backward: expected a gradient (N, {}), found {dims:?}", self.size),
        }
        self.recorded.backward(self.params, &gradient.flatten_all()?.to_vec1()?)
    }
}
