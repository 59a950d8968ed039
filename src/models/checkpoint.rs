//! Backbones in files: loading from any supported format, writing as safetensors or ONNX.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::layout::{Layout, recognise};
use super::onnx::{from_onnx, take_quantised, to_onnx};
use super::{Foreign, Found, MaskHead, Model, ModelConfig, Quantised, Threshold};
use crate::error::{Error, Result};
use crate::preprocessing::Preprocessing;
use crate::weights::{
    Bundled, OnnxModel, TensorFile, WeightsFile, looks_like_onnx, parse_safetensors, read_mxnet_params, read_onnx,
    read_pytorch, read_safetensors, write_onnx, write_safetensors,
};

/// File name of the backbone in the folder of a training run.
pub const BACKBONE_FILE: &str = "backbone.safetensors";
/// Metadata key of the architecture, JSON of [`ModelConfig`].
const MODEL_KEY: &str = "maskinv.model";
/// Metadata key of the preprocessing, JSON of [`Preprocessing`].
const PREPROCESSING_KEY: &str = "maskinv.preprocessing";

/// Metadata key of the name of the output that is the embedding, of a network of another architecture.
const OUTPUT_KEY: &str = "maskinv.output";
/// Metadata key of the thresholds, JSON of a list of [`Threshold`].
const THRESHOLDS_KEY: &str = "maskinv.thresholds";
/// Metadata key of the mask head, JSON of [`MaskHead`].
const MASK_HEAD_KEY: &str = "maskinv.mask_head";
/// Metadata key of what the ranges of a quantised network's activations were taken from.
const CALIBRATED_KEY: &str = "maskinv.calibrated_on";

/// What the file of a model may leave open.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadConfig {
    /// Preprocessing of the input, used if the file states none; without both, insightface's is assumed.
    pub preprocessing: Option<Preprocessing>,
    /// Name of the output that is the embedding, for an ONNX network of another architecture than ours
    /// ([`Arch::Onnx`](super::Arch::Onnx)). None takes the one that the file names or the only one that can be it.
    pub output: Option<String>,
}

/// A frozen backbone, with how it was recognised and notes on its file.
#[derive(Debug)]
#[non_exhaustive]
pub struct Loaded {
    /// The backbone.
    pub model: Model,
    /// File that the weights came from.
    pub file: WeightsFile,
    /// Format of the file.
    pub format: Format,
    /// How the network was recognised.
    pub layout: Layout,
    /// Notes for the user about what was recognised, assumed or left out.
    pub notes: Vec<String>,
}

/// A file format of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// Named tensors and metadata.
    Safetensors,
    /// Output of `torch.save`, zip or legacy.
    PyTorch,
    /// MXNet's list of named arrays, `.params`.
    MxNet,
    /// A graph with weights.
    Onnx,
}

impl Format {
    /// Returns the display name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::PyTorch => "PyTorch",
            Self::MxNet => "MXNet params",
            Self::Onnx => "ONNX",
        }
    }

    /// Detects the format by a file's first bytes.
    fn of(path: &Path) -> Result<Self> {
        let mut head = Vec::new();
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        // Up to the end of a tar file's magic number.
        file.take(262).read_to_end(&mut head).map_err(Error::io(path))?;
        if let Some(what) = not_weights(&head) {
            return Err(Error::Format { path: path.to_owned(), offset: 0, what });
        }
        let is_named_onnx = path.extension().is_some_and(|x| x.eq_ignore_ascii_case("onnx"));
        match head.as_slice() {
            // A zip archive, or the pickled magic number of torch before 1.6.
            [b'P', b'K', ..] | [0x80, 0..=5, ..] => Ok(Self::PyTorch),
            // A tar file, PyTorch's oldest form: its reader says how to convert it.
            [.., b'u', b's', b't', b'a', b'r'] => Ok(Self::PyTorch),
            [0x12, 0x01, 0, 0, 0, 0, 0, 0, ..] => Ok(Self::MxNet),
            [_, _, _, _, _, _, _, _, b'{', ..] => Ok(Self::Safetensors),
            head if looks_like_onnx(head) => Ok(Self::Onnx),
            // Writers may put the graph or the producer before the version.
            [0x3a | 0x12 | 0x42, ..] if is_named_onnx => Ok(Self::Onnx),
            head => Err(Error::Format {
                path: path.to_owned(),
                offset: 0,
                what: format!(
                    "expected a checkpoint (safetensors, PyTorch, ONNX or MXNet params), found bytes {:02x?}",
                    &head[..head.len().min(8)]
                ),
            }),
        }
    }
}

