//! What a graph computes from constants alone.

use candle_core::{DType, Device, Tensor};

use super::Result;
use crate::weights::{OnnxAttribute, OnnxModel, OnnxNode};

/// Constants that are computed, rather than stored, may have this many times the elements of all stored ones: weights
/// are only arranged anew.
const MAX_GROWTH: usize = 2;
/// Most elements that a constant is repeated to: a bias. A forged shape could ask for any number.
const MAX_EXPANDED: usize = 1 << 16;
/// Most axes of a constant that is computed with: our networks' weights have four.
const MAX_RANK: usize = 8;
/// Most axes, steps or sizes that an operation is given.
const MAX_NUMBERS: usize = 64;

/// The value of a constant with one element.
pub(super) fn scalar(onnx: &OnnxModel, name: &str) -> Option<f64> {
    let tensor = onnx.initializers.get(name).filter(|t| t.elem_count() == 1)?;
    tensor.to_dtype(DType::F64).ok()?.flatten_all().ok()?.to_vec1::<f64>().ok()?.first().copied()
}

/// The whole numbers of a constant.
pub(super) fn integers(onnx: &OnnxModel, name: &str) -> Option<Vec<i64>> {
    let tensor = onnx.initializers.get(name).filter(|t| t.elem_count() <= MAX_NUMBERS && t.dtype().is_int())?;
    tensor.to_dtype(DType::I64).ok()?.flatten_all().ok()?.to_vec1().ok()
}

/// Axes, steps and the like: an input of newer operator sets, an attribute of older ones.
pub(in super::super) fn numbers(onnx: &OnnxModel, node: &OnnxNode, at: usize, key: &str) -> Option<Vec<i64>> {
    match node.inputs.get(at).filter(|name| !name.is_empty()) {
        Some(name) => integers(onnx, name),
        None => match node.attributes.get(key) {
            Some(OnnxAttribute::Ints(values)) if values.len() <= MAX_NUMBERS => Some(values.clone()),
            Some(OnnxAttribute::Int(value)) => Some(vec![*value]),
            _ => None,
        },
    }
}

/// Computes what depends on constants alone, as far as exporters arrange weights and shapes.
pub(super) fn fold_constants(onnx: &mut OnnxModel) -> Result<()> {
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
    let Some(x) = constant(0).filter(|x| x.rank() <= MAX_RANK) else { return Ok(None) };
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
            if rank > MAX_RANK {
                return Ok(None);
            }
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
            let Some(dims) = reshaped(x.dims(), &shape) else { return Ok(None) };
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

/// Returns the dimensions that `Reshape` gives a tensor of shape `dims`: 0 keeps one, -1 takes what is left.
fn reshaped(dims: &[usize], shape: &[i64]) -> Option<Vec<usize>> {
    let kept = |(i, &dim): (usize, &i64)| match dim {
        0 => dims.get(i).copied(),
        -1 => Some(1),
        dim => usize::try_from(dim).ok(),
    };
    let mut result = shape.iter().enumerate().map(kept).collect::<Option<Vec<usize>>>()?;
    let known = result.iter().try_fold(1usize, |a, &b| a.checked_mul(b))?;
    let num = dims.iter().product::<usize>();
    let mut open = (0..shape.len()).filter(|&i| shape[i] == -1);
    if let Some(i) = open.next() {
        result[i] = num.checked_div(known)?;
    }
    let is_whole = result.iter().try_fold(1usize, |a, &b| a.checked_mul(b)) == Some(num);
    (open.next().is_none() && is_whole).then_some(result)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

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
                ("axes".to_owned(), constant(&[0, 1, 2, 3, 4, 5, 6, 7])?),
            ]),
            nodes: vec![
                node("Shape", &["w"], "shape"),
                node("Concat", &["shape", "one"], "joined"),
                node("Expand", &["zero", "shape"], "zeros"),
                node("Transpose", &["w"], "turned"),
                node("Reshape", &["turned", "rest"], "same"),
                node("Expand", &["zero", "huge"], "forged"),
                node("Unsqueeze", &["w", "one"], "wide"),
                node("Unsqueeze", &["w", "axes"], "deep"),
                node("Reshape", &["w", "huge"], "overflow"),
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
        assert_eq!(left, ["Expand", "Unsqueeze", "Reshape"], "what forged numbers ask for is not made");
        Ok(())
    }
}
