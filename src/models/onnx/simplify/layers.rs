//! Layers that exporters write in several ways: linear layers, paddings, activations.

use candle_core::{Device, Tensor};

use super::Result;
use super::constants::{integers, numbers, scalar};
use super::producers;
use crate::weights::{OnnxAttribute, OnnxModel, OnnxNode};

/// Pads that a convolution of ours could have. Less would cut its input.
const PADS: std::ops::RangeInclusive<i64> = 0..=16;

/// Turns `Add(MatMul(x, W), b)`, `Add(Gemm(x, W), b)` and `MatMul(x, W)` into a `Gemm`.
pub(super) fn linear_layers(onnx: &mut OnnxModel) -> Result<()> {
    let mut merged = Vec::new();
    {
        let producers = producers(onnx)?;
        for (i, node) in onnx.nodes.iter().enumerate().filter(|(_, node)| node.op_type == "Add") {
            let [a, b] = &node.inputs[..] else { continue };
            for (product, bias) in [(a, b), (b, a)] {
                let Some(&before) = producers.get(product.as_str()) else { continue };
                let layer = &onnx.nodes[before];
                let is_layer = match layer.op_type.as_str() {
                    "MatMul" => true,
                    "Gemm" => layer.inputs.get(2).is_none_or(String::is_empty),
                    _ => false,
                };
                let is_vector = |t: &&Tensor| matches!(t.dims(), [_] | [1, _]);
                if is_layer && onnx.initializers.get(bias).filter(is_vector).is_some() {
                    merged.push((i, before, bias.clone()));
                    break;
                }
            }
        }
    }
    for (add, layer, bias) in merged {
        let mut node = onnx.nodes[layer].clone();
        node.inputs.truncate(2);
        node.inputs.push(bias);
        node.outputs.clone_from(&onnx.nodes[add].outputs);
        onnx.nodes[add] = as_gemm(node);
    }
    for node in &mut onnx.nodes {
        let is_weight = node.inputs.get(1).and_then(|name| onnx.initializers.get(name)).is_some_and(|t| t.rank() == 2);
        if node.op_type == "MatMul" && is_weight {
            *node = as_gemm(std::mem::take(node));
        }
    }
    Ok(())
}

fn as_gemm(mut node: OnnxNode) -> OnnxNode {
    "Gemm".clone_into(&mut node.op_type);
    // Without a bias its factor had no effect.
    node.attributes.remove("beta");
    node
}

/// Moves the padding of `Pad` operations and of `auto_pad` into the attribute `pads` of convolutions.
pub(super) fn paddings(onnx: &mut OnnxModel) -> Result<()> {
    let mut padded = Vec::new();
    {
        let producers = producers(onnx)?;
        for (i, node) in onnx.nodes.iter().enumerate().filter(|(_, node)| node.op_type == "Conv") {
            let mut pads = own_pads(onnx, node)?;
            let before = node.inputs.first().and_then(|input| producers.get(input.as_str())).map(|&at| &onnx.nodes[at]);
            let mut input = None;
            if let Some(pad) = before.filter(|node| node.op_type == "Pad") {
                let added = pads_of(onnx, pad)?;
                for (own, added) in pads.iter_mut().zip(added) {
                    *own += added;
                }
                input = pad.inputs.first().cloned();
            }
            padded.push((i, pads, input));
        }
    }
    for (i, pads, input) in padded {
        let node = &mut onnx.nodes[i];
        node.attributes.remove("auto_pad");
        node.attributes.insert("pads".to_owned(), OnnxAttribute::Ints(pads.to_vec()));
        if let (Some(input), Some(first)) = (input, node.inputs.first_mut()) {
            *first = input;
        }
    }
    Ok(())
}

