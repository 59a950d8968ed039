//! Networks in training, by device.

use std::collections::BTreeMap;
use std::fmt::Debug;

use candle_core::{DType, Device, ModuleT, Result, Tensor, bail};

use super::{Inference, Model, ModelConfig};
use crate::machine::Machine;
use crate::nn::engine::{Activations, Engine, Recording};
use crate::nn::{DeviceParams, Dropout, Graph};
use crate::ops::backend::Backend;
use crate::ops::cpu::Cpu;
use crate::ops::slice::Values;
use crate::preprocessing::{Pixels, Preprocessing};

/// Batch size that a teacher's inference is planned for.
const TEACHER_BATCH: usize = 16;

/// A backend that networks run on.
pub(crate) trait Execute: Backend {
    /// A network prepared for training.
    type Network: Debug + Send + Sync;
    /// Activations of a forward pass, for its backward pass.
    type Recording<'a>;
    /// A network prepared for inference.
    type Teacher<'a>: Send + Sync;

    /// Prepares a network for training and moves its parameters to the device.
    ///
    /// # Errors
    /// When the device does not support the network or runs out of memory.
    fn prepare(&self, model: Model, activations: Activations) -> Result<(Self::Network, DeviceParams<Self>)>;
    /// Returns the embeddings `(N, embedding_size)` in training mode, which uses dropout and batch statistics, and
    /// updates the running ones.
    fn record<'a>(
        &self,
        network: &'a Self::Network,
        params: &mut DeviceParams<Self>,
        images: &Pixels,
    ) -> crate::Result<(Self::Array, Self::Recording<'a>)>;
    /// Writes the gradients of the trained parameters from that of the embeddings.
    fn backward(
        &self,
        recording: Self::Recording<'_>,
        params: &mut DeviceParams<Self>,
        gradient: &Self::Array,
    ) -> Result<()>;
    /// Approximate peak size, in bytes, of the activations of `n` images and their gradients, where it is known.
    fn activation_bytes(network: &Self::Network, n: usize) -> Option<usize>;
    /// Prepares a network for inference.
    fn teacher<'a>(&self, model: &'a Model) -> Result<Self::Teacher<'a>>;
    /// Returns embeddings in evaluation mode.
    fn embed(&self, teacher: &Self::Teacher<'_>, images: &Pixels) -> crate::Result<Self::Array>;
}

/// Work that runs on any backend.
pub(crate) trait OnBackend {
    /// What it returns.
    type Output;

    /// Does the work.
    fn with<B: Execute>(self, backend: &B) -> Self::Output;
}

/// Does work on the backend of a machine.
pub(crate) fn on_machine<W: OnBackend>(machine: &Machine, work: W) -> W::Output {
    #[cfg(any(test, feature = "cuda"))]
    if let Some(gpu) = machine.gpu() {
        return work.with(&gpu.backend());
    }
    let _ = machine;
    work.with(&Cpu)
}

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
        Self { config, preprocessing, machine: model.machine().clone(), dropout: model.dropout().cloned() }
    }

    /// Returns a frozen network with these parameters and buffers.
    pub fn model(&self, state: BTreeMap<String, Tensor>) -> Result<Model> {
        let model = Model::frozen(&self.config, state, &Device::Cpu)?;
        Ok(model.with_preprocessing(self.preprocessing.clone()).on(&self.machine))
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Dropout of the features in training, if the network has it.
    pub fn dropout(&self) -> Option<&Dropout> {
        self.dropout.as_ref()
    }
}

/// A network in training on the CPU.
#[derive(Debug)]
pub(crate) enum CpuNetwork {
    /// By the fused engine.
    Fused(Box<Engine>, Outline),
    /// Layer by layer, for networks that the engine does not support.
    Layers(Box<Model>),
}

/// A recorded forward pass on the CPU.
#[derive(Debug)]
pub(crate) enum CpuRecording<'a> {
    Fused(Box<Recording<'a>>),
    /// The embeddings, with candle's graph.
    Layers(Tensor, &'a Model),
}

impl CpuNetwork {
    fn record_tensor(&self, params: &mut DeviceParams<Cpu>, images: &Tensor) -> Result<(Vec<f32>, CpuRecording<'_>)> {
        match self {
            Self::Fused(engine, outline) => {
                let (embeddings, recording) = engine.record(params, images, outline.dropout())?;
                Ok((embeddings, CpuRecording::Fused(Box::new(recording))))
            }
            Self::Layers(model) => {
                model.params().load(&params.state()?)?;
                let embeddings = model.forward_t(images, true)?;
                params.load(&model.params().state()?)?;
                Ok((embeddings.flatten_all()?.to_vec1()?, CpuRecording::Layers(embeddings, model)))
            }
        }
    }

    fn preprocessing(&self) -> &Preprocessing {
        match self {
            Self::Fused(_, outline) => &outline.preprocessing,
            Self::Layers(model) => model.preprocessing(),
        }
    }
}

impl CpuRecording<'_> {
    fn backward(self, params: &mut DeviceParams<Cpu>, gradient: &[f32]) -> Result<()> {
        let (embeddings, model) = match self {
            Self::Fused(recording) => return recording.backward(params, gradient),
            Self::Layers(embeddings, model) => (embeddings, model),
        };
        let gradient = Tensor::from_slice(gradient, embeddings.shape(), &Device::Cpu)?;
        let found = (embeddings * gradient)?.sum_all()?.backward()?;
        for (path, var) in model.params().trainable() {
            let Some(gradient) = found.get(var) else { bail!("{path} received no gradient") };
            let gradient = gradient.contiguous()?;
            let values = Values::of(path, &gradient)?;
            let (path, name) = path.rsplit_once('.').unwrap_or(("", path));
            params.write_grad(path, name, |to| to.copy_from_slice(&values))?;
        }
        Ok(())
    }
}

