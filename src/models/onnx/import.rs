//! Import of an ONNX graph as one of our networks.

use candle_core::{Device, Tensor};

use super::file::File;
use super::simplify::simplify;
use super::{Result, matching};
use crate::models::{Arch, Found, Layout, Model, ModelConfig};
use crate::nn::Op;
use crate::weights::{OnnxModel, OnnxNode};

/// Recognises one of our networks in `onnx` and returns its weights. The graph may be as insightface exports it: batch
/// norms may be folded into convolutions, and the normalisation of the input may be in the graph. It may also be as
/// PyTorch's exporters and common tools write it; what they write in several ways is first made one (`simplify`).
///
/// A folded batch norm becomes one that only adds the bias: weight 1, mean 0, and a variance that scales by exactly 1
/// in f32.
///
/// # Errors
/// Says where the graph differs from the network that it is closest to.
pub fn from_onnx(onnx: &OnnxModel) -> Result<Found> {
    let mut simplified = onnx.clone();
    let mut notes = simplify(&mut simplified)?;
    let onnx = &simplified;
    let file = File::new(onnx)?;
    let config = guess(&file)?;
    let model = Model::outline(&config).map_err(|e| e.to_string())?;
    let graph = model.graph().in_evaluation();
    let [output] = onnx.outputs.as_slice() else {
        return Err(format!("expected one output, found {}", onnx.outputs.len()));
    };
    let found = matching::matched(&file, &graph, model.params().shapes(), &output.name)
        .map_err(|what| format!("is closest to {}, but differs from it: {what}", config.arch.name()))?;
    if found.num_folded > 0 {
        notes.push(format!("{} batch norms are folded into the layers before them", found.num_folded));
    }
    if found.num_pooled > 0 {
        notes.push(format!(
            "{} shortcuts take every second value: filled with the identity. In evaluation the result is the same; \
             training with batch statistics would normalise them",
            found.num_pooled
        ));
    }
    let mut tensors = found.tensors;
    for node in graph.nodes().iter().filter(|n| n.op == Op::BatchNorm) {
        let zero = Tensor::new(0i64, &Device::Cpu).map_err(|e| e.to_string())?;
        tensors.insert(node.param("num_batches_tracked"), zero);
    }
    Ok(Found { layout: Layout::Graph, config, tensors, preprocessing: found.preprocessing, notes })
}

/// Returns the only network that the graph can be, by its operators and sizes.
fn guess(file: &File) -> Result<ModelConfig> {
    let onnx = file.onnx;
    let weight = |node: &'_ OnnxNode| node.inputs.get(1).and_then(|name| file.weight(name).ok());
    let convs: Vec<Vec<usize>> = onnx
        .nodes
        .iter()
        .filter(|n| n.op_type == "Conv")
        .filter_map(|n| Some(weight(n)?.dims().to_vec()))
        .filter(|dims| dims.len() == 4)
        .collect();
    let Some(first) = convs.first() else { return Err("expected convolutions, found none".into()) };
    let used = onnx.inputs.iter().find(|input| onnx.nodes.iter().any(|node| node.inputs.contains(&input.name)));
    let input = used.map(|i| i.dims.as_slice()).unwrap_or_default();
    let input_size = match input {
        [_, _, Some(h), Some(w)] if h == w => usize::try_from(*h).map_err(|e| e.to_string())?,
        // Channels last, as networks from TensorFlow take them.
        [_, Some(h), Some(w), Some(3)] if h == w => usize::try_from(*h).map_err(|e| e.to_string())?,
        [_, _, None, None] | [] => 112,
        other => return Err(format!("expected square images (N, 3, S, S) as input, found {other:?}")),
    };
    let last = onnx.nodes.iter().rev().find(|n| matches!(n.op_type.as_str(), "Gemm" | "MatMul" | "BatchNormalization"));
    let embedding_size = last.and_then(|n| match (weight(n)?.dims(), n.int("transB", 0)) {
        ([size], _) | ([size, _], 1) | ([_, size], _) => Some(*size),
        _ => None,
    });
    let Some(embedding_size) = embedding_size else {
        return Err("expected a linear layer or batch norm at the end, found none".into());
    };
    let is_mobile = onnx.nodes.iter().any(|node| node.op_type == "Conv" && node.int("group", 1) > 1);
    let squeeze_excitation = onnx.nodes.iter().any(|n| n.op_type == "Sigmoid");
    let arch = if is_mobile {
        // The last convolution is the global depthwise one, or the one that reduces the channels.
        match convs.last().is_some_and(|dims| dims[1] == 1) {
            true => Arch::MbfGdc,
            false => Arch::Mbf,
        }
    } else {
        // A sum with a constant is a normalisation.
        let is_sum = |node: &&OnnxNode| {
            node.op_type == "Add" && !node.inputs.iter().any(|name| onnx.initializers.contains_key(name))
        };
        let blocks = onnx.nodes.iter().filter(is_sum).count();
        let known = [(8, Arch::R18), (16, Arch::R34), (24, Arch::R50), (49, Arch::R100), (98, Arch::R200)];
        match known.iter().find(|(adds, _)| *adds == blocks) {
            Some((_, arch)) => *arch,
            None => {
                return Err(format!(
                    "expected 8, 16, 24, 49 or 98 residual blocks (IResNet) or depthwise convolutions \
                     (MobileFaceNet), found {blocks} blocks and {} convolutions",
                    convs.len()
                ));
            }
        }
    };
    let base = if is_mobile { 128.0 } else { 64.0 };
    let width = first[0] as f64 / base;
    let config = ModelConfig { arch, embedding_size, width, input_size, dropout: 0.0, squeeze_excitation };
    config.validate().map_err(|e| e.to_string())?;
    Ok(config)
}
