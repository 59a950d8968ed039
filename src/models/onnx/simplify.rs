//! Rewrites a graph as exporters write it into the few operations that our networks have, so that the matching need not
//! know every way of writing them.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};

use crate::weights::{OnnxAttribute, OnnxModel, OnnxNode};

type Result<T> = std::result::Result<T, String>;

/// Constants that are computed, rather than stored, may have this many times the elements of all stored ones: weights
/// are only arranged anew.
const MAX_GROWTH: usize = 2;
/// Most elements that a constant is repeated to: a bias. A forged shape could ask for any number.
const MAX_EXPANDED: usize = 1 << 16;
/// Most that may be added to a norm before the division by it.
const MAX_EPSILON: f64 = 1e-5;
/// Operations of quantised networks.
const QUANTISED: [&str; 8] = [
    "QLinearConv",
    "QLinearMatMul",
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "QLinearAdd",
];

/// Rewrites the graph in place; returns notes on what is left out.
///
/// Afterwards nodes are in topological order and all are needed for the one output; linear layers are `Gemm`s,
/// flattening is `Flatten`, paddings are in the convolutions, PReLU is `PRelu`; copies and casts are gone, constants are
/// weights, and so is a division of the embeddings by their length.
///
/// # Errors
/// Says what our networks cannot have: quantised or foreign operations, cycles.
pub(super) fn simplify(onnx: &mut OnnxModel) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    drop_copies(onnx)?;
    sort(onnx)?;
    fold_constants(onnx)?;
    choose_output(onnx, &mut notes)?;
    sort(onnx)?;
    linear_layers(onnx)?;
    flattening(onnx)?;
    paddings(onnx)?;
    leaky_relus(onnx)?;
    sort(onnx)?;
    let foreign = onnx.nodes.iter().find(|node| node.op_type.contains('.'));
    if let Some(node) = foreign {
        return Err(format!(
            "{} is an operation of one runtime: use the graph as it was exported, before a runtime optimised it",
            node.op_type
        ));
    }
    if let Some(node) = onnx.nodes.iter().find(|node| QUANTISED.contains(&node.op_type.as_str())) {
        return Err(format!("this is a quantised network ({}): use the file from before quantisation", node.op_type));
    }
    Ok(notes)
}

/// The node that computes each value.
fn producers(onnx: &OnnxModel) -> Result<BTreeMap<&str, usize>> {
    let mut producers = BTreeMap::new();
    for (i, node) in onnx.nodes.iter().enumerate() {
        for output in node.outputs.iter().filter(|o| !o.is_empty()) {
            if producers.insert(output.as_str(), i).is_some() {
                return Err(format!("two operations compute {output}"));
            }
        }
    }
    Ok(producers)
}

/// Sorts the nodes topologically and drops those that no output needs.
fn sort(onnx: &mut OnnxModel) -> Result<()> {
    let order = {
        let producers = producers(onnx)?;
        let (mut order, mut done, mut open) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        // Depth first, with a stack of its own: a graph may be deep.
        let mut stack: Vec<(usize, bool)> = onnx
            .outputs
            .iter()
            .rev()
            .filter_map(|output| producers.get(output.name.as_str()).map(|&node| (node, false)))
            .collect();
        while let Some((node, is_entered)) = stack.pop() {
            if is_entered {
                open.remove(&node);
                if done.insert(node) {
                    order.push(node);
                }
                continue;
            }
            if done.contains(&node) {
                continue;
            }
            if !open.insert(node) {
                let name = onnx.nodes[node].outputs.first().map_or("a value", String::as_str);
                return Err(format!("{name} is computed from itself: the graph has a circle"));
            }
            stack.push((node, true));
            for input in onnx.nodes[node].inputs.iter().rev() {
                let Some(&before) = producers.get(input.as_str()) else { continue };
                if open.contains(&before) {
                    return Err(format!("{input} is computed from itself: the graph has a circle"));
                }
                if !done.contains(&before) {
                    stack.push((before, false));
                }
            }
        }
        order
    };
    let mut nodes: Vec<Option<OnnxNode>> = std::mem::take(&mut onnx.nodes).into_iter().map(Some).collect();
    onnx.nodes = order.into_iter().filter_map(|i| nodes[i].take()).collect();
    Ok(())
}

