//! Reader of ONNX files.

use std::borrow::Cow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::external::{External, Place};
use super::{OnnxAttribute, OnnxModel, OnnxNode, OnnxValue};
use crate::error::Error;
use crate::protobuf::{Field, Reader, Result, Value, WireError};
use crate::weights::elements::{self, ElementType};

/// Maximum number of operations, weights, attributes and names of each kind. A forged file could hold a hundred million
/// empty ones, each far larger in memory than in the file; our largest network has 900 operations.
const MAX_ITEMS: usize = 100_000;

/// Whether `head`, the first bytes of a file, may start an ONNX model: exporters write the IR version first.
pub(crate) fn looks_like_onnx(head: &[u8]) -> bool {
    matches!(head, [0x08, version, 0x12 | 0x3a | 0x42, ..] if (1..32).contains(version))
}

/// Maximum number of axes of a weight; our networks' have four.
const MAX_AXES: usize = 64;

/// Reads an ONNX model with its weights.
///
/// # Errors
/// When the file cannot be read, is not a valid ONNX model, or lacks a file of weights beside it. Memory stays within a
/// small multiple of the files' sizes.
pub fn read_onnx(path: &Path) -> crate::Result<OnnxModel> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let model = parse(&bytes, &mut External::beside(path)).map_err(not_onnx(path))?;
    if model.nodes.is_empty() {
        let what = "expected a graph with operations, found none".into();
        return Err(not_onnx(path)(WireError { offset: bytes.len(), what }));
    }
    Ok(model)
}

/// Says which file an error is in.
pub(super) fn not_onnx(path: &Path) -> impl Fn(WireError) -> Error {
    |e| Error::Format {
        path: path.to_owned(),
        offset: e.offset as u64,
        what: format!("not a valid ONNX model: {}", e.what),
    }
}

/// Reads a ModelProto.
pub(super) fn parse(bytes: &[u8], external: &mut External) -> Result<OnnxModel> {
    let mut model = OnnxModel::default();
    let mut reader = Reader::new(bytes, 0);
    let mut version = String::new();
    while let Some(field) = reader.next()? {
        match field.number {
            2 => model.producer = text(field)?,
            3 => version = text(field)?,
            7 => graph(message(field)?, &mut model, external)?,
            8 => {
                let (domain, version) = operator_set(message(field)?)?;
                if domain.is_empty() || domain == "ai.onnx" {
                    model.opset = version;
                }
            }
            14 => {
                let (key, value) = string_pair(message(field)?)?;
                bounded(model.metadata.len(), "metadata entries", field.offset)?;
                model.metadata.insert(key, value);
            }
            _ => {}
        }
    }
    if !version.is_empty() {
        model.producer = format!("{} {version}", model.producer);
    }
    Ok(model)
}

/// Reads a GraphProto into `model`.
fn graph(mut reader: Reader, model: &mut OnnxModel, external: &mut External) -> Result<()> {
    while let Some(field) = reader.next()? {
        match field.number {
            1 => {
                bounded(model.nodes.len(), "operations", field.offset)?;
                let node = node(message(field)?, model, field.offset)?;
                model.nodes.extend(node);
            }
            5 => {
                let (name, weight) = tensor(message(field)?, field.offset, Some(&mut *external))?;
                insert(model, name, weight, field.offset)?;
            }
            11 | 12 => {
                let values = if field.number == 11 { &mut model.inputs } else { &mut model.outputs };
                bounded(values.len(), "inputs and outputs", field.offset)?;
                values.push(value_info(message(field)?)?);
            }
            15 => return Err(wrong(field.offset, "sparse weights are not supported".into())),
            _ => {}
        }
    }
    // Old exporters list the weights among the inputs.
    model
        .inputs
        .retain(|input| !model.initializers.contains_key(&input.name) && !model.unsupported.contains_key(&input.name));
    Ok(())
}

fn insert(model: &mut OnnxModel, name: String, weight: Weight, offset: usize) -> Result<()> {
    bounded(model.initializers.len() + model.unsupported.len(), "weights", offset)?;
    if model.initializers.contains_key(&name) || model.unsupported.contains_key(&name) {
        return Err(wrong(offset, format!("two weights are named {name}")));
    }
    match weight {
        Weight::Tensor(tensor) => drop(model.initializers.insert(name, tensor)),
        Weight::Unsupported(kind) => drop(model.unsupported.insert(name, kind)),
    }
    Ok(())
}