/// Says what a file is that is no checkpoint but was downloaded or saved in place of one; none if it may be one.
fn not_weights(head: &[u8]) -> Option<String> {
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let starts = |with: &str| text.len() >= with.len() && text[..with.len()].eq_ignore_ascii_case(with.as_bytes());
    let expected = "expected a checkpoint (safetensors, PyTorch, ONNX or MXNet params), found";
    if head.is_empty() {
        return Some(format!("{expected} an empty file"));
    }
    if starts("version https://git-lfs") {
        let lines = String::from_utf8_lossy(text).into_owned();
        let size = lines.lines().find_map(|line| line.strip_prefix("size ")).map(|size| format!(" of {size} bytes"));
        let of = size.unwrap_or_default();
        return Some(format!(
            "{expected} a Git LFS pointer to a file{of}: run git lfs pull, or download the file itself"
        ));
    }
    let kind = if starts("<!doctype html") || starts("<html") || starts("<head") {
        "a web page: download the file itself"
    } else if starts("<?xml") || starts("<error") {
        "an XML message, such as a server's error"
    } else if starts("{") || starts("[") {
        "JSON"
    } else if text.iter().all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace()) && text.len() > 3 {
        "text"
    } else {
        return None;
    };
    Some(format!("{expected} {kind}"))
}

