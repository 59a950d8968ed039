//! Networks quantised to 8-bit integers.

mod quantise;
mod ranges;

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{DType, Device, Result, Tensor, bail};

pub use self::quantise::QuantiseConfig;
pub use self::ranges::Ranges;
use super::{Model, ModelConfig};
use crate::nn::{Op, Quantisation, QuantisedConv};
use crate::ops::conv::int8::{Affine, Int8Conv, Int8Weight};

/// The convolutions of a network that compute with 8-bit integers.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantised {
    /// By path.
    pub layers: Quantisation,
    /// What the ranges of activations were taken from, for people.
    pub calibrated_on: String,
}

impl fmt::Display for Quantised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let num: usize = self.layers.values().map(|layer| layer.weight.values().len()).sum();
        let millions = num as f64 / 1e6;
        write!(f, "{} convolutions with {millions:.2} M weights, ranges of {}", self.layers.len(), self.calibrated_on)
    }
}

impl Quantised {
    /// Returns the network of `config` with these layers and, for all else, the tensors of `state`, in which the
    /// weights of the layers become the numbers that the integers stand for.
    pub(super) fn model(self, config: &ModelConfig, mut state: BTreeMap<String, Tensor>) -> crate::Result<Model> {
        for (path, layer) in &self.layers {
            state.insert(format!("{path}.weight"), dequantised(&layer.weight)?);
        }
        Model::frozen(config, state, &Device::Cpu)?.with_quantised(self)
    }

    /// Takes the layers out of the tensors of a file, and puts the numbers that their weights stand for in their place;
    /// none if there are none.
    ///
    /// # Errors
    /// When a layer lacks a tensor, or one has another shape, type or values.
    pub(super) fn take(tensors: &mut BTreeMap<String, Tensor>) -> Result<Option<Quantisation>> {
        let is_scale = |name: &String| name.strip_suffix(".weight_scale").map(str::to_owned);
        let paths: Vec<String> = tensors.keys().filter_map(is_scale).collect();
        if paths.is_empty() {
            return Ok(None);
        }
        let mut layers = Quantisation::new();
        for path in paths {
            let layer = layer(tensors, &path).map_err(|error| error.context(format!("quantised layer {path}")))?;
            tensors.insert(format!("{path}.weight"), dequantised(&layer.weight)?);
            layers.insert(path, layer);
        }
        Ok(Some(layers))
    }

    /// Puts the layers into the tensors for a file, in the place of their weights.
    ///
    /// # Errors
    /// When memory cannot be allocated.
    pub(super) fn put(&self, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let device = &Device::Cpu;
        for (path, QuantisedConv { weight, input }) in &self.layers {
            tensors.insert(format!("{path}.weight"), integers(weight)?);
            let scales = Tensor::from_slice(weight.scales(), (weight.shape()[0], 1, 1, 1), device)?;
            tensors.insert(format!("{path}.weight_scale"), scales);
            tensors.insert(format!("{path}.input_scale"), Tensor::new(&[input.scale], device)?);
            tensors.insert(format!("{path}.input_zero_point"), Tensor::new(&[input.zero], device)?);
        }
        Ok(())
    }
}

/// Returns the numbers that a weight stands for, f32.
pub(super) fn dequantised(weight: &Int8Weight) -> Result<Tensor> {
    Tensor::from_vec(weight.dequantised(), &weight.shape(), &Device::Cpu)
}

/// Returns the integers of a weight as files hold them: of 16 bits, since candle has none of 8.
pub(super) fn integers(weight: &Int8Weight) -> Result<Tensor> {
    let values: Vec<i16> = weight.values().iter().map(|value| i16::from(*value)).collect();
    Tensor::from_vec(values, &weight.shape(), &Device::Cpu)
}

/// Returns the weight of [`integers`] and their scales.
///
/// # Errors
/// When the shapes do not fit, an integer does not fit 8 bits, or a scale is not a positive number.
pub(super) fn weight_of(integers: &Tensor, scales: &Tensor) -> Result<Int8Weight> {
    let shape = integers.dims4()?.into();
    let narrow = |value: i16| match i8::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("weight: expected integers of 8 bits, found {value}"),
    };
    let values = integers.flatten_all()?.to_vec1()?.into_iter().map(narrow).collect::<Result<_>>()?;
    Int8Weight::new(shape, values, scales.flatten_all()?.to_vec1()?)
}

/// Removes and returns a layer from the tensors of a file.
fn layer(tensors: &mut BTreeMap<String, Tensor>, path: &str) -> Result<QuantisedConv> {
    let mut take = |name: &str, dtype: DType| {
        let Some(tensor) = tensors.remove(&format!("{path}.{name}")) else { bail!("missing {name}") };
        if tensor.dtype() != dtype {
            let expected = if dtype == DType::I16 { "8-bit integers" } else { dtype.as_str() };
            bail!("{name}: expected {expected}, found {}", tensor.dtype().as_str());
        }
        Ok(tensor)
    };
    let weight = weight_of(&take("weight", DType::I16)?, &take("weight_scale", DType::F32)?)?;
    let scale = take("input_scale", DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let zero = take("input_zero_point", DType::U8)?.flatten_all()?.to_vec1::<u8>()?;
    let ([scale], [zero]) = (&scale[..], &zero[..]) else {
        bail!("expected one scale and one zero point of the input, found {} and {}", scale.len(), zero.len());
    };
    Ok(QuantisedConv { weight, input: Affine::new(*scale, *zero)? })
}

impl Model {
    /// Returns the network with quantised layers, whose weights are those that it has.
    ///
    /// # Errors
    /// When one is no convolution of the network, or there are no kernels for it.
    pub(super) fn with_quantised(self, quantised: Quantised) -> crate::Result<Self> {
        for (path, layer) in &quantised.layers {
            let found = self.graph().nodes().iter().find(|node| node.path == *path);
            let fits = match found.map(|node| &node.op) {
                Some(Op::Conv2d(config)) => Int8Conv::fits(layer.weight.shape(), *config),
                _ => false,
            };
            if !fits {
                let what = "expected a dense or a depthwise convolution of the network";
                return Err(crate::Error::Config(format!("quantised layer {path}: {what}")));
            }
        }
        Ok(Self { quantised: Some(quantised.into()), ..self })
    }
}

#[cfg(test)]
mod tests;
