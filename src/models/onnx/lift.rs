//! A graph of convolutions from a file as one of ours, whatever its shape: for networks that are not built by name, such
//! as face detectors. It runs in the engine.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::Result;
use super::file::File;
use super::maps::{nearest_factor, window};
use super::simplify::tidy;
use crate::nn::{Graph, Layer, NodeId, Op, Params};
use crate::ops::batch_norm::{EPS, IDENTITY_VAR};
use crate::ops::conv::ConvConfig;
use crate::weights::{OnnxModel, OnnxNode};

/// Most nodes of a graph.
const MAX_NODES: usize = 10_000;

/// A graph from a file, with its weights.
#[derive(Debug)]
pub(crate) struct Lifted {
    pub graph: Graph,
    pub params: Params,
    /// Names of the outputs in the file, in the order of the graph's.
    pub outputs: Vec<String>,
    /// Channels of the outputs.
    pub channels: Vec<usize>,
}

/// Returns the graph of a file as one of ours. Its outputs are maps `(N, H, W, C)`, whatever the file makes of them by
/// transposing and reshaping. A bias is a batch norm that only adds it, and a ReLU after it a PReLU with slopes of 0:
/// the engine folds both into the convolution.
///
/// # Errors
/// Names the first operation that the engine lacks.
pub(crate) fn lift(onnx: &OnnxModel) -> Result<Lifted> {
    let mut onnx = onnx.clone();
    tidy(&mut onnx)?;
    if onnx.nodes.len() > MAX_NODES {
        return Err(format!("expected at most {MAX_NODES} operations, found {}", onnx.nodes.len()));
    }
    let file = File::new(&onnx)?;
    let mut lifter = Lifter {
        file: &file,
        graph: Graph::new(),
        channels: vec![3],
        tensors: BTreeMap::new(),
        values: BTreeMap::new(),
        num_readers: BTreeMap::new(),
    };
    let outputs = onnx.outputs.iter().map(|output| output.name.as_str());
    let readers = onnx.nodes.iter().filter(|node| node.op_type != "Shape");
    let read = readers.flat_map(|node| node.inputs.iter().map(String::as_str)).chain(outputs);
    read.for_each(|name| *lifter.num_readers.entry(name).or_default() += 1);
    match onnx.inputs.iter().find(|input| lifter.num_readers.contains_key(input.name.as_str())) {
        Some(input) => lifter.values.insert(&input.name, Value { node: Graph::INPUT, is_last: false }),
        None => return Err("expected an input, found none".into()),
    };
    onnx.nodes.iter().try_for_each(|node| lifter.node(node))?;
    let output = |output: &crate::weights::OnnxValue| match lifter.values.get(output.name.as_str()) {
        Some(value) => Ok(value.node),
        None => Err(format!("nothing computes the output {}", output.name)),
    };
    let outputs = onnx.outputs.iter().map(output).collect::<Result<Vec<NodeId>>>()?;
    if outputs.is_empty() {
        return Err("expected an output, found none".into());
    }
    let Lifter { mut graph, channels, tensors, .. } = lifter;
    let of_outputs = outputs.iter().map(|output| channels[*output]).collect();
    graph.set_outputs(outputs);
    let params = params(&graph, &channels, tensors).map_err(|error| error.to_string())?;
    let outputs = onnx.outputs.iter().map(|output| output.name.clone()).collect();
    Ok(Lifted { graph, params, outputs, channels: of_outputs })
}

/// Creates the parameters of the graph's layers from their tensors.
fn params(graph: &Graph, channels: &[usize], tensors: BTreeMap<String, Tensor>) -> candle_core::Result<Params> {
    let shapes: BTreeMap<String, Vec<usize>> =
        tensors.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
    let mut params = Params::given(tensors, DType::F32, &Device::Cpu);
    for (id, node) in graph.nodes().iter().enumerate() {
        let (mut root, c) = (params.root(), channels[id]);
        match node.op {
            Op::Conv2d(config) => {
                let [.., kernel] = shapes[&node.param("weight")][..] else { candle_core::bail!("a filter") };
                let of_channels = [channels[node.inputs[0]], c];
                Layer::conv2d(of_channels, kernel, config, crate::nn::Init::Const(0.0), root.sub(&node.path))?;
            }
            Op::BatchNorm => drop(Layer::batch_norm(c, root.sub(&node.path))?),
            Op::PRelu => drop(Layer::prelu(c, root.sub(&node.path))?),
            _ => {}
        }
    }
    params.finish()?;
    Ok(params)
}

