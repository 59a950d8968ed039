//! Shapes that a graph computes, as far as they tell flattening from other reshapes.

use std::cell::Cell;
use std::collections::BTreeMap;

use super::Result;
use super::constants::{integers, numbers};
use super::producers;
use crate::weights::{OnnxAttribute, OnnxModel, OnnxNode};

/// Most values that are looked at for the shapes of all reshapes.
const MAX_LOOKED_AT: usize = 10_000;
/// Most operations between a reshape and what its shape comes from.
const MAX_SHAPE_DEPTH: usize = 12;

/// Turns reshapes to (batch, values) into `Flatten`.
pub(super) fn flattening(onnx: &mut OnnxModel) -> Result<()> {
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