/// Drops operations that return their input in evaluation mode.
fn drop_copies(onnx: &mut OnnxModel) -> Result<()> {
    let mut source: BTreeMap<String, String> = BTreeMap::new();
    for node in &onnx.nodes {
        let is_float = |to: i64| matches!(to, 1 | 10 | 11 | 16);
        let is_copy = match node.op_type.as_str() {
            "Identity" => true,
            "Dropout" => match node.inputs.get(2).filter(|name| !name.is_empty()) {
                // A flag that is not a constant, or says training.
                Some(flag) if onnx.unsupported.contains_key(flag) => true,
                Some(flag) => scalar(onnx, flag) == Some(0.0),
                None => true,
            },
            "Cast" => is_float(node.int("to", 0)),
            "MaxPool" => is_trivial_pool(node, 1),
            _ => false,
        };
        if is_copy && let (Some(input), Some(output)) = (node.inputs.first(), node.outputs.first()) {
            source.insert(output.clone(), input.clone());
        }
    }
    let resolve = |name: &str| -> Result<String> {
        let mut name = name;
        for _ in 0..=source.len() {
            match source.get(name) {
                Some(before) => name = before,
                None => return Ok(name.to_owned()),
            }
        }
        Err(format!("{name} is computed from itself: the graph has a circle"))
    };
    onnx.nodes.retain(|node| !node.outputs.first().is_some_and(|output| source.contains_key(output)));
    for node in &mut onnx.nodes {
        for input in &mut node.inputs {
            *input = resolve(input)?;
        }
    }
    for output in &mut onnx.outputs {
        output.name = resolve(&output.name)?;
    }
    Ok(())
}

/// Whether a pooling takes every `stride`-th value and computes nothing.
pub(super) fn is_trivial_pool(node: &OnnxNode, stride: i64) -> bool {
    let all = |key: &str, default: i64, wanted: i64| node.ints(key, default, 2).iter().all(|&v| v == wanted);
    let no_pads = node.ints("pads", 0, 4).iter().all(|&pad| pad == 0);
    node.op_type == "MaxPool" && all("kernel_shape", 0, 1) && all("strides", 1, stride) && no_pads
}

/// The value of a constant with one element.
fn scalar(onnx: &OnnxModel, name: &str) -> Option<f64> {
    let tensor = onnx.initializers.get(name).filter(|t| t.elem_count() == 1)?;
    tensor.to_dtype(DType::F64).ok()?.flatten_all().ok()?.to_vec1::<f64>().ok()?.first().copied()
}

/// The whole numbers of a constant.
fn integers(onnx: &OnnxModel, name: &str) -> Option<Vec<i64>> {
    let tensor = onnx.initializers.get(name).filter(|t| t.elem_count() <= 64 && t.dtype().is_int())?;
    tensor.to_dtype(DType::I64).ok()?.flatten_all().ok()?.to_vec1().ok()
}

/// Axes, steps and the like: an input of newer operator sets, an attribute of older ones.
fn numbers(onnx: &OnnxModel, node: &OnnxNode, at: usize, key: &str) -> Option<Vec<i64>> {
    match node.inputs.get(at).filter(|name| !name.is_empty()) {
        Some(name) => integers(onnx, name),
        None => match node.attributes.get(key) {
            Some(OnnxAttribute::Ints(values)) => Some(values.clone()),
            Some(OnnxAttribute::Int(value)) => Some(vec![*value]),
            _ => None,
        },
    }
}