/// A value of the file: the result of a node of ours.
#[derive(Clone, Copy)]
struct Value {
    node: NodeId,
    /// Whether the file has moved the channels last, and perhaps made one axis of rows and columns: what our maps are
    /// in memory anyway. Only such operations and functions of single values may follow.
    is_last: bool,
}

struct Lifter<'a> {
    file: &'a File<'a>,
    graph: Graph,
    /// By node.
    channels: Vec<usize>,
    tensors: BTreeMap<String, Tensor>,
    values: BTreeMap<&'a str, Value>,
    num_readers: BTreeMap<&'a str, usize>,
}

impl<'a> Lifter<'a> {
    fn node(&mut self, node: &'a OnnxNode) -> Result<()> {
        let name = node.outputs.first().map_or("an operation", String::as_str);
        let in_place = |what: String| format!("{name} ({}): {what}", node.op_type);
        let value = self.value(node).map_err(in_place)?;
        if let Some(value) = value {
            self.values.insert(name, value);
        }
        Ok(())
    }

    /// Returns the result of a node; none of a shape that is computed, which only `Reshape` and `Resize` read.
    fn value(&mut self, node: &'a OnnxNode) -> Result<Option<Value>> {
        // What depends on no map is a shape.
        if !node.inputs.iter().any(|input| self.values.contains_key(input.as_str())) || node.op_type == "Shape" {
            return Ok(None);
        }
        let (node_id, is_last) = match node.op_type.as_str() {
            "Conv" => (self.conv(node)?, false),
            "BatchNormalization" => (self.batch_norm(node)?, false),
            "Relu" => self.relu(node)?,
            "PRelu" => (self.prelu(node)?, false),
            "Sigmoid" => {
                let Value { node, is_last } = self.any(node, 0)?;
                (self.push(Op::Sigmoid, &[node], self.channels[node]), is_last)
            }
            "Add" => {
                let (a, b) = (self.map(node, 0)?, self.map(node, 1)?);
                if self.channels[a] != self.channels[b] {
                    return Err(format!("a sum of {} and {} channels", self.channels[a], self.channels[b]));
                }
                (self.push(Op::Add, &[a, b], self.channels[a]), false)
            }
            "MaxPool" => {
                let (x, window) = (self.map(node, 0)?, window(node)?);
                (self.push(Op::MaxPool(window), &[x], self.channels[x]), false)
            }
            "Resize" => {
                let (x, factor) = (self.map(node, 0)?, nearest_factor(self.file, node)?);
                (self.push(Op::Upsample { factor }, &[x], self.channels[x]), false)
            }
            "Concat" if matches!(node.int("axis", 1), 1 | -3) => {
                let parts = (0..node.inputs.len()).map(|i| self.map(node, i)).collect::<Result<Vec<_>>>()?;
                let c = parts.iter().map(|part| self.channels[*part]).sum();
                (self.push(Op::Concat, &parts, c), false)
            }
            "GlobalAveragePool" => {
                let x = self.map(node, 0)?;
                (self.push(Op::GlobalAveragePool, &[x], self.channels[x]), false)
            }
            "Transpose" if node.ints("perm", -1, 4) == [0, 2, 3, 1] => (self.map(node, 0)?, true),
            "Reshape" => match self.any(node, 0)? {
                Value { node, is_last: true } => (node, true),
                _ => return Err("expected channels last before it is reshaped".into()),
            },
            _ => return Err("the engine has no such operation".into()),
        };
        Ok(Some(Value { node: node_id, is_last }))
    }

    fn push(&mut self, op: Op, inputs: &[NodeId], channels: usize) -> NodeId {
        let has_params = matches!(op, Op::Conv2d(_) | Op::BatchNorm | Op::PRelu);
        let path = if has_params { format!("n{}", self.graph.nodes().len()) } else { String::new() };
        self.channels.push(channels);
        self.graph.push(op, &path, inputs)
    }

    /// Adds a parameter of the node that was pushed last.
    fn param(&mut self, name: &str, tensor: Tensor) {
        let node = &self.graph.nodes()[self.graph.nodes().len() - 1];
        self.tensors.insert(node.param(name), tensor);
    }

    fn any(&self, node: &OnnxNode, i: usize) -> Result<Value> {
        let input = node.input(i)?;
        self.values.get(input).copied().ok_or_else(|| format!("expected input {i}, {input}, to be a map"))
    }

    fn map(&self, node: &OnnxNode, i: usize) -> Result<NodeId> {
        match self.any(node, i)? {
            Value { node, is_last: false } => Ok(node),
            _ => Err(format!("expected input {i} to have its channels first")),
        }
    }

