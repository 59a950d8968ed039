//! A simplified graph from a file, as the matching asks for it.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::Result;
use super::simplify::{numbers, producers};
use crate::weights::{OnnxAttribute, OnnxModel, OnnxNode};

/// The file's graph, with the node that computes each value, by the value's name.
pub(super) struct File<'a> {
    pub(super) onnx: &'a OnnxModel,
    pub(super) producers: BTreeMap<&'a str, &'a OnnxNode>,
}

impl<'a> File<'a> {
    pub(super) fn new(onnx: &'a OnnxModel) -> Result<Self> {
        let producers = producers(onnx)?.into_iter().map(|(name, node)| (name, &onnx.nodes[node])).collect();
        Ok(Self { onnx, producers })
    }

    /// Returns the weight `name`.
    pub(super) fn weight(&self, name: &str) -> Result<&'a Tensor> {
        if let Some(kind) = self.onnx.unsupported.get(name) {
            return Err(format!("weight {name}: elements of ONNX type {kind} are not supported"));
        }
        self.onnx.initializers.get(name).ok_or_else(|| format!("expected {name} to be a weight, found none"))
    }

    /// Returns the values of a constant for the three channels of an image: one for all, or one each, of shape
    /// `(1, 3, 1, 1)` or `(3, 1, 1)`.
    pub(super) fn channels(&self, name: &str) -> Option<[f64; 3]> {
        let tensor = self.onnx.initializers.get(name)?;
        let values = || tensor.to_dtype(DType::F64).ok()?.flatten_all().ok()?.to_vec1::<f64>().ok();
        match tensor.dims() {
            [1, 3, 1, 1] | [3, 1, 1] => values()?.try_into().ok(),
            _ if tensor.elem_count() == 1 => Some([*values()?.first()?; 3]),
            _ => None,
        }
    }

    /// Returns `p` and a value `u` if `value` has the channel `p[k]` of `u` as its channel `k`.
    pub(super) fn permutation(&self, value: &str) -> Option<([usize; 3], &'a str)> {
        let node = *self.producers.get(value)?;
        let channel = |&index: &i64| usize::try_from(if index < 0 { index + 3 } else { index }).ok().filter(|&k| k < 3);
        let order = |indices: Vec<i64>| -> Option<[usize; 3]> {
            indices.iter().map(channel).collect::<Option<Vec<_>>>()?.try_into().ok()
        };
        let is_channels = |axis: i64| matches!(axis, 1 | -3);
        match node.op_type.as_str() {
            "Gather" if is_channels(node.int("axis", 0)) => {
                Some((order(numbers(self.onnx, node, 1, "")?)?, node.input(0).ok()?))
            }
            "Slice" => {
                let one =
                    |at: usize, key: &str| Some(<[i64; 1]>::try_from(numbers(self.onnx, node, at, key)?).ok()?[0]);
                let is_reversed = one(1, "starts")? == -1 && one(2, "ends")? <= -4 && one(4, "steps")? == -1;
                (is_reversed && is_channels(one(3, "axes")?)).then_some(([2, 1, 0], node.input(0).ok()?))
            }
            // Channels first, gather, channels back.
            "Transpose" if node.ints("perm", -1, 4) == [1, 0, 2, 3] => {
                let gather = *self.producers.get(node.input(0).ok()?)?;
                let before = *self.producers.get(gather.input(0).ok()?)?;
                let is_back = before.op_type == "Transpose" && before.ints("perm", -1, 4) == [1, 0, 2, 3];
                let gathers = match gather.op_type.as_str() {
                    "GatherND" => gather.int("batch_dims", 0) == 0,
                    "Gather" => gather.int("axis", 0) == 0,
                    _ => false,
                };
                let indices = order(numbers(self.onnx, gather, 1, "")?)?;
                (is_back && gathers).then_some((indices, before.input(0).ok()?))
            }
            "Concat" if is_channels(node.int("axis", 0)) && node.inputs.len() == 3 => {
                let mut order = [0; 3];
                let mut source = None;
                for (k, part) in node.inputs.iter().enumerate() {
                    let slice = *self.producers.get(part.as_str()).filter(|node| node.op_type == "Slice")?;
                    let one =
                        |at: usize, key: &str| Some(<[i64; 1]>::try_from(numbers(self.onnx, slice, at, key)?).ok()?[0]);
                    let steps = numbers(self.onnx, slice, 4, "steps").unwrap_or_else(|| vec![1]);
                    let (start, end) = (one(1, "starts")?, one(2, "ends")?);
                    if !is_channels(one(3, "axes")?)
                        || steps != [1]
                        || (start.checked_add(1) != Some(end) && !(start == 2 && end > 3))
                    {
                        return None;
                    }
                    order[k] = channel(&start)?;
                    let of = slice.input(0).ok()?;
                    if source.replace(of).is_some_and(|known| known != of) {
                        return None;
                    }
                }
                Some((order, source?))
            }
            _ => None,
        }
    }
}

impl OnnxNode {
    pub(super) fn input(&self, at: usize) -> Result<&str> {
        let what = || format!("{}: expected input {at}, found {} inputs", self.op_type, self.inputs.len());
        self.inputs.get(at).map(String::as_str).filter(|i| !i.is_empty()).ok_or_else(what)
    }

    pub(super) fn int(&self, name: &str, default: i64) -> i64 {
        match self.attributes.get(name) {
            Some(OnnxAttribute::Int(v)) => *v,
            _ => default,
        }
    }

    pub(super) fn text(&self, name: &str, default: &'static str) -> &str {
        match self.attributes.get(name) {
            Some(OnnxAttribute::Text(text)) => text,
            _ => default,
        }
    }

    /// Returns the number that the attribute `name` has `len` times.
    pub(super) fn same(&self, name: &str, default: i64, len: usize) -> Result<usize> {
        let found = self.ints(name, default, len);
        let is_same = found.len() == len && found.iter().all(|value| *value == found[0]);
        let value = found.first().and_then(|value| usize::try_from(*value).ok()).filter(|_| is_same);
        value.ok_or_else(|| format!("expected {name} that are the same on all sides, found {found:?}"))
    }

    pub(super) fn float(&self, name: &str, default: f32) -> f32 {
        match self.attributes.get(name) {
            Some(OnnxAttribute::Float(v)) => *v,
            _ => default,
        }
    }

    /// Returns the attribute `name`, or `len` times `default` if it is left out.
    pub(super) fn ints(&self, name: &str, default: i64, len: usize) -> Vec<i64> {
        match self.attributes.get(name) {
            Some(OnnxAttribute::Ints(v)) => v.clone(),
            _ => vec![default; len],
        }
    }
}