/// Reads a NodeProto. A `Constant` becomes a weight instead of an operation.
fn node(mut reader: Reader, model: &mut OnnxModel, start: usize) -> Result<Option<OnnxNode>> {
    let mut node = OnnxNode::default();
    let (mut constant, mut domain) = (None, String::new());
    while let Some(field) = reader.next()? {
        match field.number {
            1 | 2 => {
                let names = if field.number == 1 { &mut node.inputs } else { &mut node.outputs };
                bounded(names.len(), "inputs or outputs of an operation", field.offset)?;
                names.push(text(field)?);
            }
            4 => node.op_type = text(field)?,
            5 => {
                bounded(node.attributes.len(), "attributes of an operation", field.offset)?;
                let (name, value, tensor) = attribute(message(field)?)?;
                constant = constant.or(tensor);
                node.attributes.insert(name, value);
            }
            7 => {
                let name = text(field)?;
                if !name.is_empty() && name != "ai.onnx" {
                    domain = name;
                }
            }
            _ => {}
        }
    }
    if !domain.is_empty() {
        node.op_type = format!("{domain}.{}", node.op_type);
    }
    if node.op_type != "Constant" {
        return Ok(Some(node));
    }
    let constant = match constant {
        Some(constant) => Some(constant),
        None => plain_constant(&node).map_err(|e| wrong(start, e.to_string()))?,
    };
    match (constant, node.outputs.first()) {
        (Some(weight), Some(name)) => {
            insert(model, name.clone(), weight, start)?;
            Ok(None)
        }
        _ => Ok(Some(node)),
    }
}

/// Returns the value of a `Constant` that is given as a number or a list of numbers.
fn plain_constant(node: &OnnxNode) -> candle_core::Result<Option<Weight>> {
    let value =
        ["value_float", "value_floats", "value_int", "value_ints"].iter().find_map(|key| node.attributes.get(*key));
    let tensor = match value {
        Some(OnnxAttribute::Float(value)) => Tensor::new(*value, &Device::Cpu)?,
        Some(OnnxAttribute::Floats(values)) => Tensor::new(values.as_slice(), &Device::Cpu)?,
        Some(OnnxAttribute::Int(value)) => Tensor::new(*value, &Device::Cpu)?,
        Some(OnnxAttribute::Ints(values)) => Tensor::new(values.as_slice(), &Device::Cpu)?,
        _ => return Ok(None),
    };
    Ok(Some(Weight::Tensor(tensor)))
}

/// A weight or another constant.
enum Weight {
    Tensor(Tensor),
    /// This ONNX type of elements, which no network of ours has.
    Unsupported(i64),
}

/// Reads an AttributeProto: its name, its value, and its tensor if it holds one.
fn attribute(mut reader: Reader) -> Result<(String, OnnxAttribute, Option<Weight>)> {
    let (mut name, mut value, mut constant) = (String::new(), OnnxAttribute::Other, None);
    let (mut ints, mut floats) = (Vec::new(), Vec::new());
    while let Some(field) = reader.next()? {
        match (field.number, field.value) {
            (1, _) => name = text(field)?,
            // Texts of other uses, such as exporters' notes, may be anything.
            (4, Value::Bytes { bytes, .. }) => value = OnnxAttribute::Text(String::from_utf8_lossy(bytes).into_owned()),
            (7, Value::Bytes { bytes, .. }) => {
                floats.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))));
            }
            (7, Value::Fixed32(bytes)) => floats.push(f32::from_le_bytes(bytes)),
            (2, Value::Fixed32(bytes)) => value = OnnxAttribute::Float(f32::from_le_bytes(bytes)),
            (3, Value::Varint(v)) => value = OnnxAttribute::Int(v as i64),
            (5, _) => constant = Some(tensor(message(field)?, field.offset, None)?.1),
            (8, _) => varints(field, &mut ints)?,
            _ => {}
        }
    }
    if !ints.is_empty() {
        value = OnnxAttribute::Ints(ints);
    } else if !floats.is_empty() {
        value = OnnxAttribute::Floats(floats);
    }
    Ok((name, value, constant))
}

