//! Face-recognition backbones: an aligned face in, an embedding out.

mod checkpoint;
mod foreign;
mod inference;
mod int8;
mod iresnet;
mod layout;
mod mask_head;
mod mobilefacenet;
mod onnx;
mod open;
mod threshold;
mod training;
mod weights;

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use serde::{Deserialize, Serialize};

pub use crate::ops::conv::ConvolutionPass;
pub use checkpoint::{
    BACKBONE_FILE, Format, LoadConfig, Loaded, export_onnx, load_bundled, load_model, load_model_with, save_model,
};
use foreign::Foreign;
pub(crate) use inference::Embedder;
pub use inference::{Inference, MaskInference};
pub use int8::{QuantiseConfig, Quantised, Ranges};
pub use iresnet::IResNetConfig;
pub use layout::{Layout, recognise};
pub use mask_head::MaskHead;
pub use mobilefacenet::{MobileFaceNetConfig, MobileFaceNetHead};
pub(crate) use onnx::lift;
pub use onnx::{from_onnx, to_onnx};
pub use open::open_model;
pub use threshold::{ComputedWith, Threshold};
pub(crate) use training::{Outline, Trainable};
pub use training::{RecordedPass, Training};

use crate::machine::Machine;
use crate::nn::{Graph, Params};
use crate::preprocessing::Preprocessing;

/// The architectures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Arch {
    /// IResNet with 2, 2, 2, 2 blocks.
    R18,
    /// IResNet with 3, 4, 6, 3 blocks.
    R34,
    /// IResNet with 3, 4, 14, 3 blocks.
    R50,
    /// IResNet with 3, 13, 30, 3 blocks: MaskInv's.
    #[default]
    R100,
    /// IResNet with 6, 26, 60, 6 blocks.
    R200,
    /// MobileFaceNet as in insightface's published `w600k_mbf.onnx`.
    Mbf,
    /// MobileFaceNet as in arcface_torch's source, with a global depthwise head.
    MbfGdc,
    /// Any other network, from an ONNX file: it runs as the file says, frozen, and is not built by name.
    Onnx,
}

impl Arch {
    /// The architectures that are built by name.
    pub const ALL: [Self; 7] = [Self::R18, Self::R34, Self::R50, Self::R100, Self::R200, Self::Mbf, Self::MbfGdc];

    /// Returns the name in configs.
    pub fn name(self) -> &'static str {
        match self {
            Self::R18 => "r18",
            Self::R34 => "r34",
            Self::R50 => "r50",
            Self::R100 => "r100",
            Self::R200 => "r200",
            Self::Mbf => "mbf",
            Self::MbfGdc => "mbf-gdc",
            Self::Onnx => "onnx",
        }
    }

    /// Returns the display name.
    pub fn title(self) -> &'static str {
        match self {
            Self::R18 => "IResNet-18",
            Self::R34 => "IResNet-34",
            Self::R50 => "IResNet-50",
            Self::R100 => "IResNet-100",
            Self::R200 => "IResNet-200",
            Self::Mbf => "MobileFaceNet (linear head)",
            Self::MbfGdc => "MobileFaceNet (global depthwise head)",
            Self::Onnx => "another architecture, as its graph says",
        }
    }

    /// Blocks of the four stages of an IResNet; none for the others.
    fn layers(self) -> Option<[usize; 4]> {
        match self {
            Self::R18 => Some([2, 2, 2, 2]),
            Self::R34 => Some([3, 4, 6, 3]),
            Self::R50 => Some([3, 4, 14, 3]),
            Self::R100 => Some([3, 13, 30, 3]),
            Self::R200 => Some([6, 26, 60, 6]),
            Self::Mbf | Self::MbfGdc | Self::Onnx => None,
        }
    }
}

