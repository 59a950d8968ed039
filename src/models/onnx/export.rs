//! Export of one of our networks as an ONNX graph.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor};

use super::qdq;
use crate::models::{Model, ModelConfig};
use crate::nn::{Graph, Node, Op};
use crate::ops::batch_norm::EPS;
use crate::ops::pool::Window;
use crate::weights::{OnnxAttribute, OnnxModel, OnnxNode, OnnxValue};

/// Operator set: batch norm has its final form since 15, and older runtimes still support 17.
const OPSET: i64 = 17;
/// Names of the graph's input and output.
const INPUT: &str = "input";
const OUTPUT: &str = "embedding";

/// Returns the network as an ONNX graph from `input`, `(batch, 3, S, S)`, to `embedding`, `(batch, E)`, for any batch
/// size. The input is preprocessed as for [`Model`]; the embedding is not normalised.
///
/// Weights keep their names and values; those of a quantised network are 8-bit integers between `QuantizeLinear` and
/// `DequantizeLinear`. The counters of batch norm, which only training uses, are left out.
///
/// # Errors
/// When the network is of another architecture, or memory for the copies cannot be allocated.
pub fn to_onnx(model: &Model) -> Result<OnnxModel> {
    model.known()?;
    let ModelConfig { input_size, embedding_size, .. } = *model.config();
    let mut onnx = of_graph(&model.graph().in_evaluation(), &model.params().state()?, input_size, embedding_size)?;
    if let Some(quantised) = model.quantised() {
        qdq::put(&mut onnx, &quantised.layers)?;
    }
    Ok(onnx)
}

/// Returns a graph of evaluation, for images of `side` pixels, with weights by name.
pub(super) fn of_graph(
    graph: &Graph,
    state: &BTreeMap<String, Tensor>,
    side: usize,
    embedding_size: usize,
) -> Result<OnnxModel> {
    let nodes = graph.nodes();
    let name = |id: usize| match id {
        0 => INPUT.to_owned(),
        id if id + 1 == nodes.len() => OUTPUT.to_owned(),
        id => format!("x{id}"),
    };
    let mut initializers = BTreeMap::new();
    let mut written = Vec::new();
    for (id, node) in nodes.iter().enumerate().skip(1) {
        let mut inputs: Vec<String> = node.inputs.iter().map(|&i| name(i)).collect();
        for (param, tensor) in weights(node, state)? {
            inputs.push(param.clone());
            initializers.insert(param, tensor);
        }
        if let Op::Upsample { factor } = node.op {
            let (scales, factor) = (format!("{}.scales", name(id)), factor as f32);
            // The second input, a region of interest, is left out.
            inputs.extend([String::new(), scales.clone()]);
            initializers.insert(scales, Tensor::new(&[1.0, 1.0, factor, factor], &Device::Cpu)?);
        }
        let (op_type, attributes) = operator(node, state);
        let attributes = attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        written.push(OnnxNode { op_type: op_type.into(), inputs, outputs: vec![name(id)], attributes });
    }
    let (size, dim) = (side as i64, embedding_size as i64);
    Ok(OnnxModel {
        opset: OPSET,
        nodes: written,
        initializers,
        inputs: vec![OnnxValue { name: INPUT.into(), dims: vec![None, Some(3), Some(size), Some(size)] }],
        outputs: vec![OnnxValue { name: OUTPUT.into(), dims: vec![None, Some(dim)] }],
        ..OnnxModel::default()
    })
}

/// Returns the node's weights in the order and shapes of the operator's inputs.
fn weights(node: &Node, state: &BTreeMap<String, Tensor>) -> Result<Vec<(String, Tensor)>> {
    let names: &[&str] = match node.op {
        Op::Conv2d(_) | Op::PRelu | Op::Linear { has_bias: false } => &["weight"],
        Op::Linear { has_bias: true } => &["weight", "bias"],
        Op::BatchNorm => &["weight", "bias", "running_mean", "running_var"],
        _ => &[],
    };
    let weight = |name: &&str| {
        let name = node.param(name);
        let tensor = state[&name].clone();
        // Slopes are broadcast against (N, C, H, W) from the right.
        let tensor = if node.op == Op::PRelu { tensor.reshape(((), 1, 1))? } else { tensor };
        Ok((name, tensor))
    };
    names.iter().map(weight).collect()
}

type Attributes = Vec<(&'static str, OnnxAttribute)>;

fn operator(node: &Node, state: &BTreeMap<String, Tensor>) -> (&'static str, Attributes) {
    use OnnxAttribute::{Float, Int, Ints, Text};
    match &node.op {
        Op::Input | Op::Dropout => unreachable!("neither is an operation of evaluation"),
        Op::Conv2d(config) => {
            let kernel = state[&node.param("weight")].dims()[2..].iter().map(|&k| k as i64).collect();
            let (stride, padding) = (config.stride as i64, config.padding as i64);
            let attributes = vec![
                ("kernel_shape", Ints(kernel)),
                ("strides", Ints(vec![stride; 2])),
                ("pads", Ints(vec![padding; 4])),
                ("dilations", Ints(vec![1; 2])),
                ("group", Int(config.groups as i64)),
            ];
            ("Conv", attributes)
        }
        Op::BatchNorm => ("BatchNormalization", vec![("epsilon", Float(EPS as f32))]),
        Op::PRelu => ("PRelu", vec![]),
        Op::Linear { .. } => ("Gemm", vec![("transB", Int(1))]),
        Op::Flatten => ("Flatten", vec![("axis", Int(1))]),
        Op::Add => ("Add", vec![]),
        Op::Mul => ("Mul", vec![]),
        Op::GlobalAveragePool => ("GlobalAveragePool", vec![]),
        Op::MaxPool(Window { size, stride, padding }) => {
            let attributes = vec![
                ("kernel_shape", Ints(vec![*size as i64; 2])),
                ("strides", Ints(vec![*stride as i64; 2])),
                ("pads", Ints(vec![*padding as i64; 4])),
            ];
            ("MaxPool", attributes)
        }
        Op::Upsample { .. } => {
            let text = |value: &str| Text(value.to_owned());
            let attributes = vec![
                ("mode", text("nearest")),
                ("nearest_mode", text("floor")),
                ("coordinate_transformation_mode", text("asymmetric")),
            ];
            ("Resize", attributes)
        }
        Op::Concat => ("Concat", vec![("axis", Int(1))]),
        Op::Relu => ("Relu", vec![]),
        Op::Sigmoid => ("Sigmoid", vec![]),
    }
}