/// Returns the backbone's file in a folder. The error for a folder of several arms names them.
fn backbone_in(folder: &Path) -> Result<PathBuf> {
    let file = folder.join(BACKBONE_FILE);
    if file.exists() {
        return Ok(file);
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?.flatten().map(|entry| entry.path());
    let mut arms: Vec<String> =
        entries.filter(|path| path.join(BACKBONE_FILE).exists()).map(|path| path.display().to_string()).collect();
    arms.sort();
    let found = if arms.is_empty() { "no such file".to_owned() } else { format!("the arms {}", arms.join(", ")) };
    let what = format!("expected a folder with a {BACKBONE_FILE}, found {found}");
    Err(Error::Io { path: folder.to_owned(), source: std::io::Error::other(what) })
}

/// Loads a backbone, frozen, from a file in any [`Format`], or from the folder of a trained arm.
///
/// The preprocessing is the file's own if it states one, else `preprocessing`, else insightface's is assumed.
///
/// # Errors
/// As [`load_model_with`].
pub fn load_model(path: &Path, preprocessing: Option<&Preprocessing>) -> Result<Loaded> {
    load_model_with(path, &LoadConfig { preprocessing: preprocessing.cloned(), ..LoadConfig::default() })
}

/// Loads a backbone, frozen, from a file in any [`Format`], or from the folder of a trained arm. An ONNX graph that is none
/// of our networks becomes one of [`Arch::Onnx`](super::Arch::Onnx), if the build has the feature `any-onnx`.
///
/// # Errors
/// When the file cannot be read or is corrupt, when no network is recognised in it, and when a weight is missing,
/// unexpected or has another shape.
pub fn load_model_with(path: &Path, config: &LoadConfig) -> Result<Loaded> {
    let path = if path.is_dir() { backbone_in(path)? } else { path.to_owned() };
    let format = Format::of(&path)?;
    let contents = match format {
        Format::Onnx => Contents::Graph(read_onnx(&path)?),
        Format::PyTorch => Contents::Named(read_pytorch(&path)?),
        Format::MxNet => Contents::Named(read_mxnet_params(&path)?),
        Format::Safetensors => Contents::Named(read_safetensors(&path)?),
    };
    build(contents, WeightsFile::Path(path), format, config)
}

/// Loads a backbone that is part of the program, frozen.
///
/// # Errors
/// As [`load_model`].
pub fn load_bundled(bundled: &'static Bundled) -> Result<Loaded> {
    let contents = Contents::Named(parse_safetensors(bundled.bytes(), Path::new(&bundled.name))?);
    build(contents, WeightsFile::Bundled(bundled), Format::Safetensors, &LoadConfig::default())
}

/// The contents of a file of weights.
enum Contents {
    Graph(OnnxModel),
    Named(TensorFile),
}

/// A network in a file, before its weights are in place.
enum Network {
    Known(Box<Found>),
    Foreign(Box<Foreign>),
}

/// Recognises a network in `contents` and builds it.
fn build(contents: Contents, file: WeightsFile, format: Format, config: &LoadConfig) -> Result<Loaded> {
    let wrong = |what: String| Error::Checkpoint { path: file.to_string().into(), what };
    let mut layers = None;
    let ((network, mut notes), metadata) = match contents {
        Contents::Graph(onnx) => {
            let mut plain = onnx.clone();
            let taken = take_quantised(&mut plain);
            let network = match from_onnx(if taken.is_ok() { &plain } else { &onnx }) {
                Ok(_) if config.output.is_some() => {
                    return Err(wrong("a known network has one embedding: expected no name of an output".to_owned()));
                }
                Ok(found) => {
                    layers = taken.ok().filter(|layers| !layers.is_empty());
                    known(found)
                }
                Err(why) => foreign(&file, &onnx, &taken.err().unwrap_or(why), config)?,
            };
            (network, onnx.metadata)
        }
        Contents::Named(mut file) => {
            layers = Quantised::take(&mut file.tensors).map_err(|e| wrong(e.to_string()))?;
            (known(recognise_named(file.tensors, &file.metadata, file.notes).map_err(wrong)?), file.metadata)
        }
    };
    let thresholds = match metadata.get(THRESHOLDS_KEY) {
        Some(text) => from_json::<Vec<Threshold>>(THRESHOLDS_KEY, text).map_err(wrong)?,
        None => Vec::new(),
    };
    thresholds.iter().try_for_each(Threshold::validate).map_err(|e| wrong(e.to_string()))?;
    let layout = match &network {
        Network::Known(found) => found.layout,
        Network::Foreign(_) => Layout::Foreign,
    };
    let in_graph = match &network {
        Network::Known(found) => found.preprocessing.clone(),
        Network::Foreign(_) => None,
    };
    let in_metadata = metadata.get(PREPROCESSING_KEY).map(|text| from_json(PREPROCESSING_KEY, text).map_err(wrong));
    let preprocessing = in_metadata.transpose()?.or(in_graph).or_else(|| config.preprocessing.clone());
    match &preprocessing {
        Some(stated) => stated.validate().map_err(|e| wrong(format!("preprocessing: {e}")))?,
        None => {
            let assumed = Preprocessing::default();
            notes.push(format!("the file does not state its preprocessing: {assumed} is assumed"));
            if layout == Layout::CvlFace {
                notes.push("the original AdaFace files have the same names but expect BGR".to_owned());
            }
        }
    }
    let preprocessing = preprocessing.unwrap_or_default();
    let model = match network {
        Network::Known(found) => {
            let arch = found.config.arch;
            let model = Found { preprocessing: Some(preprocessing), ..*found }.build(DType::F32, &Device::Cpu);
            model.map_err(|e| wrong(format!("{} by {layout}: {e}", arch.name())))?
        }
        Network::Foreign(network) => Model::foreign(*network, preprocessing),
    };
    let calibrated_on = metadata.get(CALIBRATED_KEY).cloned().unwrap_or_else(|| "unknown images".into());
    let model = match layers.map(|layers| Quantised { layers, calibrated_on }) {
        Some(quantised) => model.with_quantised(quantised).map_err(|e| wrong(e.to_string()))?,
        None => model,
    };
    if let Some((num, first)) = model.not_finite()? {
        let what = "have values that are not finite, and so will its embeddings";
        notes.push(format!("{num} of its tensors, {first} the first, {what}"));
    }
    let head = metadata.get(MASK_HEAD_KEY).map(|text| from_json::<MaskHead>(MASK_HEAD_KEY, text).map_err(wrong));
    let head = head.transpose()?;
    head.iter().try_for_each(|head| head.check(&model)).map_err(|e| wrong(e.to_string()))?;
    let mut model = model.with_thresholds(thresholds).with_mask_head(head);
    notes.extend(model.drop_stale()?);
    Ok(Loaded { model, file, format, layout, notes })
}

/// Returns a network of ours, with the notes about it.
fn known(mut found: Found) -> (Network, Vec<String>) {
    let doubles = found.tensors.values().filter(|t| t.dtype() == DType::F64).count();
    if doubles > 0 {
        found.notes.push(format!("{doubles} tensors in double precision: rounded to f32"));
    }
    let notes = std::mem::take(&mut found.notes);
    (Network::Known(Box::new(found)), notes)
}

/// Returns a network of another architecture, with the notes about it; `why` it is none of ours.
fn foreign(file: &WeightsFile, onnx: &OnnxModel, why: &str, config: &LoadConfig) -> Result<(Network, Vec<String>)> {
    let path = file.path().map_or_else(|| Path::new(""), PathBuf::as_path);
    let output = config.output.as_deref().or(onnx.metadata.get(OUTPUT_KEY).map(String::as_str));
    let (network, mut notes) = Foreign::open(path, output).map_err(|e| match e {
        Error::Checkpoint { path, what } => Error::Checkpoint { path, what: format!("{why}; {what}") },
        other => other,
    })?;
    notes.insert(
        0,
        format!("none of the known networks ({why}): run as its graph says, embedding {}", network.output()),
    );
    Ok((Network::Foreign(Box::new(network)), notes))
}

/// Recognises the network in a file of named tensors, by our metadata or else by the tensor names.
fn recognise_named(
    tensors: BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
    mut notes: Vec<String>,
) -> std::result::Result<Found, String> {
    if let Some(text) = metadata.get(MODEL_KEY) {
        let config = from_json::<ModelConfig>(MODEL_KEY, text)?;
        config.validate().map_err(|e| format!("{MODEL_KEY} in the metadata: {e}"))?;
        return Ok(Found { layout: Layout::Metadata, config, tensors, preprocessing: None, notes });
    }
    let mut found = recognise(tensors).map_err(|e| e.to_string())?;
    notes.push(format!("recognised by the names of {}", found.layout));
    notes.append(&mut found.notes);
    Ok(Found { notes, ..found })
}

/// Writes a backbone as safetensors under PyTorch's names, with floats as `dtype` (f32, f16 or bf16) and with its
/// architecture, preprocessing, thresholds and mask head in the metadata. A quantised convolution has four tensors: its
/// `weight`, int8; `weight_scale`, f32, of shape `(C_out, 1, 1, 1)`; `input_scale`, f32, and `input_zero_point`, uint8,
/// of one element each.
///
/// # Errors
/// When the network is of another architecture, a value is too large for `dtype`, or the folder is not writable; an
/// existing file then stays intact.
pub fn save_model(path: &Path, model: &Model, dtype: DType) -> Result<()> {
    model.known()?;
    let convert = |(name, tensor): (String, Tensor)| {
        if !tensor.dtype().is_float() {
            return Ok((name, tensor));
        }
        let largest = |t: &Tensor| t.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let narrow = tensor.to_dtype(dtype)?;
        if dtype != DType::F32 && largest(&tensor)?.is_finite() && !largest(&narrow)?.is_finite() {
            let what = format!("{name}: {} is too large for {}; bf16 can hold it", largest(&tensor)?, dtype.as_str());
            return Err(Error::Checkpoint { path: path.to_owned(), what });
        }
        Ok((name, narrow))
    };
    let mut tensors = model.params().state()?.into_iter().map(convert).collect::<Result<_>>()?;
    if let Some(quantised) = model.quantised() {
        quantised.put(&mut tensors)?;
    }
    let mut metadata = metadata(model)?;
    // Hugging Face's libraries require it.
    metadata.insert("format".to_owned(), "pt".to_owned());
    write_safetensors(path, &tensors, &metadata)
}

/// Writes a backbone as an ONNX graph, f32, for any batch size, with the metadata of [`save_model`]. A network of
/// [`Arch::Onnx`](super::Arch::Onnx) is a copy of its file with that metadata.
///
/// # Errors
/// When the folder is not writable; an existing file then stays intact. When the file of a network of another
/// architecture has changed, or its weights lie in a file beside it and the copy is for another folder.
pub fn export_onnx(path: &Path, model: &Model) -> Result<()> {
    if let Some(network) = &model.foreign {
        return network.write_copy(path, &metadata(model)?);
    }
    write_onnx(path, &OnnxModel { metadata: metadata(model)?, ..to_onnx(model)? })
}

fn metadata(model: &Model) -> Result<BTreeMap<String, String>> {
    let json = |e: serde_json::Error| Error::Config(e.to_string());
    let preprocessing = serde_json::to_string(model.preprocessing()).map_err(json)?;
    let mut metadata = BTreeMap::from([(PREPROCESSING_KEY.to_owned(), preprocessing)]);
    let _ = match &model.foreign {
        Some(network) => metadata.insert(OUTPUT_KEY.to_owned(), network.output().to_owned()),
        None => {
            let config = serde_json::to_string(model.config()).map_err(json)?;
            metadata.insert(MODEL_KEY.to_owned(), config)
        }
    };
    if !model.thresholds().is_empty() {
        metadata.insert(THRESHOLDS_KEY.to_owned(), serde_json::to_string(model.thresholds()).map_err(json)?);
    }
    if let Some(quantised) = model.quantised() {
        metadata.insert(CALIBRATED_KEY.to_owned(), quantised.calibrated_on.clone());
    }
    if let Some(head) = model.mask_head() {
        metadata.insert(MASK_HEAD_KEY.to_owned(), serde_json::to_string(head).map_err(json)?);
    }
    Ok(metadata)
}

fn from_json<T: serde::de::DeserializeOwned>(key: &str, text: &str) -> std::result::Result<T, String> {
    serde_json::from_str(text).map_err(|e| format!("{key} in the metadata: {e}"))
}
