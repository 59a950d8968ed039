//! The output that is the embedding, without a division by its length.

use std::collections::BTreeMap;

use super::Result;
use super::constants::{numbers, scalar};
use super::producers;
use crate::weights::{OnnxModel, OnnxNode};

/// Most that may be added to a norm before the division by it.
const MAX_EPSILON: f64 = 1e-5;

/// Leaves the one output that is the embedding, without a division by its length.
pub(super) fn choose_output(onnx: &mut OnnxModel, notes: &mut Vec<String>) -> Result<()> {
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
                if !low || input(2).is_some() || node.attributes.contains_key("max") {
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