/// Reads a TensorProto: its name and the tensor, which may lie in a file of `external`.
fn tensor(mut reader: Reader, start: usize, external: Option<&mut External>) -> Result<(String, Weight)> {
    let (mut place, mut is_external) = (Place::default(), false);
    let (mut name, mut dims, mut data_type, mut raw) = (String::new(), Vec::new(), 0, None);
    let (mut floats, mut ints, mut doubles): (Vec<f32>, Vec<i64>, Vec<f64>) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(field) = reader.next()? {
        match (field.number, field.value) {
            (1, _) => varints(field, &mut dims)?,
            (2, Value::Varint(v)) => data_type = v,
            (4, Value::Bytes { bytes, .. }) => {
                floats.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))));
            }
            (4, Value::Fixed32(bytes)) => floats.push(f32::from_le_bytes(bytes)),
            // int32_data also holds 16-bit floats.
            (5 | 7, _) => varints(field, &mut ints)?,
            (8, _) => name = text(field)?,
            (9, Value::Bytes { bytes, .. }) => raw = Some(bytes),
            (10, Value::Bytes { bytes, .. }) => {
                doubles.extend(bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes"))));
            }
            (10, Value::Fixed64(bytes)) => doubles.push(f64::from_le_bytes(bytes)),
            (13, _) => {
                let (key, value) = string_pair(message(field)?)?;
                let number = || value.parse().map_err(|_| wrong(field.offset, format!("{key}: expected a number")));
                match key.as_str() {
                    "location" => place.location = value,
                    "offset" => place.offset = number()?,
                    "length" => place.length = Some(number()?),
                    _ => {}
                }
            }
            (14, Value::Varint(1)) => is_external = true,
            _ => {}
        }
    }
    if dims.len() > MAX_AXES {
        return Err(wrong(start, format!("weight {name}: expected at most {MAX_AXES} axes, found {}", dims.len())));
    }
    let shape = dims.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<Vec<_>>>();
    let count = shape.as_ref().and_then(|s| s.iter().try_fold(1usize, |a, &b| a.checked_mul(b)));
    let (Some(shape), Some(count)) = (shape, count) else {
        return Err(wrong(start, format!("weight {name}: shape {dims:?} is out of range")));
    };
    let dtype = match data_type {
        1 => DType::F32,
        // 8-bit integers, without and with a sign.
        2 | 3 => DType::U8,
        6 => DType::I32,
        7 => DType::I64,
        10 => DType::F16,
        11 => DType::F64,
        16 => DType::BF16,
        // Exporters leave flags, texts and tables behind that no operation of ours uses.
        other => return Ok((name, Weight::Unsupported(other as i64))),
    };
    let raw = match (is_external, external) {
        (true, Some(external)) => {
            let num_bytes = count.checked_mul(dtype.size_in_bytes());
            let num_bytes = num_bytes.ok_or_else(|| wrong(start, format!("weight {name}: is too large")))?;
            Some(external.read(&place, num_bytes).map_err(|what| wrong(start, format!("weight {name}: {what}")))?)
        }
        (true, None) => return Err(wrong(start, format!("{name}: expected the value of an attribute in the file"))),
        (false, _) => raw,
    };
    let found = match (raw, dtype) {
        (Some(raw), _) => raw.len() / dtype.size_in_bytes(),
        (None, DType::F32) => floats.len(),
        (None, DType::F64) => doubles.len(),
        (None, _) => ints.len(),
    };
    if found != count || raw.is_some_and(|raw| raw.len() % dtype.size_in_bytes() != 0) {
        return Err(wrong(
            start,
            format!("weight {name}: expected {count} elements for shape {shape:?}, found {found}"),
        ));
    }
    let tensor = match (raw, dtype) {
        (raw, DType::U8) => {
            let bytes: Cow<[u8]> = match raw {
                Some(raw) => raw.into(),
                None => ints.iter().map(|value| *value as u8).collect(),
            };
            elements::tensor(if data_type == 3 { ElementType::I8 } else { ElementType::U8 }, &bytes, &shape)
        }
        (Some(raw), _) => Tensor::from_raw_buffer(raw, dtype, &shape, &Device::Cpu),
        (None, DType::F32) => Tensor::from_vec(floats, shape, &Device::Cpu),
        (None, DType::F64) => Tensor::from_vec(doubles, shape, &Device::Cpu),
        (None, DType::F16) => {
            Tensor::from_vec(ints.iter().map(|&v| f16::from_bits(v as u16)).collect(), shape, &Device::Cpu)
        }
        (None, DType::BF16) => {
            Tensor::from_vec(ints.iter().map(|&v| bf16::from_bits(v as u16)).collect(), shape, &Device::Cpu)
        }
        (None, DType::I32) => Tensor::from_vec(ints.iter().map(|&v| v as i32).collect(), shape, &Device::Cpu),
        (None, _) => Tensor::from_vec(ints, shape, &Device::Cpu),
    };
    let tensor = tensor.map_err(|e| wrong(start, format!("weight {name}: {e}")))?;
    Ok((name, Weight::Tensor(tensor)))
}