    /// The numbers of a weight, f32.
    fn numbers(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let numbers = self.file.weight(name)?.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1::<f32>());
        let numbers = numbers.map_err(|error| error.to_string())?;
        match numbers.len() == len {
            true => Ok(numbers),
            false => Err(format!("{name}: expected {len} numbers, found {}", numbers.len())),
        }
    }

    fn conv(&mut self, node: &OnnxNode) -> Result<NodeId> {
        let (x, weight) = (self.map(node, 0)?, self.file.weight(node.input(1)?)?);
        let &[co, of_group, kernel, width] = weight.dims() else {
            return Err(format!("expected a filter of four axes, found {:?}", weight.dims()));
        };
        let (stride, padding) = (node.same("strides", 1, 2)?, node.same("pads", 0, 4)?);
        let dilation = node.same("dilations", 1, 2)?;
        let groups = usize::try_from(node.int("group", 1)).unwrap_or(0);
        let c = self.channels[x];
        let fits = groups > 0 && c == of_group.saturating_mul(groups) && co.is_multiple_of(groups);
        if kernel != width || dilation != 1 || stride == 0 || !fits {
            return Err(format!(
                "filter {:?}, stride {stride}, dilation {dilation}, {groups} groups of {c} channels",
                weight.dims()
            ));
        }
        let weight = weight.to_dtype(DType::F32).map_err(|error| error.to_string())?;
        let id = self.push(Op::Conv2d(ConvConfig { stride, padding, groups }), &[x], co);
        self.param("weight", weight);
        match node.inputs.get(2).filter(|bias| !bias.is_empty()) {
            Some(bias) => {
                let bias = self.numbers(bias, co)?;
                Ok(self.norm(id, [vec![1.0; co], bias, vec![0.0; co], vec![IDENTITY_VAR; co]]))
            }
            None => Ok(id),
        }
    }

    /// Appends a norm with this weight, bias, mean and variance.
    fn norm(&mut self, x: NodeId, values: [Vec<f32>; 4]) -> NodeId {
        let id = self.push(Op::BatchNorm, &[x], self.channels[x]);
        for (name, values) in ["weight", "bias", "running_mean", "running_var"].into_iter().zip(values) {
            let len = values.len();
            // As many values as the shape says.
            let tensor = Tensor::from_vec(values, len, &Device::Cpu).expect("a vector of its own length");
            self.param(name, tensor);
        }
        self.param("num_batches_tracked", Tensor::new(0i64, &Device::Cpu).expect("a number"));
        id
    }

    fn batch_norm(&mut self, node: &OnnxNode) -> Result<NodeId> {
        let x = self.map(node, 0)?;
        let c = self.channels[x];
        let [weight, bias, mean, var] = [1, 2, 3, 4].map(|i| self.numbers(node.input(i)?, c));
        let shift = node.float("epsilon", 1e-5) - EPS as f32;
        let var = var?.into_iter().map(|var| var + shift).collect();
        Ok(self.norm(x, [weight?, bias?, mean?, var]))
    }

    /// A ReLU is part of the norm before it, if nothing else reads that.
    fn relu(&mut self, node: &OnnxNode) -> Result<(NodeId, bool)> {
        let Value { node: x, is_last } = self.any(node, 0)?;
        let c = self.channels[x];
        let is_sole = self.num_readers.get(node.input(0)?) == Some(&1) && self.graph.nodes()[x].op == Op::BatchNorm;
        if !is_sole {
            return Ok((self.push(Op::Relu, &[x], c), is_last));
        }
        Ok((self.slopes(x, vec![0.0; c]), is_last))
    }

    fn slopes(&mut self, x: NodeId, slopes: Vec<f32>) -> NodeId {
        let len = slopes.len();
        let id = self.push(Op::PRelu, &[x], len);
        self.param("weight", Tensor::from_vec(slopes, len, &Device::Cpu).expect("a vector of its own length"));
        id
    }

    fn prelu(&mut self, node: &OnnxNode) -> Result<NodeId> {
        let mut x = self.map(node, 0)?;
        let (c, slope) = (self.channels[x], node.input(1)?);
        let num = self.file.weight(slope)?.elem_count();
        let slopes = self.numbers(slope, num)?;
        let slopes = match slopes[..] {
            [slope] => vec![slope; c],
            _ if num == c => slopes,
            _ => return Err(format!("expected a slope per channel, found {num} for {c}")),
        };
        if self.graph.nodes()[x].op != Op::BatchNorm || self.num_readers.get(node.input(0)?) != Some(&1) {
            // The engine has PReLU after a norm alone: one that changes nothing.
            x = self.norm(x, [vec![1.0; c], vec![0.0; c], vec![0.0; c], vec![IDENTITY_VAR; c]]);
        }
        Ok(self.slopes(x, slopes))
    }
}