/// Computes what depends on constants alone, as far as exporters arrange weights and shapes.
fn fold_constants(onnx: &mut OnnxModel) -> Result<()> {
    let stored: usize = onnx.initializers.values().map(Tensor::elem_count).sum();
    let mut budget = MAX_GROWTH * stored + MAX_EXPANDED;
    for node in std::mem::take(&mut onnx.nodes) {
        // What is computed is no larger than what it is computed from, or small.
        let largest = node.inputs.iter().filter_map(|name| onnx.initializers.get(name)).map(Tensor::elem_count).max();
        let is_affordable = largest.unwrap_or_default() <= budget;
        let folded = if is_affordable { fold(onnx, &node).map_err(|e| e.to_string())? } else { None };
        match (folded, node.outputs.first()) {
            (Some(tensor), Some(name)) => {
                budget = budget.saturating_sub(tensor.elem_count());
                onnx.initializers.insert(name.clone(), tensor);
            }
            _ => onnx.nodes.push(node),
        }
    }
    Ok(())
}

fn fold(onnx: &OnnxModel, node: &OnnxNode) -> candle_core::Result<Option<Tensor>> {
    let constant = |at: usize| node.inputs.get(at).and_then(|name| onnx.initializers.get(name));
    let Some(x) = constant(0) else { return Ok(None) };
    let place = |axis: i64, rank: usize| usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok();
    let y = match node.op_type.as_str() {
        "Cast" | "CastLike" => x.clone(),
        "Transpose" => {
            let axes = node.ints("perm", -1, x.rank());
            let reversed = axes.iter().all(|&axis| axis < 0);
            let axes: Vec<usize> = match reversed {
                true => (0..x.rank()).rev().collect(),
                false => axes.iter().filter_map(|&axis| place(axis, x.rank())).collect(),
            };
            x.permute(axes)?.contiguous()?
        }
        "Unsqueeze" => {
            let Some(axes) = numbers(onnx, node, 1, "axes") else { return Ok(None) };
            let rank = x.rank() + axes.len();
            let mut axes: Vec<usize> = axes.iter().filter_map(|&axis| place(axis, rank)).collect();
            axes.sort_unstable();
            axes.into_iter().try_fold(x.clone(), |x, axis| x.unsqueeze(axis))?
        }
        "Squeeze" => {
            let axes = numbers(onnx, node, 1, "axes");
            let is_dropped = |i: usize| match &axes {
                Some(axes) => axes.iter().any(|&axis| place(axis, x.rank()) == Some(i)),
                None => x.dims()[i] == 1,
            };
            let dims: Vec<usize> = (0..x.rank()).filter(|&i| !is_dropped(i)).map(|i| x.dims()[i]).collect();
            x.reshape(dims)?
        }
        "Reshape" => {
            let Some(shape) = node.inputs.get(1).and_then(|name| integers(onnx, name)) else { return Ok(None) };
            let known: i64 = shape.iter().filter(|&&dim| dim > 0).product();
            let dim = |(i, &dim): (usize, &i64)| match dim {
                0 => x.dims().get(i).copied(),
                -1 => usize::try_from(known).ok().filter(|&known| known > 0).map(|known| x.elem_count() / known),
                dim => usize::try_from(dim).ok(),
            };
            let Some(dims) = shape.iter().enumerate().map(dim).collect::<Option<Vec<_>>>() else { return Ok(None) };
            x.reshape(dims)?
        }
        "Shape" => {
            let bound =
                |key: &str, default: i64| place(node.int(key, default), x.rank()).unwrap_or_default().min(x.rank());
            let (start, end) = (bound("start", 0), bound("end", i64::MAX));
            let dims: Vec<i64> =
                x.dims().iter().skip(start).take(end.saturating_sub(start)).map(|&d| d as i64).collect();
            Tensor::new(dims, &Device::Cpu)?
        }
        "Expand" => {
            let Some(shape) = node.inputs.get(1).and_then(|name| integers(onnx, name)) else { return Ok(None) };
            let dims: Option<Vec<usize>> = shape.iter().map(|&dim| usize::try_from(dim).ok()).collect();
            let is_small = |dims: &Vec<usize>| {
                dims.iter().try_fold(1usize, |a, &b| a.checked_mul(b)).is_some_and(|num| num <= MAX_EXPANDED)
            };
            let Some(dims) = dims.filter(is_small) else { return Ok(None) };
            x.broadcast_as(dims)?.contiguous()?
        }
        "Concat" => {
            let parts: Option<Vec<&Tensor>> = (0..node.inputs.len()).map(constant).collect();
            let Some(parts) = parts else { return Ok(None) };
            // Shapes: weights are not put together.
            if parts.iter().map(|part| part.elem_count()).sum::<usize>() > MAX_EXPANDED {
                return Ok(None);
            }
            let Some(axis) = place(node.int("axis", 0), x.rank()) else { return Ok(None) };
            Tensor::cat(&parts, axis)?
        }
        _ => return Ok(None),
    };
    Ok(Some(y))
}

