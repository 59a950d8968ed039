//! Rewrites a graph as exporters write it into the few operations that our networks have, so that the matching need not
//! know every way of writing them.

mod constants;
mod layers;
mod output;
mod shapes;

use std::collections::{BTreeMap, BTreeSet};

use constants::fold_constants;
pub(super) use constants::numbers;
use layers::{leaky_relus, linear_layers, paddings};
use output::choose_output;
use shapes::flattening;

use super::Result;
use crate::weights::{OnnxModel, OnnxNode};

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
/// flattening is `Flatten`, paddings are in the convolutions, PReLU is `PRelu`; copies and casts are gone, and so is a
/// division of the embeddings by their length; constants are weights.
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
    refuse_foreign(onnx)?;
    Ok(notes)
}

/// Like [`simplify`], for graphs with any outputs and layers: drops copies, computes constants, and leaves paddings and
/// PReLU as they are there.
///
/// # Errors
/// Same as [`simplify`].
pub(super) fn tidy(onnx: &mut OnnxModel) -> Result<()> {
    drop_copies(onnx)?;
    sort(onnx)?;
    fold_constants(onnx)?;
    refuse_foreign(onnx)?;
    paddings(onnx)?;
    leaky_relus(onnx)?;
    sort(onnx)
}

/// Refuses operations of one runtime and those of quantised networks.
fn refuse_foreign(onnx: &OnnxModel) -> Result<()> {
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
    Ok(())
}

/// The node that computes each value.
pub(super) fn producers(onnx: &OnnxModel) -> Result<BTreeMap<&str, usize>> {
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
            "Identity" | "Dropout" => true,
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
