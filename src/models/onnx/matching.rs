//! Matches a graph from a file with one of ours, from the output back to the input.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};

use super::Result;
use super::file::File;
use super::maps;
use super::simplify::{is_trivial_pool, numbers};
use crate::models::layout::{identity_conv, identity_norm};
use crate::nn::{Graph, NodeId, Op};
use crate::ops::batch_norm::{EPS, IDENTITY_VAR};
use crate::ops::conv::ConvConfig;
use crate::preprocessing::{Channels, Preprocessing};
use crate::weights::OnnxNode;

/// Largest side of a map of values, which an end of a slice reaches.
const MAX_SIDE: i64 = 224;

/// Checks that the value `output` of `file` is computed as `graph` computes its last node, and returns the weights,
/// which have our names and `shapes`.
///
/// # Errors
/// Says where the two differ.
pub(super) fn matched<'a>(
    file: &'a File<'a>,
    graph: &'a Graph,
    shapes: BTreeMap<String, Vec<usize>>,
    output: &'a str,
) -> Result<Taken> {
    let mut matcher = Matcher {
        file,
        graph,
        shapes,
        found: Taken::default(),
        matched: BTreeMap::new(),
        absorbed: BTreeSet::new(),
        failed: BTreeSet::new(),
        furthest: 0,
    };
    matcher.node(graph.outputs()[0], output)?;
    Ok(matcher.found)
}

/// Results of the matching so far.
#[derive(Clone, Default)]
pub(super) struct Taken {
    pub(super) tensors: BTreeMap<String, Tensor>,
    pub(super) preprocessing: Option<Preprocessing>,
    pub(super) num_folded: usize,
    pub(super) num_pooled: usize,
}

struct Matcher<'a> {
    file: &'a File<'a>,
    graph: &'a Graph,
    shapes: BTreeMap<String, Vec<usize>>,
    found: Taken,
    /// Value in the file that matches our node.
    matched: BTreeMap<NodeId, &'a str>,
    /// Convolutions whose bias was taken into the mean of the batch norm after them.
    absorbed: BTreeSet<&'a str>,
    /// Pairs that cannot match, whatever else does. Without this record the matching could try every combination of the
    /// orders of all sums.
    failed: BTreeSet<(NodeId, &'a str)>,
    /// Largest number of nodes matched before a failure.
    furthest: usize,
}