#[cfg(test)]
mod tests {
    use super::super::export::of_graph;
    use super::super::tests::pyramid;
    use super::*;
    use crate::weights::OnnxAttribute;

    /// The node that computes a value.
    fn node<'a>(onnx: &'a mut OnnxModel, output: &str) -> &'a mut OnnxNode {
        onnx.nodes.iter_mut().find(|node| node.outputs[0] == output).expect("it is in the graph")
    }

    #[test]
    fn a_lifted_graph_computes_what_the_file_says() -> candle_core::Result<()> {
        let (graph, params) = pyramid()?;
        let mut onnx = of_graph(&graph, &params.state()?, 8, 4)?;
        let values: Vec<f32> = (0..2 * 3 * 8 * 12).map(|i| (i as f32 * 0.7).sin()).collect();
        let images = Tensor::from_vec(values, (2, 3, 8, 12), &Device::Cpu)?;
        let expected = graph.forward_t(&params, &images, false)?;
        let lifted = lift(&onnx).expect("the engine has its operations");
        let found = lifted.graph.forward_t(&lifted.params, &images, false)?;
        assert_eq!(found.flatten_all()?.to_vec1::<f32>()?, expected.flatten_all()?.to_vec1::<f32>()?);
        // A bias and a ReLU after the first convolution, which a second output shows too.
        let bias = Tensor::new(&[0.5f32, -0.5, 1.0, 0.0], &Device::Cpu)?;
        onnx.initializers.insert("bias".into(), bias.clone());
        let stem = node(&mut onnx, "x1");
        stem.inputs.push("bias".into());
        stem.outputs[0] = "before".into();
        let relu = OnnxNode {
            op_type: "Relu".into(),
            inputs: vec!["before".into()],
            outputs: vec!["x1".into()],
            ..OnnxNode::default()
        };
        onnx.nodes.insert(1, relu);
        onnx.outputs.push(crate::weights::OnnxValue { name: "x1".into(), dims: vec![] });
        let lifted = lift(&onnx).expect("the engine has its operations");
        assert!(lifted.graph.nodes().iter().any(|node| node.op == Op::PRelu), "it is part of the norm");
        assert_eq!((lifted.channels, lifted.outputs), (vec![4, 4], vec!["embedding".to_owned(), "x1".into()]));
        let found = lifted.graph.all_forward_t(&lifted.params, &images, false)?;
        let weight = params.state()?["stem.weight"].reshape((4, 3))?;
        let stem = images.permute((0, 2, 3, 1))?.reshape(((), 3))?.matmul(&weight.t()?)?;
        let expected = stem.broadcast_add(&bias)?.relu()?.flatten_all()?.to_vec1::<f32>()?;
        for (found, expected) in found[1].flatten_all()?.to_vec1::<f32>()?.into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found}, {expected}");
        }
        Ok(())
    }

    #[test]
    fn what_the_engine_lacks_is_named() -> candle_core::Result<()> {
        let (graph, params) = pyramid()?;
        let onnx = of_graph(&graph, &params.state()?, 8, 4)?;
        let refused = |change: &dyn Fn(&mut OnnxModel)| {
            let mut other = onnx.clone();
            change(&mut other);
            lift(&other).expect_err("refused")
        };
        let error = refused(&|onnx| node(onnx, "x4").op_type = "Softmax".into());
        assert_eq!(error, "x4 (Softmax): the engine has no such operation");
        let error = refused(&|onnx| {
            let uneven = OnnxAttribute::Ints(vec![2, 1]);
            node(onnx, "x1").attributes.insert("strides".into(), uneven);
        });
        assert!(error.contains("x1 (Conv): expected strides that are the same on all sides, found [2, 1]"), "{error}");
        let error =
            refused(&|onnx| node(onnx, "x1").attributes.insert("group".into(), OnnxAttribute::Int(3)).map_or((), drop));
        assert!(error.contains("3 groups of 3 channels"), "{error}");
        let error = refused(&|onnx| onnx.outputs[0].name = "unknown".into());
        assert_eq!(error, "expected an input, found none", "nothing is needed for an output that nothing computes");
        let error = refused(&|onnx| onnx.outputs.clear());
        assert_eq!(error, "expected an input, found none");
        Ok(())
    }
}