/// Settings of a backbone; the default is the paper's ResNet-100.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Architecture.
    pub arch: Arch,
    /// Length of the embedding.
    pub embedding_size: usize,
    /// Factor of the channel counts: 1 is the published network, less is for small machines.
    pub width: f64,
    /// Side of the input in pixels: 112 is the published network; crops are scaled to it.
    pub input_size: usize,
    /// Dropout rate of the features before the last linear layer (IResNet only).
    pub dropout: f64,
    /// Whether blocks have squeeze-excitation (IResNet only).
    pub squeeze_excitation: bool,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            arch: Arch::default(),
            embedding_size: 512,
            width: 1.0,
            input_size: 112,
            dropout: 0.0,
            squeeze_excitation: false,
        }
    }
}

impl ModelConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let wrong = |what: String| Err(crate::Error::Config(format!("model.{what}")));
        if self.arch == Arch::Onnx {
            return wrong("arch: a network of another architecture comes from its ONNX file and is not built".into());
        }
        if !(1..=2048).contains(&self.embedding_size) {
            return wrong(format!("embedding_size: expected 1 to 2048, found {}", self.embedding_size));
        }
        if !(self.width > 0.0 && self.width <= 2.0) {
            return wrong(format!("width: expected above 0 and up to 2, found {}", self.width));
        }
        if !(16..=224).contains(&self.input_size) || !self.input_size.is_multiple_of(16) {
            return wrong(format!("input_size: expected a multiple of 16 from 16 to 224, found {}", self.input_size));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong(format!("dropout: expected 0 <= dropout < 1, found {}", self.dropout));
        }
        if self.arch.layers().is_none() && (self.dropout > 0.0 || self.squeeze_excitation) {
            return wrong("arch: a MobileFaceNet has neither dropout nor squeeze-excitation".into());
        }
        Ok(())
    }
}

impl ModelConfig {
    /// Names the settings in which `found` differs from these.
    pub fn difference(&self, found: &Self) -> String {
        let fields = |config: &Self| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let found = fields(found);
        let unlike = fields(self).into_iter().filter(|(name, value)| found.get(name) != Some(value));
        let said = unlike.map(|(name, value)| format!("expected model.{name} = {value}, found {}", found[&name]));
        said.collect::<Vec<_>>().join("; ")
    }
}

/// A network recognised in a file as one of ours.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Found {
    /// How the network was recognised.
    pub layout: Layout,
    /// Architecture. Dropout is 0 unless our own metadata states it: it leaves no trace in the tensors.
    pub config: ModelConfig,
    /// Parameters and buffers under our names, plus any other tensors of the file: [`Self::build`] accepts exactly the
    /// network's own.
    pub tensors: BTreeMap<String, Tensor>,
    /// Preprocessing of the input, if the file states it.
    pub preprocessing: Option<Preprocessing>,
    /// Notes for the user about what was recognised, changed or left out, one sentence each.
    pub notes: Vec<String>,
}

impl Found {
    /// Returns the network, frozen, in `dtype`. With f32, tensors that are f32 are not copied.
    ///
    /// # Errors
    /// When the names and shapes are not exactly that network's: one error that lists up to 20 of them and their count.
    pub fn build(self, dtype: DType, device: &Device) -> crate::Result<Model> {
        let model = Model::build(&self.config, Params::given(self.tensors, dtype, device))?;
        Ok(model.with_preprocessing(self.preprocessing.unwrap_or_default()))
    }
}

/// A backbone with its parameters.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use maskinv::models::{Arch, Model, ModelConfig};
///
/// # fn main() -> maskinv::Result<()> {
/// let config = ModelConfig { arch: Arch::R18, width: 0.125, input_size: 32, ..ModelConfig::default() };
/// let model = Model::new(&config, &Device::Cpu, 0)?;
/// let images = Tensor::zeros((2, 3, 32, 32), DType::F32, &Device::Cpu)?;
/// let embeddings = model.inference(2)?.run(&images)?;
/// assert_eq!(embeddings.dims(), [2, 512]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Model {
    graph: Graph,
    params: Params,
    config: ModelConfig,
    preprocessing: Preprocessing,
    thresholds: Vec<Threshold>,
    mask_head: Option<MaskHead>,
    machine: Machine,
    /// Convolutions of 8-bit integers, if there are any.
    quantised: Option<Arc<Quantised>>,
    /// A network of another architecture, which has no graph and no parameters here.
    foreign: Option<Arc<Foreign>>,
}

