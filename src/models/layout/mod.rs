//! Recognises which of our networks a checkpoint holds and renames its tensors to our names.
//!
//! Our names are those of insightface's arcface_torch. The other supported layouts name the same computation
//! differently; checkpoints of networks that compute something else are refused.

mod cvlface;
mod iresnet;
mod mobilefacenet;
mod mxnet;
mod prefix;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Result, Tensor, bail};

pub(super) use self::cvlface::{identity_conv, identity_norm};
use super::Found;

type Tensors = BTreeMap<String, Tensor>;

/// How a network was recognised: by metadata, by its graph, or by the naming scheme of its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// Our own metadata names the network.
    Metadata,
    /// An ONNX graph that computes what the network computes.
    Graph,
    /// An ONNX graph that is none of our networks and runs as it is.
    Foreign,
    /// arcface_torch's IResNet (deepinsight/insightface, backbones/iresnet.py): ours.
    IResNet,
    /// arcface_torch's MobileFaceNet (backbones/mobilefacenet.py), or ours with its other head.
    MobileFaceNet,
    /// CVLface's and AdaFace's IR and IR-SE networks (mk-minchul/CVLface, models/iresnet/model.py).
    CvlFace,
    /// insightface's MXNet networks LResNet-E-IR (symbols/fresnet.py with unit version 3 and output E).
    MxNet,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Metadata => "maskinv's metadata",
            Self::Graph => "the graph",
            Self::Foreign => "its input and output",
            Self::IResNet => "insightface's IResNet",
            Self::MobileFaceNet => "insightface's MobileFaceNet",
            Self::CvlFace => "CVLface's and AdaFace's IR",
            Self::MxNet => "insightface's MXNet LResNet-E-IR",
        })
    }
}

impl Layout {
    /// Layouts that are recognised by tensor names.
    const NAMED: [Self; 4] = [Self::IResNet, Self::MobileFaceNet, Self::CvlFace, Self::MxNet];

    /// Names that occur together in no other layout.
    fn markers(self) -> &'static [&'static str] {
        match self {
            Self::IResNet => &["conv1.weight", "layer1.0.bn1.weight", "layer1.0.prelu.weight"],
            Self::MobileFaceNet => &["layers.0.layers.0.weight", "conv_sep.layers.0.weight"],
            Self::CvlFace => &["input_layer.0.weight", "body.0.res_layer.0.weight"],
            Self::MxNet => &["conv0_weight", "stage1_unit1_conv1_weight"],
            Self::Metadata | Self::Graph | Self::Foreign => &[],
        }
    }

    fn in_error(self, e: candle_core::Error) -> candle_core::Error {
        candle_core::Error::msg(format!("{self}: {e}"))
    }

    fn of(tensors: &Tensors) -> Option<Self> {
        Self::NAMED.into_iter().find(|layout| layout.markers().iter().all(|name| tensors.contains_key(*name)))
    }
}

/// Recognises the network that `tensors`, on the CPU, belong to and returns them under our names.
///
/// Embeddings are those of the published code, before any normalisation of their length. The tensors do not show the
/// channel order that a network was trained with; the caller has to know it.
///
/// # Errors
/// When the layout or the architecture is unknown, or only some of the tensors have the prefix of a wrapper. A missing
/// or unexpected name may only be reported by [`Found::build`].
pub fn recognise(tensors: BTreeMap<String, Tensor>) -> Result<Found> {
    let mut notes = Vec::new();
    let tensors = widen(prefix::strip(tensors, &mut notes)?, &mut notes)?;
    let Some(layout) = Layout::of(&tensors) else { bail!("{}", unknown(&tensors)) };
    let with_layout = |e| layout.in_error(e);
    let has_counters = tensors.keys().any(|name| name.ends_with(COUNTER));
    let mut tensors = match layout {
        Layout::CvlFace => cvlface::rename(tensors, &mut notes).map_err(with_layout)?,
        Layout::MxNet => mxnet::rename(tensors, &mut notes).map_err(with_layout)?,
        _ => tensors,
    };
    if !has_counters {
        fill_counters(&mut tensors)?;
        notes.push(format!("no {COUNTER} in the file: set to 0"));
    }
    let config = match layout {
        Layout::MobileFaceNet => mobilefacenet::config(&tensors),
        _ => iresnet::config(&tensors),
    };
    let config = config.map_err(with_layout)?;
    let preprocessing = (layout == Layout::MxNet).then(mxnet::preprocessing);
    Ok(Found { config, tensors, layout, preprocessing, notes })
}