/// A dimension of a shape that the graph computes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Dim {
    Batch,
    Known(i64),
}

/// The shape that a chain of `Shape`, `Gather`, `Concat` and the like computes of a batch's values.
struct Shapes<'a> {
    onnx: &'a OnnxModel,
    producers: BTreeMap<&'a str, usize>,
    /// Size of the batch, if the file fixes it.
    batch: Option<i64>,
    /// Values that may still be looked at: a graph could join a value with itself again and again.
    left: Cell<usize>,
}

impl Shapes<'_> {
    fn of(&self, name: &str, depth: usize) -> Option<Vec<Dim>> {
        if let Some(values) = integers(self.onnx, name) {
            return Some(values.into_iter().map(Dim::Known).collect());
        }
        if depth == 0 || self.left.get() == 0 {
            return None;
        }
        self.left.set(self.left.get() - 1);
        let node = &self.onnx.nodes[*self.producers.get(name)?];
        let input = |at: usize| node.inputs.get(at).map(String::as_str);
        let whole = |at: usize| self.of(input(at)?, depth - 1);
        match node.op_type.as_str() {
            // Only the first axis of what depends on the input is known: the batch.
            "Shape" => match (node.int("start", 0), node.int("end", i64::MAX)) {
                (0, 1) => Some(vec![Dim::Batch]),
                _ => None,
            },
            "Gather" => {
                let of_shape = &self.onnx.nodes[*self.producers.get(input(0)?)?];
                let is_batch = of_shape.op_type == "Shape" && of_shape.int("start", 0) == 0;
                let picks_first = integers(self.onnx, input(1)?)? == [0] && node.int("axis", 0) == 0;
                (is_batch && picks_first).then(|| vec![Dim::Batch])
            }
            "Slice" => {
                let of_shape = &self.onnx.nodes[*self.producers.get(input(0)?)?];
                let is = |at: usize, key: &str, wanted: i64| numbers(self.onnx, node, at, key) == Some(vec![wanted]);
                let is_first = of_shape.op_type == "Shape" && is(1, "starts", 0) && is(2, "ends", 1);
                is_first.then(|| vec![Dim::Batch])
            }
            "Unsqueeze" | "Squeeze" | "Cast" | "Reshape" | "Identity" => whole(0).filter(|dims| dims.len() == 1),
            "Concat" => {
                let parts: Option<Vec<Vec<Dim>>> = (0..node.inputs.len()).map(whole).collect();
                Some(parts?.concat())
            }
            _ => None,
        }
    }

    /// Whether a reshape to these dimensions is one to (batch, values).
    fn is_flat(&self, dims: &[Dim], allows_zero: bool) -> bool {
        let is_batch = |dim: Dim| match dim {
            Dim::Batch => true,
            Dim::Known(0) => !allows_zero,
            Dim::Known(size) => self.batch == Some(size) || (self.batch.is_none() && size == 1),
        };
        match dims {
            // The rest follows from the linear layer that takes the values.
            [Dim::Known(-1), Dim::Known(size)] => *size > 0,
            [batch, Dim::Known(size)] => is_batch(*batch) && (*size > 0 || *size == -1),
            _ => false,
        }
    }
}