impl Execute for Cpu {
    type Network = CpuNetwork;
    type Recording<'a> = CpuRecording<'a>;
    type Teacher<'a> = (Inference<'a>, &'a Model);

    fn prepare(&self, model: Model, activations: Activations) -> Result<(CpuNetwork, DeviceParams<Self>)> {
        let engine = Engine::of(&Graph::of(&model), model.params(), model.config().input_size, activations);
        let parts = model.params().parts();
        let network = match engine {
            Some(engine) => {
                let outline = Outline::of(&model);
                // So that each parameter is freed once it is copied.
                drop(model);
                CpuNetwork::Fused(Box::new(engine), outline)
            }
            None if activations == Activations::Recomputed => bail!(
                "{:?} is trained layer by layer, which keeps all activations: no activation checkpointing",
                model.config()
            ),
            None => CpuNetwork::Layers(Box::new(model)),
        };
        Ok((network, DeviceParams::new(self, parts, BTreeMap::new())?))
    }

    fn record<'a>(
        &self,
        network: &'a CpuNetwork,
        params: &mut DeviceParams<Self>,
        images: &Pixels,
    ) -> crate::Result<(Vec<f32>, CpuRecording<'a>)> {
        Ok(network.record_tensor(params, &images.to_tensor(network.preprocessing(), &Device::Cpu)?)?)
    }

    fn backward(
        &self,
        recording: CpuRecording<'_>,
        params: &mut DeviceParams<Self>,
        gradient: &Vec<f32>,
    ) -> Result<()> {
        recording.backward(params, gradient)
    }

    fn activation_bytes(network: &CpuNetwork, n: usize) -> Option<usize> {
        match network {
            CpuNetwork::Fused(engine, _) => Some(engine.activation_bytes(n)),
            CpuNetwork::Layers(_) => None,
        }
    }

    fn teacher<'a>(&self, model: &'a Model) -> Result<(Inference<'a>, &'a Model)> {
        Ok((model.inference(TEACHER_BATCH)?, model))
    }

    fn embed(&self, (network, model): &(Inference<'_>, &Model), images: &Pixels) -> crate::Result<Vec<f32>> {
        Ok(network.run_pixels(images, model)?.flatten_all()?.to_vec1()?)
    }
}

/// A network in training on the CPU, for training loops of your own.
#[derive(Debug)]
pub struct Training {
    network: CpuNetwork,
    params: DeviceParams<Cpu>,
    outline: Outline,
}

/// A recorded forward pass, for its backward pass.
#[derive(Debug)]
pub struct Recorded<'a> {
    recording: CpuRecording<'a>,
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
        let outline = Outline::of(&self);
        let (network, params) = Cpu.prepare(self, activations)?;
        Ok(Training { network, params, outline })
    }
}

impl Training {
    /// Returns the embeddings `(N, embedding_size)`, outside any graph, of images `(N, 3, S, S)`, f32, and a recording
    /// for the backward pass. Training mode uses dropout and batch statistics, which update the running ones.
    ///
    /// # Errors
    /// When the images have another size or type, or a norm gets only one value per channel.
    pub fn record(&mut self, images: &Tensor) -> Result<(Tensor, Recorded<'_>)> {
        let Self { network, params, outline } = self;
        let size = outline.config().embedding_size;
        let (embeddings, recording) = network.record_tensor(params, images)?;
        let embeddings = Tensor::from_vec(embeddings, ((), size), &Device::Cpu)?;
        Ok((embeddings, Recorded { recording, params, size }))
    }

    /// Returns the gradients of the trained parameters by name, as the last backward pass wrote them.
    ///
    /// # Errors
    /// When memory for the copies cannot be allocated.
    pub fn gradients(&self) -> Result<BTreeMap<String, Tensor>> {
        self.params.named(self.params.grads(), crate::nn::Group::Trained)
    }

    /// Returns the network with its current weights, frozen.
    ///
    /// # Errors
    /// When memory for the copy cannot be allocated.
    pub fn model(&self) -> Result<Model> {
        self.outline.model(self.params.state()?)
    }

    /// Returns the approximate peak memory, in bytes, of activations and their gradients for a batch of `n` images;
    /// none for a network that runs layer by layer.
    pub fn activation_bytes(&self, n: usize) -> Option<usize> {
        Cpu::activation_bytes(&self.network, n)
    }

    pub(crate) fn params(&self) -> &DeviceParams<Cpu> {
        &self.params
    }

    pub(crate) fn params_mut(&mut self) -> &mut DeviceParams<Cpu> {
        &mut self.params
    }
}

impl Recorded<'_> {
    /// Writes the gradients of all trained parameters from that of the embeddings, `(N, embedding_size)`, f32.
    ///
    /// # Errors
    /// When the gradient's shape is not that of the embeddings, or a parameter receives none.
    pub fn backward(self, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
        match gradient.dims() {
            [_, size] if *size == self.size => {}
            dims => bail!("backward: expected a gradient (N, {}), found {dims:?}", self.size),
        }
        self.recording.backward(self.params, &Values::of("backward", &gradient)?)
    }
}