/// Converts half precision to f32; refuses tensors that are not floating-point.
fn widen(tensors: Tensors, notes: &mut Vec<String>) -> Result<Tensors> {
    let mut count = 0;
    let convert = |(name, tensor): (String, Tensor)| {
        let tensor = match tensor.dtype() {
            // Of shape () in PyTorch, (1) in files that went through other tools.
            _ if name.ends_with(COUNTER) && tensor.elem_count() == 1 => tensor.to_dtype(DType::I64)?.reshape(())?,
            DType::F16 | DType::BF16 => {
                count += 1;
                tensor.to_dtype(DType::F32)?
            }
            DType::F32 | DType::F64 => tensor,
            other => bail!("tensor {name}: expected floating-point numbers, found {other:?}"),
        };
        Ok((name, tensor))
    };
    let tensors = tensors.into_iter().map(convert).collect::<Result<_>>()?;
    if count > 0 {
        notes.push(format!("{count} tensors in half precision: converted to f32"));
    }
    Ok(tensors)
}

/// Counter of batches in PyTorch's batch norm; files from before PyTorch 0.4.1 do not have it.
pub(super) const COUNTER: &str = "num_batches_tracked";

/// Adds counters of 0 for all batch norms of a file without counters. If a file has some of them, a missing one is an
/// error instead.
fn fill_counters(tensors: &mut Tensors) -> Result<()> {
    let norms: Vec<String> = tensors.keys().filter_map(|n| n.strip_suffix("running_var")).map(str::to_owned).collect();
    for norm in norms {
        tensors.insert(norm + COUNTER, Tensor::new(0i64, &Device::Cpu)?);
    }
    Ok(())
}

/// Common layouts that cannot be loaded, by a tensor name that identifies them.
const REFUSED: &[(&str, &str)] = &[
    ("gdconv.depthwise.weight", "foamliu's MobileFaceNet (its blocks and head differ from insightface's)"),
    ("patch_embed.proj.weight", "a vision transformer"),
    ("conv2d_1a.conv.weight", "facenet-pytorch's Inception-ResNet"),
    ("conv_1_conv2d_weight", "insightface's MXNet MobileFaceNet"),
    ("layer1.0.conv1.weight", "a ResNet without insightface's pre-activation blocks"),
];

fn unknown(tensors: &Tensors) -> String {
    let known = Layout::NAMED.map(|layout| layout.to_string()).join(", ");
    let names: Vec<&str> = tensors.keys().map(String::as_str).take(5).collect();
    let what = match REFUSED.iter().find(|(marker, _)| tensors.contains_key(*marker)) {
        Some((_, what)) => format!("this is {what}, which cannot be loaded"),
        None => "the layout of the tensors is unknown".to_owned(),
    };
    format!("{what}; supported are {known}; found {} tensors: {} ..", tensors.len(), names.join(", "))
}

/// Returns the shape of `name`.
fn dims<'a>(tensors: &'a Tensors, name: &str) -> Result<&'a [usize]> {
    match tensors.get(name) {
        Some(tensor) => Ok(tensor.dims()),
        None => bail!("no tensor {name}"),
    }
}

/// Returns the number of blocks numbered right after `prefix`, from 0 without a gap.
fn num_blocks(tensors: &Tensors, prefix: &str) -> Result<usize> {
    let after = tensors.keys().filter_map(|name| name.strip_prefix(prefix));
    let numbers: BTreeSet<usize> = after.filter_map(|rest| rest.split('.').next()?.parse().ok()).collect();
    match numbers.last() {
        Some(&last) if last >= numbers.len() => bail!("{prefix}: expected blocks from 0 to {last}, found {numbers:?}"),
        _ => Ok(numbers.len()),
    }
}

/// Returns the side of the image that leaves a square map of `channels` channels with `inputs` values after four
/// halvings.
fn input_size(name: &str, inputs: usize, channels: usize) -> Result<usize> {
    let side = (inputs / channels).isqrt();
    if side == 0 || side * side * channels != inputs {
        bail!("{name}: {inputs} inputs are not {channels} channels of a square map");
    }
    Ok(16 * side)
}

/// Inserts `tensor` as `name`, which must be new.
fn insert(tensors: &mut Tensors, name: String, tensor: Tensor) -> Result<()> {
    if tensors.contains_key(&name) {
        bail!("two tensors are {name}");
    }
    tensors.insert(name, tensor);
    Ok(())
}