/// Most values that are looked at for the shapes of all reshapes.
const MAX_LOOKED_AT: usize = 10_000;
/// Most operations between a reshape and what its shape comes from.
const MAX_SHAPE_DEPTH: usize = 12;

/// Turns reshapes to (batch, values) into `Flatten`.
fn flattening(onnx: &mut OnnxModel) -> Result<()> {
    let flat: Vec<usize> = {
        let batch = onnx.inputs.iter().find_map(|input| *input.dims.first()?);
        let shapes = Shapes { onnx, producers: producers(onnx)?, batch, left: Cell::new(MAX_LOOKED_AT) };
        let is_flat = |node: &OnnxNode| match node.op_type.as_str() {
            "Flatten" => matches!(node.int("axis", 1), 1 | -3),
            "Reshape" => {
                let dims = match node.inputs.get(1) {
                    Some(name) => shapes.of(name, MAX_SHAPE_DEPTH),
                    None => Some(node.ints("shape", 0, 0).into_iter().map(Dim::Known).collect()),
                };
                dims.is_some_and(|dims| shapes.is_flat(&dims, node.int("allowzero", 0) == 1))
            }
            _ => false,
        };
        (0..onnx.nodes.len()).filter(|&i| is_flat(&onnx.nodes[i])).collect()
    };
    for i in flat {
        let node = &mut onnx.nodes[i];
        "Flatten".clone_into(&mut node.op_type);
        node.inputs.truncate(1);
        node.attributes = BTreeMap::from([("axis".to_owned(), OnnxAttribute::Int(1))]);
    }
    Ok(())
}