/// The padding of a convolution: top, left, bottom, right.
fn own_pads(onnx: &OnnxModel, node: &OnnxNode) -> Result<[i64; 4]> {
    let name = node.outputs.first().map_or("a convolution", String::as_str);
    let mode = node.text("auto_pad", "NOTSET");
    if matches!(mode, "NOTSET" | "") {
        let pads = node.ints("pads", 0, 4);
        return match <[i64; 4]>::try_from(pads) {
            Ok(pads) if pads.iter().all(|pad| PADS.contains(pad)) => Ok(pads),
            Ok(pads) => Err(format!("{name}: expected pads of {PADS:?}, found {pads:?}")),
            Err(pads) => Err(format!("{name}: expected four pads, found {}", pads.len())),
        };
    }
    if mode == "VALID" {
        return Ok([0; 4]);
    }
    let kernel = node.inputs.get(1).and_then(|weight| onnx.initializers.get(weight)).map(|w| w.dims().to_vec());
    let side = match kernel.as_deref() {
        Some([.., h, w]) if h == w => *h as i64,
        _ => return Err(format!("{name}: expected a square filter for auto_pad {mode}")),
    };
    let stride = node.ints("strides", 1, 2);
    match (side % 2, stride.iter().all(|&stride| stride == 1)) {
        (1, true) => Ok([side / 2; 4]),
        _ if side == 1 => Ok([0; 4]),
        _ => Err(format!("{name}: pads one side more than the other (auto_pad {mode}), ours pad both alike")),
    }
}

/// What a `Pad` adds to the two last axes: top, left, bottom, right.
fn pads_of(onnx: &OnnxModel, pad: &OnnxNode) -> Result<[i64; 4]> {
    let name = pad.outputs.first().map_or("a padding", String::as_str);
    let wrong = |what: &str| format!("{name}: {what}");
    if pad.text("mode", "constant") != "constant" {
        return Err(wrong("expected padding by zeros, found another mode"));
    }
    let value = match pad.inputs.get(2).filter(|name| !name.is_empty()) {
        Some(name) => scalar(onnx, name),
        None => Some(f64::from(pad.float("value", 0.0))),
    };
    if value != Some(0.0) {
        return Err(wrong("expected padding by zeros, found another value"));
    }
    let pads = numbers(onnx, pad, 1, "pads").or_else(|| numbers(onnx, pad, 9, "paddings"));
    let pads = pads.ok_or_else(|| wrong("expected constant pads"))?;
    let axes = match pad.inputs.get(3).filter(|name| !name.is_empty()) {
        Some(name) => integers(onnx, name).ok_or_else(|| wrong("expected constant axes"))?,
        None => (0..4).collect(),
    };
    let num = axes.len();
    if pads.len() != 2 * num {
        return Err(wrong("expected two pads for each axis"));
    }
    if let Some(pad) = pads.iter().find(|pad| !PADS.contains(pad)) {
        return Err(wrong(&format!("expected pads of {PADS:?}, found {pad}")));
    }
    let mut result = [0; 4];
    for (i, axis) in axes.into_iter().enumerate() {
        let [begin, end] = [pads[i], pads[num + i]];
        match if axis < 0 { axis + 4 } else { axis } {
            2 => (result[0], result[2]) = (begin, end),
            3 => (result[1], result[3]) = (begin, end),
            _ if (begin, end) == (0, 0) => {}
            _ => return Err(wrong("expected pads of height and width alone")),
        }
    }
    Ok(result)
}

/// Turns `LeakyRelu` into `PRelu` with one slope.
pub(super) fn leaky_relus(onnx: &mut OnnxModel) -> Result<()> {
    for i in 0..onnx.nodes.len() {
        if onnx.nodes[i].op_type != "LeakyRelu" {
            continue;
        }
        let slope = onnx.nodes[i].float("alpha", 0.01);
        let name = format!("{}.slope", onnx.nodes[i].outputs.first().map_or("leaky", String::as_str));
        let tensor = Tensor::full(slope, (1, 1, 1), &Device::Cpu).map_err(|e| e.to_string())?;
        onnx.initializers.insert(name.clone(), tensor);
        let node = &mut onnx.nodes[i];
        "PRelu".clone_into(&mut node.op_type);
        node.inputs.push(name);
    }
    Ok(())
}