impl Model {
    /// Returns a trainable network, f32, with the published initialisation drawn from `seed`.
    ///
    /// # Errors
    /// When the config is out of range or memory cannot be allocated.
    pub fn new(config: &ModelConfig, device: &Device, seed: u64) -> crate::Result<Self> {
        Self::build(config, Params::new(DType::F32, device, seed))
    }

    /// Returns a network with the given parameters and buffers, f32, that never receives gradients, such as a teacher.
    ///
    /// # Errors
    /// As [`Self::new`], and when the names and shapes are not exactly this network's.
    pub fn frozen(config: &ModelConfig, state: BTreeMap<String, Tensor>, device: &Device) -> crate::Result<Self> {
        Self::build(config, Params::given(state, DType::F32, device))
    }

    /// Returns a network whose weights are zeros that take no memory: for its graph, parameter names and shapes.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn outline(config: &ModelConfig) -> crate::Result<Self> {
        Self::build(config, Params::outline(DType::F32, &Device::Cpu))
    }

    /// Returns a network whose parameters are created in `params`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn build(config: &ModelConfig, mut params: Params) -> crate::Result<Self> {
        config.validate()?;
        let p = params.root();
        let graph = match config.arch.layers() {
            Some(layers) => IResNetConfig::of(config, layers).build(p)?,
            None => MobileFaceNetConfig::of(config).build(p)?,
        };
        params.finish()?;
        Ok(Self {
            graph,
            params,
            config: config.clone(),
            preprocessing: Preprocessing::default(),
            thresholds: Vec::new(),
            mask_head: None,
            machine: Machine::default(),
            quantised: None,
            foreign: None,
        })
    }

    /// Returns a network that a runtime runs as its file says.
    fn foreign(network: Foreign, preprocessing: Preprocessing) -> Self {
        Self {
            graph: Graph::new(),
            params: Params::outline(DType::F32, &Device::Cpu),
            config: network.config(),
            preprocessing,
            thresholds: Vec::new(),
            mask_head: None,
            machine: Machine::default(),
            quantised: None,
            foreign: Some(Arc::new(network)),
        }
    }

    /// Checks that the network is one of ours, of which parameters and operations are known.
    ///
    /// # Errors
    /// When it is of another architecture.
    pub(crate) fn known(&self) -> Result<&Self> {
        match &self.foreign {
            None => Ok(self),
            Some(_) => candle_core::bail!(
                "expected a network of {}, found {}: it can embed and teach, but not be trained or made another file",
                Arch::ALL.map(Arch::name).join(", "),
                self.config.arch.title()
            ),
        }
    }

    /// Returns the network with other preprocessing.
    pub fn with_preprocessing(self, preprocessing: Preprocessing) -> Self {
        Self { preprocessing, ..self }
    }

    /// Returns the network with other thresholds.
    pub fn with_thresholds(self, thresholds: Vec<Threshold>) -> Self {
        Self { thresholds, ..self }
    }

    /// Returns the network with a mask head, or without one.
    pub fn with_mask_head(self, mask_head: Option<MaskHead>) -> Self {
        Self { mask_head, ..self }
    }

    /// Returns what its scores depend on, to be recorded with a threshold.
    ///
    /// # Errors
    /// When the weights cannot be read.
    pub fn computed_with(&self) -> Result<ComputedWith> {
        let (preprocessing, weights) = (self.preprocessing.clone(), self.weights_digest()?);
        Ok(ComputedWith { preprocessing, weights, precision: self.precision() })
    }

    /// What products are computed in on the network's machine: `f32`, `int8` for a quantised network on the CPU, or a
    /// GPU's precision.
    pub fn precision(&self) -> String {
        match self.machine.gpu_bytes() {
            None if self.quantised.is_some() => "int8".to_owned(),
            _ => self.machine.precision(),
        }
    }

    /// Drops the thresholds that were measured with other weights, preprocessing or precision than the network has now,
    /// and a mask head that was fitted to other weights or preprocessing; returns a note about them, if there are any.
    ///
    /// # Errors
    /// When the weights cannot be read.
    pub fn drop_stale(&mut self) -> Result<Option<String>> {
        // The digest of the weights takes a moment.
        if self.thresholds.is_empty() && self.mask_head.is_none() {
            return Ok(None);
        }
        let now = self.computed_with()?;
        let (kept, note) = threshold::still_valid(std::mem::take(&mut self.thresholds), &now);
        self.thresholds = kept;
        let stale = self.mask_head.take_if(|head| !head.is_for(&now));
        let of_head =
            stale.map(|_| "the mask head is dropped, it was fitted to other weights or preprocessing".to_owned());
        let notes: Vec<String> = note.into_iter().chain(of_head).collect();
        Ok((!notes.is_empty()).then(|| notes.join("; ")))
    }

    /// Returns the network, to run on `machine`. Its parameters stay where they are: [`Self::inference`] and training
    /// copy them to a GPU. A network of [`Arch::Onnx`] stays on the CPU.
    pub fn on(self, machine: &Machine) -> Self {
        match self.foreign {
            None => Self { machine: machine.clone(), ..self },
            Some(_) => self,
        }
    }

    /// Number of weights.
    pub fn num_parameters(&self) -> usize {
        self.foreign.as_ref().map_or_else(|| self.params.num_parameters(), |network| network.num_parameters())
    }

    /// Machine that the network runs on.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Preprocessing that the network expects of its input.
    pub fn preprocessing(&self) -> &Preprocessing {
        &self.preprocessing
    }

    /// Calibrated match thresholds; empty without calibration.
    pub fn thresholds(&self) -> &[Threshold] {
        &self.thresholds
    }

    /// What says whether a face wears a mask, if it was fitted.
    pub fn mask_head(&self) -> Option<&MaskHead> {
        self.mask_head.as_ref()
    }

    /// The convolutions of 8-bit integers, if the network is quantised ([`Self::quantise`]). On the CPU it computes
    /// with them; elsewhere, and as candle's module, with the numbers that the integers stand for.
    pub fn quantised(&self) -> Option<&Quantised> {
        self.quantised.as_deref()
    }

    /// The network's operations; none of a network of [`Arch::Onnx`].
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The parameters; none of a network of [`Arch::Onnx`].
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Freezes layers or stages: [`Params::freeze`].
    ///
    /// # Errors
    /// When no trained parameter is under one of the prefixes.
    pub fn freeze(&mut self, prefixes: &[String]) -> Result<()> {
        prefixes.iter().try_for_each(|prefix| self.params.freeze(prefix).map(drop))
    }

    /// Settings that the network was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
}

impl ModuleT for Model {
    /// Returns the embeddings `(N, embedding_size)`, not normalised, of images `(N, 3, S, S)`, preprocessed as
    /// [`Self::preprocessing`] says, of the parameters' dtype. Runs the network as candle's module, one operation after
    /// the other, for differentiation and for tests; [`Self::inference`] is faster.
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        inference::checked(x, self.config.input_size)?;
        if let Some(network) = &self.foreign {
            return network.run(x);
        }
        self.graph.forward_t(&self.params, x, train)
    }
}

/// `channels * width`, at least 1.
fn scaled(channels: usize, width: f64) -> usize {
    ((channels as f64 * width).round() as usize).max(1)
}