/// Turns `Add(MatMul(x, W), b)`, `Add(Gemm(x, W), b)` and `MatMul(x, W)` into a `Gemm`.
fn linear_layers(onnx: &mut OnnxModel) -> Result<()> {
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
fn paddings(onnx: &mut OnnxModel) -> Result<()> {
    let mut padded = Vec::new();
    {
        let producers = producers(onnx)?;
        for (i, node) in onnx.nodes.iter().enumerate().filter(|(_, node)| node.op_type == "Conv") {
            let mut pads = own_pads(onnx, node)?;
            let before = node.inputs.first().and_then(|input| producers.get(input.as_str())).map(|&at| &onnx.nodes[at]);
            let mut input = None;
            if let Some(pad) = before.filter(|node| node.op_type == "Pad") {
                let added = pads_of(onnx, pad)?;
                pads.iter_mut().zip(added).for_each(|(own, added)| *own += added);
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
    let mode = match node.attributes.get("auto_pad") {
        Some(OnnxAttribute::Text(mode)) => mode.as_str(),
        _ => "NOTSET",
    };
    if matches!(mode, "NOTSET" | "") {
        let pads = node.ints("pads", 0, 4);
        return pads.try_into().map_err(|pads: Vec<i64>| format!("{name}: expected four pads, found {}", pads.len()));
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
    if let Some(OnnxAttribute::Text(mode)) = pad.attributes.get("mode")
        && mode != "constant"
    {
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
fn leaky_relus(onnx: &mut OnnxModel) -> Result<()> {
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

/// Leaves the one output that is the embedding, without a division by its length.
fn choose_output(onnx: &mut OnnxModel, notes: &mut Vec<String>) -> Result<()> {
    let producers = producers(onnx)?;
    let is_norm = |name: &str| norm_of(onnx, &producers, name).is_some();
    let candidates: Vec<usize> = (0..onnx.outputs.len()).filter(|&i| !is_norm(&onnx.outputs[i].name)).collect();
    let Some(&chosen) = candidates.first() else {
        return Err(format!("expected an output with embeddings, found {} outputs", onnx.outputs.len()));
    };
    let embedding = normalised(onnx, &producers, &onnx.outputs[chosen].name);
    let others: Vec<String> =
        (0..onnx.outputs.len()).filter(|&i| i != chosen).map(|i| onnx.outputs[i].name.clone()).collect();
    if !others.is_empty() {
        notes.push(format!("the output {} is used, {} left out", onnx.outputs[chosen].name, others.join(", ")));
    }
    if let Some(embedding) = embedding {
        notes.push("the graph divides embeddings by their length: left out, it is done where they are compared".into());
        onnx.outputs[chosen].name = embedding;
    }
    onnx.outputs = vec![onnx.outputs.swap_remove(chosen)];
    Ok(())
}

/// Returns the embeddings `e` of a value that is `e` divided by its length.
fn normalised(onnx: &OnnxModel, producers: &BTreeMap<&str, usize>, name: &str) -> Option<String> {
    let node = &onnx.nodes[*producers.get(name)?];
    let input = |at: usize| node.inputs.get(at);
    let of = |e: &String, norm: &String| (norm_of(onnx, producers, norm)? == *e).then(|| e.clone());
    match node.op_type.as_str() {
        "Div" => of(input(0)?, input(1)?),
        "Mul" => {
            let reciprocal = |name: &String| -> Option<&String> {
                let node = &onnx.nodes[*producers.get(name.as_str())?];
                match node.op_type.as_str() {
                    "Reciprocal" => node.inputs.first(),
                    "Div" if scalar(onnx, node.inputs.first()?) == Some(1.0) => node.inputs.get(1),
                    _ => None,
                }
            };
            let [a, b] = [input(0)?, input(1)?];
            reciprocal(b).and_then(|norm| of(a, norm)).or_else(|| of(b, reciprocal(a)?))
        }
        "LpNormalization" if node.int("p", 2) == 2 && matches!(node.int("axis", -1), -1 | 1) => input(0).cloned(),
        _ => None,
    }
}

/// Returns the value whose lengths along the last axis `name` is, perhaps with a tiny addition.
fn norm_of(onnx: &OnnxModel, producers: &BTreeMap<&str, usize>, name: &str) -> Option<String> {
    let mut name = name;
    // Each step goes back in a graph without circles.
    loop {
        let node = &onnx.nodes[*producers.get(name)?];
        let input = |at: usize| node.inputs.get(at).map(String::as_str).filter(|name| !name.is_empty());
        let is_tiny = |name: &str| scalar(onnx, name).is_some_and(|v| (0.0..=MAX_EPSILON).contains(&v));
        let along_rows = |at: usize| numbers(onnx, node, at, "axes").is_some_and(|axes| matches!(axes[..], [1] | [-1]));
        match node.op_type.as_str() {
            "Expand" | "Unsqueeze" => name = input(0)?,
            "Clip" => {
                let low = match input(1) {
                    Some(low) => is_tiny(low),
                    None => f64::from(node.float("min", 0.0)) <= MAX_EPSILON,
                };
                if !low || input(2).is_some() {
                    return None;
                }
                name = input(0)?;
            }
            "Max" | "Add" => {
                let [a, b] = [input(0)?, input(1)?];
                name = match (is_tiny(a), is_tiny(b)) {
                    (_, true) => a,
                    (true, _) => b,
                    _ => return None,
                };
            }
            "ReduceL2" if along_rows(1) => return input(0).map(str::to_owned),
            "Sqrt" => return square_of(onnx, producers, input(0)?),
            _ => return None,
        }
    }
}

/// Returns the value whose squares along the last axis add up to `name`, perhaps with a tiny addition.
fn square_of(onnx: &OnnxModel, producers: &BTreeMap<&str, usize>, name: &str) -> Option<String> {
    let node = &onnx.nodes[*producers.get(name)?];
    let input = |node: &OnnxNode, at: usize| node.inputs.get(at).cloned().filter(|name| !name.is_empty());
    let is_tiny = |name: &String| scalar(onnx, name).is_some_and(|v| (0.0..=MAX_EPSILON).contains(&v));
    let along_rows = numbers(onnx, node, 1, "axes").is_some_and(|axes| matches!(axes[..], [1] | [-1]));
    match node.op_type.as_str() {
        "Add" => {
            let [a, b] = [input(node, 0)?, input(node, 1)?];
            let sum = if is_tiny(&b) { a } else { Some(b).filter(|_| is_tiny(&a))? };
            let inner = &onnx.nodes[*producers.get(sum.as_str())?];
            if inner.op_type == "Add" { None } else { square_of(onnx, producers, &sum) }
        }
        "ReduceSumSquare" if along_rows => input(node, 0),
        "ReduceSum" if along_rows => {
            let square = &onnx.nodes[*producers.get(input(node, 0)?.as_str())?];
            let (a, b) = (input(square, 0)?, input(square, 1)?);
            match square.op_type.as_str() {
                "Mul" if a == b => Some(a),
                "Pow" if scalar(onnx, &b) == Some(2.0) => Some(a),
                _ => None,
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(op_type: &str, inputs: &[&str], output: &str) -> OnnxNode {
        let inputs = inputs.iter().map(|name| (*name).to_owned()).collect();
        OnnxNode { op_type: op_type.to_owned(), inputs, outputs: vec![output.to_owned()], ..OnnxNode::default() }
    }

    #[test]
    fn constants_are_computed_as_far_as_they_stay_small() -> candle_core::Result<()> {
        let constant = |values: &[i64]| Tensor::new(values, &Device::Cpu);
        let weight = Tensor::arange(0f32, 12.0, &Device::Cpu)?.reshape((4, 3))?;
        let mut onnx = OnnxModel {
            initializers: BTreeMap::from([
                ("w".to_owned(), weight.clone()),
                ("zero".to_owned(), Tensor::zeros(1, DType::F32, &Device::Cpu)?),
                ("one".to_owned(), constant(&[1])?),
                ("rest".to_owned(), constant(&[0, -1])?),
                ("huge".to_owned(), constant(&[1 << 40, 1 << 40])?),
            ]),
            nodes: vec![
                node("Shape", &["w"], "shape"),
                node("Concat", &["shape", "one"], "joined"),
                node("Expand", &["zero", "shape"], "zeros"),
                node("Transpose", &["w"], "turned"),
                node("Reshape", &["turned", "rest"], "same"),
                node("Expand", &["zero", "huge"], "forged"),
                node("Unsqueeze", &["w", "one"], "wide"),
            ],
            ..OnnxModel::default()
        };
        fold_constants(&mut onnx).map_err(candle_core::Error::msg)?;
        let dims = |name: &str| onnx.initializers[name].dims().to_vec();
        assert_eq!(onnx.initializers["shape"].to_vec1::<i64>()?, [4, 3]);
        assert_eq!(onnx.initializers["joined"].to_vec1::<i64>()?, [4, 3, 1]);
        assert_eq!(
            (dims("zeros"), dims("turned"), dims("same"), dims("wide")),
            (vec![4, 3], vec![3, 4], vec![3, 4], vec![4, 1, 3])
        );
        assert_eq!(onnx.initializers["turned"].to_vec2::<f32>()?, weight.t()?.to_vec2::<f32>()?);
        let left: Vec<&str> = onnx.nodes.iter().map(|node| node.op_type.as_str()).collect();
        assert_eq!(left, ["Expand"], "what a forged shape asks for is not made");
        Ok(())
    }
}
