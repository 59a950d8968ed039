//! Quantised convolutions in ONNX graphs: `QuantizeLinear` and `DequantizeLinear` before a convolution's input, and
//! `DequantizeLinear` before its weight. Every runtime can compute them, and some do with 8-bit integers.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::Result;
use crate::models::int8::{dequantised, integers, weight_of};
use crate::nn::{Quantisation, QuantisedConv};
use crate::ops::conv::int8::Affine;
use crate::weights::{OnnxAttribute, OnnxModel, OnnxNode};

/// The tensors of a quantised layer, by their last names: the weight's integers and scales, and the input's scale and
/// zero point.
const WEIGHT: &str = "weight";
const WEIGHT_SCALE: &str = "weight_scale";
const INPUT_SCALE: &str = "input_scale";
const INPUT_ZERO: &str = "input_zero_point";

/// Puts quantised layers into a graph that has their weights, by the layers' names, as convolutions of f32.
///
/// # Errors
/// When memory cannot be allocated.
pub(super) fn put(onnx: &mut OnnxModel, layers: &Quantisation) -> candle_core::Result<()> {
    let mut nodes = Vec::new();
    for mut node in std::mem::take(&mut onnx.nodes) {
        let layer = node.inputs.get(1).and_then(|weight| weight.strip_suffix(".weight")).map(str::to_owned);
        let layer = layer.filter(|_| node.op_type == "Conv");
        if let Some((path, QuantisedConv { weight, input })) = layer.and_then(|path| layers.get_key_value(&path)) {
            let name = |last: &str| format!("{path}.{last}");
            let device = &Device::Cpu;
            onnx.initializers.extend([
                (name(WEIGHT), integers(weight)?),
                (name(WEIGHT_SCALE), Tensor::new(weight.scales(), device)?),
                (name(INPUT_SCALE), Tensor::new(input.scale, device)?),
                (name(INPUT_ZERO), Tensor::new(input.zero, device)?),
            ]);
            let [quantised, seen, filter] = ["input_quantized", "input_dequantized", "weight_dequantized"].map(name);
            let of_input = [name(INPUT_SCALE), name(INPUT_ZERO)];
            let read = std::mem::replace(&mut node.inputs[0], seen.clone());
            node.inputs[1] = filter.clone();
            let operation = |op_type: &str, inputs: Vec<String>, output: String, axis: Option<i64>| OnnxNode {
                op_type: op_type.into(),
                inputs,
                outputs: vec![output],
                attributes: axis.map(|axis| ("axis".to_owned(), OnnxAttribute::Int(axis))).into_iter().collect(),
            };
            let with = |first: String| [vec![first], of_input.to_vec()].concat();
            nodes.extend([
                operation("QuantizeLinear", with(read), quantised.clone(), None),
                operation("DequantizeLinear", with(quantised), seen, None),
                operation("DequantizeLinear", vec![name(WEIGHT), name(WEIGHT_SCALE)], filter, Some(0)),
            ]);
        }
        nodes.push(node);
    }
    onnx.nodes = nodes;
    Ok(())
}

/// Takes quantised layers out of a graph as [`put`] writes it, which then computes in f32 with the numbers that their
/// weights stand for; returns them by name. A graph without any stays as it is.
///
/// # Errors
/// When quantisation stands elsewhere, or is of another kind.
pub(in crate::models) fn take(onnx: &mut OnnxModel) -> Result<Quantisation> {
    let is_quantisation = |node: &OnnxNode| ["QuantizeLinear", "DequantizeLinear"].contains(&node.op_type.as_str());
    if !onnx.nodes.iter().any(is_quantisation) {
        return Ok(Quantisation::new());
    }
    let (moved, mut nodes): (Vec<_>, Vec<_>) = onnx.nodes.iter().cloned().partition(is_quantisation);
    let by_output: BTreeMap<&str, &OnnxNode> =
        moved.iter().filter_map(|node| Some((node.outputs.first()?.as_str(), node))).collect();
    let expected = "expected quantised convolutions as this program writes them";
    let (mut layers, mut used) = (Quantisation::new(), 0);
    for node in &mut nodes {
        let of_weight = node.inputs.get(1).and_then(|name| by_output.get(name.as_str())).copied();
        let seen = node.inputs.first().and_then(|name| by_output.get(name.as_str())).copied();
        let (Some(of_weight), Some(seen), "Conv") = (of_weight, seen, node.op_type.as_str()) else { continue };
        let path = of_weight.inputs.first().and_then(|name| name.strip_suffix(".weight"));
        let path = path.ok_or_else(|| format!("{expected}, found one without a name"))?;
        let wrong = |what: String| format!("quantised layer {path}: {what}");
        let input = seen.inputs.first().and_then(|name| by_output.get(name.as_str())).copied();
        let input = input.filter(|input| input.inputs.get(1..) == seen.inputs.get(1..) && input.inputs.len() == 3);
        let input = input.ok_or_else(|| wrong(format!("{expected}, found another input")))?;
        let axis = of_weight.attributes.get("axis");
        if of_weight.inputs.len() != 2 || axis != Some(&OnnxAttribute::Int(0)) {
            return Err(wrong(format!("{expected}, found another weight")));
        }
        let tensor = |name: &str, dtype: DType| match onnx.initializers.get(name) {
            Some(tensor) if tensor.dtype() == dtype => Ok(tensor),
            _ => candle_core::bail!("{expected}, found no constant {name} of the right type"),
        };
        let read = || -> candle_core::Result<(QuantisedConv, Tensor)> {
            let [values, scales] =
                [(0, DType::I16), (1, DType::F32)].map(|(i, dtype)| tensor(&of_weight.inputs[i], dtype));
            let [scale, zero] = [(1, DType::F32), (2, DType::U8)].map(|(i, dtype)| tensor(&input.inputs[i], dtype));
            let weight = weight_of(values?, scales?)?;
            let (scale, zero) = (scale?.flatten_all()?.get(0)?, zero?.flatten_all()?.get(0)?);
            let (filter, input) = (dequantised(&weight)?, Affine::new(scale.to_scalar()?, zero.to_scalar()?)?);
            Ok((QuantisedConv { weight, input }, filter))
        };
        let (layer, filter) = read().map_err(|e| wrong(e.to_string()))?;
        node.inputs[0].clone_from(&input.inputs[0]);
        node.inputs[1] = format!("{path}.weight");
        onnx.initializers.insert(format!("{path}.weight"), filter);
        used += 3;
        if layers.insert(path.to_owned(), layer).is_some() {
            return Err(wrong(format!("{expected}, found its weight twice")));
        }
    }
    if used != moved.len() {
        return Err(format!("{expected}, found {} of {} operations elsewhere", moved.len() - used, moved.len()));
    }
    for path in layers.keys() {
        for last in [WEIGHT_SCALE, INPUT_SCALE, INPUT_ZERO] {
            onnx.initializers.remove(&format!("{path}.{last}"));
        }
    }
    onnx.nodes = nodes;
    Ok(layers)
}
