//! Import of an ONNX graph as one of our networks.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};

use crate::models::{Arch, Found, Layout, Model, ModelConfig};
use crate::nn::{BatchNorm, Graph, NodeId, Op};
use crate::ops::conv::ConvConfig;
use crate::preprocessing::Preprocessing;
use crate::weights::{OnnxAttribute, OnnxModel, OnnxNode};

type Result<T> = std::result::Result<T, String>;

/// Recognises one of our networks in `onnx` and returns its weights. The graph may be as insightface exports it: batch
/// norms may be folded into convolutions, and the normalisation of the input may be in the graph.
///
/// A folded batch norm becomes one that only adds the bias: weight 1, mean 0, and a variance that scales by exactly 1
/// in f32.
///
/// # Errors
/// Says where the graph differs from the network that it is closest to.
pub fn from_onnx(onnx: &OnnxModel) -> Result<Found> {
    let file = File::new(onnx)?;
    let config = guess(&file)?;
    let model = Model::outline(&config).map_err(|e| e.to_string())?;
    let graph = Graph::of(&model);
    let mut matcher = Matcher {
        file: &file,
        graph: &graph,
        shapes: model.params().shapes(),
        found: Taken::default(),
        matched: BTreeMap::new(),
        failed: BTreeSet::new(),
        furthest: 0,
    };
    let [output] = onnx.outputs.as_slice() else {
        return Err(format!("expected one output, found {}", onnx.outputs.len()));
    };
    let matched = matcher.node(graph.nodes().len() - 1, &output.name);
    matched.map_err(|what| format!("is closest to {}, but differs from it: {what}", config.arch.name()))?;
    let found = matcher.found;
    let mut notes = Vec::new();
    if found.num_folded > 0 {
        notes.push(format!("{} batch norms are folded into the layers before them", found.num_folded));
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
    let weight = |node: &'_ OnnxNode| node.inputs.get(1).and_then(|name| file.weight(name).ok().cloned());
    let convs: Vec<Vec<usize>> = onnx
        .nodes
        .iter()
        .filter(|n| n.op_type == "Conv")
        .filter_map(|n| Some(weight(n)?.dims().to_vec()))
        .filter(|dims| dims.len() == 4)
        .collect();
    let Some(first) = convs.first() else { return Err("expected convolutions, found none".into()) };
    let input = onnx.inputs.first().map(|i| i.dims.as_slice()).unwrap_or_default();
    let input_size = match input {
        [_, _, Some(h), Some(w)] if h == w => usize::try_from(*h).map_err(|e| e.to_string())?,
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
    let is_mobile = convs.iter().any(|dims| dims[1] == 1 && dims[2] > 1);
    let squeeze_excitation = onnx.nodes.iter().any(|n| n.op_type == "Sigmoid");
    let arch = if is_mobile {
        // The last convolution is the global depthwise one, or the one that reduces the channels.
        match convs.last().is_some_and(|dims| dims[1] == 1) {
            true => Arch::MbfGdc,
            false => Arch::Mbf,
        }
    } else {
        let blocks = onnx.nodes.iter().filter(|n| n.op_type == "Add").count();
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

/// The file's graph, with the node that computes each value, by the value's name.
struct File<'a> {
    onnx: &'a OnnxModel,
    producers: BTreeMap<&'a str, &'a OnnxNode>,
}

impl<'a> File<'a> {
    fn new(onnx: &'a OnnxModel) -> Result<Self> {
        let mut producers = BTreeMap::new();
        for node in &onnx.nodes {
            for output in node.outputs.iter().filter(|o| !o.is_empty()) {
                if producers.insert(output.as_str(), node).is_some() {
                    return Err(format!("two operations compute {output}"));
                }
            }
        }
        Ok(Self { onnx, producers })
    }

    /// Returns the value that `value` is a copy of: skips operations that do nothing in evaluation mode.
    fn source(&self, value: &'a str) -> Result<&'a str> {
        let mut value = value;
        // A chain cannot be longer than the graph, unless it is a cycle.
        for _ in 0..=self.onnx.nodes.len() {
            match self.producers.get(value) {
                Some(node) if matches!(node.op_type.as_str(), "Identity" | "Dropout") => value = node.input(0)?,
                _ => return Ok(value),
            }
        }
        Err(format!("{value} is computed from itself"))
    }

    /// Returns the weight `name`, before any reshaping.
    fn weight(&self, name: &'a str) -> Result<&'a Tensor> {
        Ok(self.weight_with_axes(name)?.0)
    }

    /// Like [`Self::weight`], and whether the graph reshapes it.
    fn weight_with_axes(&self, name: &'a str) -> Result<(&'a Tensor, bool)> {
        let (mut source, mut is_reshaped) = (name, false);
        for _ in 0..=self.onnx.nodes.len() {
            match self.producers.get(source) {
                Some(node) if matches!(node.op_type.as_str(), "Identity" | "Unsqueeze" | "Squeeze" | "Reshape") => {
                    is_reshaped |= node.op_type != "Identity";
                    source = node.input(0)?;
                }
                _ => break,
            }
        }
        let weight = self.onnx.initializers.get(source);
        weight.map(|w| (w, is_reshaped)).ok_or_else(|| format!("expected {name} to be a weight, found none"))
    }

    /// Returns the value of a constant with one element.
    fn scalar(&self, name: &str) -> Option<f64> {
        let tensor = self.onnx.initializers.get(name).filter(|t| t.elem_count() == 1)?;
        tensor.to_dtype(DType::F64).ok()?.flatten_all().ok()?.to_vec1::<f64>().ok()?.first().copied()
    }
}

/// Results of the matching so far.
#[derive(Clone, Default)]
struct Taken {
    tensors: BTreeMap<String, Tensor>,
    preprocessing: Option<Preprocessing>,
    num_folded: usize,
}

struct Matcher<'a> {
    file: &'a File<'a>,
    graph: &'a Graph,
    shapes: BTreeMap<String, Vec<usize>>,
    found: Taken,
    /// Value in the file that matches our node.
    matched: BTreeMap<NodeId, &'a str>,
    /// Pairs that cannot match, whatever else does. Without this record the matching could try every combination of the
    /// orders of all sums.
    failed: BTreeSet<(NodeId, &'a str)>,
    /// Largest number of nodes matched before a failure.
    furthest: usize,
}

impl<'a> Matcher<'a> {
    /// Checks that `value` is computed like our node `id`, back to the input, and collects the weights.
    fn node(&mut self, id: NodeId, value: &'a str) -> Result<()> {
        let value = self.file.source(value)?;
        if let Some(other) = self.matched.insert(id, value) {
            return if other == value { Ok(()) } else { Err(format!("expected {other} and {value} to be the same")) };
        }
        if self.failed.contains(&(id, value)) {
            return Err(format!("{value} does not compute {}", describe(&self.graph.nodes()[id].op)));
        }
        let matched = self.operation(id, value);
        if matched.is_err() {
            self.failed.insert((id, value));
            self.furthest = self.furthest.max(self.matched.len());
        }
        matched
    }

    fn operation(&mut self, id: NodeId, value: &'a str) -> Result<()> {
        let node = &self.graph.nodes()[id];
        if node.op == Op::Input {
            return self.input(value);
        }
        let Some(&theirs) = self.file.producers.get(value) else {
            return Err(format!("expected {} to be {}, found an input", value, describe(&node.op)));
        };
        let mismatch = || format!("{value}: expected {}, found {}", describe(&node.op), theirs.op_type);
        match (&node.op, theirs.op_type.as_str()) {
            (Op::BatchNorm, "BatchNormalization") if theirs.int("training_mode", 0) == 0 => {
                self.batch_norm(id, theirs)?;
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::BatchNorm, "Conv" | "Gemm") => self.folded(id, theirs),
            (Op::Conv2d(config), "Conv") => {
                if theirs.inputs.get(2).is_some_and(|b| !b.is_empty()) {
                    return Err(format!("{value}: expected a convolution without bias, found one"));
                }
                self.conv(id, *config, theirs)?;
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::Linear { has_bias }, "Gemm") => {
                let bias = theirs.inputs.get(2).filter(|b| !b.is_empty());
                self.linear(id, theirs)?;
                match (has_bias, bias) {
                    (true, Some(bias)) => self.take(node.param("bias"), self.file.weight(bias)?)?,
                    (true, None) => self.constant(node.param("bias"), 0.0)?,
                    (false, None) => {}
                    (false, Some(_)) => return Err(format!("{value}: expected no bias, found one")),
                }
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::Linear { has_bias: false }, "MatMul") => {
                self.linear(id, theirs)?;
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::PRelu, "PRelu") => {
                let (slope, is_reshaped) = self.file.weight_with_axes(theirs.input(1)?)?;
                // Along the last axis it would be a slope per column; before operator set 7 a single axis means
                // channels.
                let is_per_channel = match slope.dims() {
                    [_] => is_reshaped || self.file.onnx.opset < 7,
                    dims => dims.last() == Some(&1),
                };
                if !is_per_channel && slope.elem_count() > 1 {
                    return Err(format!("{value}: expected a slope per channel, found shape {:?}", slope.dims()));
                }
                self.take(node.param("weight"), slope)?;
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::Flatten, "Flatten") if theirs.int("axis", 1) == 1 => self.node(node.inputs[0], theirs.input(0)?),
            (Op::Flatten, "Reshape") => {
                // To (N, -1), however it is written: the shape of the linear layer's weight determines the rest.
                let shape = self.file.weight(theirs.input(1)?)?;
                if shape.elem_count() != 2 {
                    return Err(format!("{value}: expected a reshape to two axes, found {}", shape.elem_count()));
                }
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::Add | Op::Mul, "Add" | "Mul") if theirs.op_type == op_type(&node.op) => self.either_way(id, theirs),
            (Op::GlobalAveragePool, "GlobalAveragePool") | (Op::Relu, "Relu") | (Op::Sigmoid, "Sigmoid") => {
                self.node(node.inputs[0], theirs.input(0)?)
            }
            _ => Err(mismatch()),
        }
    }

    /// Matches a sum or product with its operands in either order.
    fn either_way(&mut self, id: NodeId, theirs: &'a OnnxNode) -> Result<()> {
        let ours = &self.graph.nodes()[id].inputs;
        let (a, b) = (theirs.input(0)?, theirs.input(1)?);
        let before = (self.found.clone(), self.matched.clone());
        // The wrong order fails within a block: one operand is the block's input or a shortcut.
        self.furthest = 0;
        let Err(first) = self.node(ours[0], a).and_then(|()| self.node(ours[1], b)) else { return Ok(()) };
        (self.found, self.matched) = before;
        let in_first = std::mem::take(&mut self.furthest);
        let second = self.node(ours[0], b).and_then(|()| self.node(ours[1], a));
        // If both fail, the order that got further says where the networks differ.
        second.map_err(|second| if in_first >= self.furthest { first } else { second }).inspect_err(|_| {
            self.furthest = self.furthest.max(in_first);
        })
    }

    /// Matches the graph's input, with or without its normalisation.
    fn input(&mut self, value: &'a str) -> Result<()> {
        let (mut value, mut scale, mut shift, mut steps) = (value, 1.0, 0.0, 0);
        // x_net = scale * x + shift, from the network back to the input.
        while let Some(node) = self.file.producers.get(value).filter(|_| steps <= self.file.onnx.nodes.len()) {
            let constant = node.inputs.get(1).and_then(|name| self.file.scalar(name));
            let Some(c) = constant else {
                return Err(format!("{value}: expected the input or its normalisation, found {}", node.op_type));
            };
            match node.op_type.as_str() {
                "Mul" => scale *= c,
                "Div" => scale /= c,
                "Sub" => shift -= scale * c,
                "Add" => shift += scale * c,
                other => return Err(format!("{value}: expected the input or its normalisation, found {other}")),
            }
            value = self.file.source(node.input(0)?)?;
            steps += 1;
        }
        if !self.file.onnx.inputs.iter().any(|i| i.name == value) {
            return Err(format!("expected {value} to be the input, found nothing that computes it"));
        }
        if steps > 0 {
            let (mean, std) = (-shift / scale, 1.0 / scale);
            let preprocessing = Preprocessing { mean, std, ..Preprocessing::default() };
            preprocessing.validate().map_err(|e| format!("normalisation in the graph: {e}"))?;
            self.found.preprocessing = Some(preprocessing);
        }
        Ok(())
    }

    fn conv(&mut self, id: NodeId, config: ConvConfig, theirs: &OnnxNode) -> Result<()> {
        let name = self.graph.nodes()[id].param("weight");
        let (stride, padding) = (config.stride as i64, config.padding as i64);
        let settings = [("strides", vec![stride; 2], 1), ("pads", vec![padding; 4], 0), ("dilations", vec![1; 2], 1)];
        for (key, ours, default) in settings {
            let found = theirs.ints(key, default, ours.len());
            if found != ours {
                return Err(format!("{name}: expected {key} {ours:?}, found {found:?}"));
            }
        }
        if theirs.attributes.contains_key("auto_pad") && !theirs.attributes.contains_key("pads") {
            return Err(format!("{name}: expected pads, found auto_pad"));
        }
        let groups = theirs.int("group", 1);
        if groups != config.groups as i64 {
            return Err(format!("{name}: expected {} groups, found {groups}", config.groups));
        }
        self.take(name, self.file.weight(theirs.input(1)?)?)
    }

    fn linear(&mut self, id: NodeId, theirs: &OnnxNode) -> Result<()> {
        let name = self.graph.nodes()[id].param("weight");
        let weight = self.file.weight(theirs.input(1)?)?;
        if theirs.float("alpha", 1.0) != 1.0 || theirs.float("beta", 1.0) != 1.0 || theirs.int("transA", 0) != 0 {
            return Err(format!("{name}: expected a plain linear layer, found one with alpha, beta or transA"));
        }
        let weight = match theirs.int("transB", 0) {
            1 => weight.clone(),
            _ => weight.t().map_err(|e| format!("{name}: {e}"))?,
        };
        self.take(name, &weight)
    }

    fn batch_norm(&mut self, id: NodeId, theirs: &OnnxNode) -> Result<()> {
        let node = &self.graph.nodes()[id];
        let file = self.file;
        for (at, name) in ["weight", "bias", "running_mean"].into_iter().enumerate() {
            self.take(node.param(name), file.weight(theirs.input(at + 1)?)?)?;
        }
        let mut var = file.weight(theirs.input(4)?)?.clone();
        let eps = theirs.float("epsilon", 1e-5);
        if eps != BatchNorm::EPS as f32 {
            // Our epsilon is fixed: the variance makes up for the difference.
            let wider = var.to_dtype(DType::F64).and_then(|v| v + (f64::from(eps) - BatchNorm::EPS));
            var = wider.and_then(|v| v.to_dtype(DType::F32)).map_err(|e| e.to_string())?;
        }
        self.take(node.param("running_var"), &var)
    }

    /// Matches a batch norm of ours that is folded into the layer before it: only the layer's bias is left of it.
    fn folded(&mut self, id: NodeId, theirs: &'a OnnxNode) -> Result<()> {
        let node = &self.graph.nodes()[id];
        let before = node.inputs[0];
        let layer = &self.graph.nodes()[before];
        match layer.op {
            Op::Conv2d(config) if theirs.op_type == "Conv" => self.conv(before, config, theirs)?,
            Op::Linear { .. } if theirs.op_type == "Gemm" => self.linear(before, theirs)?,
            _ => return Err(format!("{}: expected batch norm, found {}", node.path, theirs.op_type)),
        }
        match theirs.inputs.get(2).filter(|b| !b.is_empty()) {
            Some(bias) => self.take(node.param("bias"), self.file.weight(bias)?)?,
            None => self.constant(node.param("bias"), 0.0)?,
        }
        if layer.op == (Op::Linear { has_bias: true }) {
            self.constant(layer.param("bias"), 0.0)?;
        }
        self.constant(node.param("weight"), 1.0)?;
        self.constant(node.param("running_mean"), 0.0)?;
        self.constant(node.param("running_var"), BatchNorm::IDENTITY_VAR)?;
        self.found.num_folded += 1;
        self.node(layer.inputs[0], theirs.input(0)?)
    }

    /// Stores a weight in our shape, which may differ in axes of length 1.
    fn take(&mut self, name: String, tensor: &Tensor) -> Result<()> {
        let expected = &self.shapes[&name];
        let without_ones = |dims: &[usize]| dims.iter().copied().filter(|&d| d != 1).collect::<Vec<_>>();
        if without_ones(tensor.dims()) != without_ones(expected) {
            return Err(format!("{name}: expected shape {expected:?}, found {:?}", tensor.dims()));
        }
        if !tensor.dtype().is_float() {
            return Err(format!("{name}: expected floating-point numbers, found {:?}", tensor.dtype()));
        }
        let tensor = tensor.to_dtype(DType::F32).and_then(|t| t.reshape(expected.as_slice()));
        self.found.tensors.insert(name, tensor.map_err(|e| e.to_string())?);
        Ok(())
    }

    fn constant(&mut self, name: String, value: f32) -> Result<()> {
        let tensor = Tensor::full(value, self.shapes[&name].as_slice(), &Device::Cpu).map_err(|e| e.to_string())?;
        self.found.tensors.insert(name, tensor);
        Ok(())
    }
}

fn op_type(op: &Op) -> &'static str {
    if *op == Op::Add { "Add" } else { "Mul" }
}

fn describe(op: &Op) -> &'static str {
    match op {
        Op::Input => "the input",
        Op::Conv2d(_) => "a convolution",
        Op::BatchNorm => "batch norm",
        Op::PRelu => "PReLU",
        Op::Linear { .. } => "a linear layer",
        Op::Flatten => "flattening",
        Op::Add => "a sum",
        Op::Mul => "a product",
        Op::GlobalAveragePool => "global average pooling",
        Op::Relu => "ReLU",
        Op::Sigmoid => "a sigmoid",
    }
}

impl OnnxNode {
    fn input(&self, at: usize) -> Result<&str> {
        let what = || format!("{}: expected input {at}, found {} inputs", self.op_type, self.inputs.len());
        self.inputs.get(at).map(String::as_str).filter(|i| !i.is_empty()).ok_or_else(what)
    }

    fn int(&self, name: &str, default: i64) -> i64 {
        match self.attributes.get(name) {
            Some(OnnxAttribute::Int(v)) => *v,
            _ => default,
        }
    }

    fn float(&self, name: &str, default: f32) -> f32 {
        match self.attributes.get(name) {
            Some(OnnxAttribute::Float(v)) => *v,
            _ => default,
        }
    }

    /// Returns the attribute `name`, or `len` times `default` if it is left out.
    fn ints(&self, name: &str, default: i64, len: usize) -> Vec<i64> {
        match self.attributes.get(name) {
            Some(OnnxAttribute::Ints(v)) => v.clone(),
            _ => vec![default; len],
        }
    }
}