impl<'a> Matcher<'a> {
    /// Checks that `value` is computed like our node `id`, back to the input, and collects the weights.
    fn node(&mut self, id: NodeId, value: &'a str) -> Result<()> {
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
            (Op::BatchNorm, "BatchNormalization") => {
                // Before operator set 14 further outputs, the new statistics, are what training mode is told by.
                if theirs.int("training_mode", 0) != 0 || theirs.outputs.iter().skip(1).any(|o| !o.is_empty()) {
                    return Err(format!("{value}: expected batch norm in evaluation mode, found training mode"));
                }
                self.batch_norm(id, theirs)?;
                let input = theirs.input(0)?;
                self.absorb_bias(id, input)?;
                self.node(node.inputs[0], input)
            }
            (Op::BatchNorm, "MaxPool" | "Slice") => self.pooled(id, value, theirs),
            (Op::BatchNorm, "Conv" | "Gemm") => self.folded(id, theirs),
            (Op::Conv2d(config), "Conv") => {
                let has_bias = theirs.inputs.get(2).is_some_and(|b| !b.is_empty());
                if has_bias && !self.absorbed.contains(value) {
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
            (Op::PRelu, "PRelu") => {
                let slope = self.file.weight(theirs.input(1)?)?;
                // Along the last axis it would be a slope per column; before operator set 7 a single axis means
                // channels.
                if slope.elem_count() == 1 {
                    let slope = slope.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1::<f32>());
                    self.constant(node.param("weight"), slope.map_err(|e| e.to_string())?[0])?;
                    return self.node(node.inputs[0], theirs.input(0)?);
                }
                let is_per_channel = match slope.dims() {
                    [_] => self.file.onnx.opset < 7,
                    dims => dims.last() == Some(&1),
                };
                if !is_per_channel {
                    return Err(format!("{value}: expected a slope per channel, found shape {:?}", slope.dims()));
                }
                self.take(node.param("weight"), slope)?;
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::Flatten, "Flatten") if theirs.int("axis", 1) == 1 => self.node(node.inputs[0], theirs.input(0)?),
            (Op::Flatten, "Reshape") => Err(format!("{value}: expected a reshape to (batch, values), found another")),
            (Op::Add | Op::Mul, "Add" | "Mul") if theirs.op_type == op_type(&node.op) => self.either_way(id, theirs),
            (Op::GlobalAveragePool, "GlobalAveragePool") | (Op::Relu, "Relu") | (Op::Sigmoid, "Sigmoid") => {
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::MaxPool(window), "MaxPool") => {
                let found = maps::window(theirs).map_err(|what| format!("{value}: {what}"))?;
                if found != *window {
                    return Err(format!("{value}: expected {window:?}, found {found:?}"));
                }
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::Upsample { factor }, "Resize") => {
                let found = maps::nearest_factor(self.file, theirs).map_err(|what| format!("{value}: {what}"))?;
                if found != *factor {
                    return Err(format!("{value}: expected upsampling by {factor}, found {found}"));
                }
                self.node(node.inputs[0], theirs.input(0)?)
            }
            (Op::Concat, "Concat") if matches!(theirs.int("axis", 1), 1 | -3) => {
                if theirs.inputs.len() != node.inputs.len() {
                    let (ours, found) = (node.inputs.len(), theirs.inputs.len());
                    return Err(format!("{value}: expected a concatenation of {ours} inputs, found {found}"));
                }
                node.inputs.iter().zip(&theirs.inputs).try_for_each(|(ours, theirs)| self.node(*ours, theirs))
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

    /// Matches the graph's input, with or without its normalisation and a change of the order of channels.
    fn input(&mut self, value: &'a str) -> Result<()> {
        // Channel c of the network's input is scale[c] * u[from[c]] + shift[c], from the network back to the input u.
        let (mut scale, mut shift, mut from) = ([1.0; 3], [0.0; 3], [0, 1, 2]);
        let (mut value, mut steps) = (value, 0);
        let mut is_changed = false;
        while let Some(&node) = self.file.producers.get(value).filter(|_| steps <= self.file.onnx.nodes.len()) {
            steps += 1;
            if node.op_type == "Transpose" && node.ints("perm", -1, 4) == [0, 3, 1, 2] {
                // From channels last: channels are in the same order.
                value = node.input(0)?;
                continue;
            }
            is_changed = true;
            if let Some((order, source)) = self.file.permutation(value) {
                from = from.map(|k| order[k]);
                value = source;
                continue;
            }
            let wrong = || format!("{value}: expected the input or its normalisation, found {}", node.op_type);
            let [left, right] = [0, 1].map(|at| node.inputs.get(at).map(String::as_str).unwrap_or_default());
            // Sums and products may have the constant on either side.
            let is_symmetric = matches!(node.op_type.as_str(), "Add" | "Mul");
            let (x, constant) = match (self.file.channels(right), self.file.channels(left)) {
                (Some(constant), _) => (left, constant),
                (None, Some(constant)) if is_symmetric => (right, constant),
                _ => return Err(wrong()),
            };
            for c in 0..3 {
                let v = constant[from[c]];
                match node.op_type.as_str() {
                    "Mul" => scale[c] *= v,
                    "Div" => scale[c] /= v,
                    "Sub" => shift[c] -= scale[c] * v,
                    "Add" => shift[c] += scale[c] * v,
                    _ => return Err(wrong()),
                }
            }
            value = x;
        }
        if !self.file.onnx.inputs.iter().any(|i| i.name == value) {
            return Err(format!("expected {value} to be the input, found nothing that computes it"));
        }
        if is_changed {
            self.found.preprocessing = Some(preprocessing(scale, shift, from)?);
        }
        Ok(())
    }

    fn conv(&mut self, id: NodeId, config: ConvConfig, theirs: &OnnxNode) -> Result<()> {
        let name = self.graph.nodes()[id].param("weight");
        let settings = [("strides", config.stride, 1, 2), ("pads", config.padding, 0, 4), ("dilations", 1, 1, 2)];
        for (key, ours, default, len) in settings {
            let (ours, found) = (vec![ours as i64; len], theirs.ints(key, default, len));
            if found != ours {
                return Err(format!("{name}: expected {key} {ours:?}, found {found:?}"));
            }
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
        if eps != EPS as f32 {
            // Our epsilon is fixed: the variance makes up for the difference.
            let wider = var.to_dtype(DType::F64).and_then(|v| v + (f64::from(eps) - EPS));
            var = wider.and_then(|v| v.to_dtype(DType::F32)).map_err(|e| e.to_string())?;
        }
        self.take(node.param("running_var"), &var)
    }

    /// Takes the bias of the convolution before a batch norm into the norm's mean: `(x + b - mean) = x - (mean - b)`.
    fn absorb_bias(&mut self, id: NodeId, input: &'a str) -> Result<()> {
        let Some(&conv) = self.file.producers.get(input).filter(|node| node.op_type == "Conv") else { return Ok(()) };
        let Some(bias) = conv.inputs.get(2).filter(|b| !b.is_empty()) else { return Ok(()) };
        let bias = self.file.weight(bias)?.to_dtype(DType::F32).map_err(|e| e.to_string())?;
        let name = self.graph.nodes()[id].param("running_mean");
        let mean = self.found.tensors.get(&name).ok_or_else(|| format!("{name}: expected a mean, found none"))?;
        let mean = bias.flatten_all().and_then(|bias| mean - bias).map_err(|e| format!("{name}: {e}"))?;
        self.found.tensors.insert(name, mean);
        self.absorbed.insert(input);
        Ok(())
    }

    /// Matches a shortcut that takes every second value, as AdaFace's networks have it, where ours has a convolution of
    /// size 1 and a batch norm: both become the identity.
    fn pooled(&mut self, id: NodeId, value: &'a str, theirs: &'a OnnxNode) -> Result<()> {
        let norm = &self.graph.nodes()[id];
        let before = norm.inputs[0];
        let conv = &self.graph.nodes()[before];
        let mismatch = || format!("{value}: expected {}, found {}", describe(&norm.op), theirs.op_type);
        let Op::Conv2d(config) = conv.op else { return Err(mismatch()) };
        let &[c_out, c_in, 1, 1] = &self.shapes[&conv.param("weight")][..] else { return Err(mismatch()) };
        let stride = config.stride as i64;
        let input = match theirs.op_type.as_str() {
            "MaxPool" if is_trivial_pool(theirs, stride) => Some(theirs.input(0)?),
            "Slice" => self.every(theirs, stride),
            _ => None,
        };
        let Some(input) = input.filter(|_| c_in == c_out) else { return Err(mismatch()) };
        let filled = |e: candle_core::Error| e.to_string();
        self.found.tensors.insert(conv.param("weight"), identity_conv(c_out).map_err(filled)?);
        for (leaf, tensor) in identity_norm(c_out).map_err(filled)? {
            self.found.tensors.insert(norm.param(leaf), tensor);
        }
        self.found.num_pooled += 1;
        self.node(conv.inputs[0], input)
    }

    /// Returns the value of which `slice`, perhaps with another before it, takes every `stride`-th row and column.
    fn every(&self, slice: &'a OnnxNode, stride: i64) -> Option<&'a str> {
        let (mut node, mut seen) = (slice, BTreeSet::new());
        loop {
            let part = |at: usize, key: &str| numbers(self.file.onnx, node, at, key);
            let (starts, ends, axes) = (part(1, "starts")?, part(2, "ends")?, part(3, "axes")?);
            let steps = part(4, "steps")?;
            for (i, &axis) in axes.iter().enumerate() {
                let axis = if axis < 0 { axis.checked_add(4)? } else { axis };
                let is_whole = *starts.get(i)? == 0 && *ends.get(i)? >= MAX_SIDE && *steps.get(i)? == stride;
                if !matches!(axis, 2 | 3) || !is_whole || !seen.insert(axis) {
                    return None;
                }
            }
            let input = node.input(0).ok()?;
            if seen.len() == 2 {
                return Some(input);
            }
            node = *self.file.producers.get(input).filter(|node| node.op_type == "Slice")?;
        }
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
        self.constant(node.param("running_var"), IDENTITY_VAR)?;
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

/// Returns the preprocessing that a graph has at its input: channel c of the network's input is
/// `scale[c] * u[from[c]] + shift[c]`.
fn preprocessing(scale: [f64; 3], shift: [f64; 3], from: [usize; 3]) -> Result<Preprocessing> {
    let channels = match from {
        [0, 1, 2] => Channels::Rgb,
        [2, 1, 0] => Channels::Bgr,
        other => return Err(format!("expected channels in the order RGB or BGR, found {other:?}")),
    };
    let means: [f64; 3] = std::array::from_fn(|c| -shift[c] / scale[c]);
    let stds = scale.map(|scale| 1.0 / scale);
    let is_same = |values: [f64; 3]| values.iter().all(|v| (v - values[0]).abs() <= 1e-6 * values[0].abs().max(1.0));
    if !is_same(means) || !is_same(stds) {
        return Err(format!(
            "the graph normalises each channel in its own way, (x - {means:?}) / {stds:?}: expected one mean and one \
             standard deviation for all"
        ));
    }
    let preprocessing = Preprocessing { channels, mean: means[0], std: stds[0], ..Preprocessing::default() };
    preprocessing.validate().map_err(|e| format!("normalisation in the graph: {e}"))?;
    Ok(preprocessing)
}

fn op_type(op: &Op) -> &'static str {
    if *op == Op::Add { "Add" } else { "Mul" }
}

fn describe(op: &Op) -> &'static str {
    match op {
        Op::Input => "the input",
        Op::Dropout => "dropout",
        Op::Conv2d(_) => "a convolution",
        Op::BatchNorm => "batch norm",
        Op::PRelu => "PReLU",
        Op::Linear { .. } => "a linear layer",
        Op::Flatten => "flattening",
        Op::Add => "a sum",
        Op::Mul => "a product",
        Op::GlobalAveragePool => "global average pooling",
        Op::MaxPool(_) => "max pooling",
        Op::Upsample { .. } => "nearest upsampling",
        Op::Concat => "a concatenation",
        Op::Relu => "ReLU",
        Op::Sigmoid => "a sigmoid",
    }
}