/// Reads a ValueInfoProto down to its TypeProto, TypeProto.Tensor, TensorShapeProto and Dimensions.
fn value_info(mut reader: Reader) -> Result<OnnxValue> {
    let mut value = OnnxValue { name: String::new(), dims: Vec::new() };
    while let Some(field) = reader.next()? {
        match field.number {
            1 => value.name = text(field)?,
            2 => {
                let Some(tensor) = only(message(field)?, 1)? else { continue };
                let Some(shape) = only(message(tensor)?, 2)? else { continue };
                let mut axes = message(shape)?;
                while let Some(axis) = axes.next()? {
                    bounded(value.dims.len(), "axes", axis.offset)?;
                    value.dims.push(match only(message(axis)?, 1)?.map(|f| f.value) {
                        Some(Value::Varint(v)) => i64::try_from(v).ok().filter(|&v| v > 0),
                        _ => None,
                    });
                }
            }
            _ => {}
        }
    }
    Ok(value)
}

/// Reads an OperatorSetIdProto: domain and version.
fn operator_set(mut reader: Reader) -> Result<(String, i64)> {
    let (mut domain, mut version) = (String::new(), 0);
    while let Some(field) = reader.next()? {
        match (field.number, field.value) {
            (1, _) => domain = text(field)?,
            (2, Value::Varint(v)) => version = v as i64,
            _ => {}
        }
    }
    Ok((domain, version))
}

/// Reads a StringStringEntryProto: key and value.
fn string_pair(mut reader: Reader) -> Result<(String, String)> {
    let (mut key, mut value) = (String::new(), String::new());
    while let Some(field) = reader.next()? {
        match field.number {
            1 => key = text(field)?,
            2 => value = text(field)?,
            _ => {}
        }
    }
    Ok((key, value))
}

/// Returns the last field with this number.
fn only<'a>(mut reader: Reader<'a>, number: u32) -> Result<Option<Field<'a>>> {
    let mut found = None;
    while let Some(field) = reader.next()? {
        if field.number == number {
            found = Some(field);
        }
    }
    Ok(found)
}

fn message<'a>(field: Field<'a>) -> Result<Reader<'a>> {
    match field.value {
        Value::Bytes { bytes, offset } => Ok(Reader::new(bytes, offset)),
        other => Err(wrong(field.offset, format!("field {}: expected a message, found {other:?}", field.number))),
    }
}

fn text(field: Field) -> Result<String> {
    match field.value {
        Value::Bytes { bytes, offset } => match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(e) => Err(wrong(offset + e.valid_up_to(), "expected UTF-8 text".into())),
        },
        other => Err(wrong(field.offset, format!("field {}: expected text, found {other:?}", field.number))),
    }
}

/// Appends the integers of a field, packed or single. Each byte of the file takes at most eight bytes in memory.
fn varints(field: Field, into: &mut Vec<i64>) -> Result<()> {
    match field.value {
        Value::Varint(v) => into.push(v as i64),
        Value::Bytes { bytes, offset } => {
            let mut reader = Reader::new(bytes, offset);
            while let Some(v) = reader.next_varint()? {
                into.push(v as i64);
            }
        }
        other => {
            return Err(wrong(field.offset, format!("field {}: expected integers, found {other:?}", field.number)));
        }
    }
    Ok(())
}

fn bounded(count: usize, what: &str, offset: usize) -> Result<()> {
    if count < MAX_ITEMS {
        Ok(())
    } else {
        Err(wrong(offset, format!("expected up to {MAX_ITEMS} {what}, found more")))
    }
}

fn wrong(offset: usize, what: String) -> WireError {
    WireError { offset, what }
}
