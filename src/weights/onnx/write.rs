//! Writer of ONNX files.

use std::path::Path;

use candle_core::{DType, Tensor};

use super::{OnnxAttribute, OnnxModel, OnnxNode, OnnxValue};
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::protobuf::Writer;
use crate::weights::elements::bytes_of_int8;

/// IR version 8 came with opset 15, and all runtimes of recent years read it.
const IR_VERSION: i64 = 8;
/// ONNX's type numbers.
const FLOAT: i64 = 1;
const UINT8: i64 = 2;
const INT8: i64 = 3;
/// Maximum length of a protocol buffer.
const MAX_BYTES: usize = i32::MAX as usize;

/// Writes a model with weights of f32, or of 8-bit integers, atomically; integers of 16 bits are written as those of 8
/// bits, from which they were read.
///
/// # Errors
/// When a weight is of another type or an integer of 16 bits does not fit 8, the model is larger than protocol buffers
/// allow (2 GiB), or the folder cannot be written to.
pub fn write_onnx(path: &Path, model: &OnnxModel) -> Result<()> {
    let wrong = |what: String| Error::Checkpoint { path: path.to_owned(), what };
    let mut graph = Writer::default();
    for node in &model.nodes {
        graph = graph.message(1, node_proto(node));
    }
    graph = graph.bytes(2, b"maskinv");
    for (name, tensor) in &model.initializers {
        let weight = tensor_proto(name, tensor).map_err(|e| wrong(format!("weight {name}: {e}")))?;
        graph = graph.message(5, weight);
    }
    for input in &model.inputs {
        graph = graph.message(11, value_info(input));
    }
    for output in &model.outputs {
        graph = graph.message(12, value_info(output));
    }
    // This crate's version is left out, so that the same weights give the same bytes.
    let mut file = Writer::default()
        .int(1, IR_VERSION)
        .bytes(2, b"maskinv")
        .message(7, graph)
        .message(8, Writer::default().bytes(1, b"").int(2, model.opset));
    for (key, value) in &model.metadata {
        file = file.message(14, Writer::default().bytes(1, key.as_bytes()).bytes(2, value.as_bytes()));
    }
    let bytes = file.finish();
    if bytes.len() > MAX_BYTES {
        return Err(wrong(format!("{} bytes exceed the 2 GiB limit of ONNX files", bytes.len())));
    }
    write_atomic(path, &bytes)
}

fn node_proto(node: &OnnxNode) -> Writer {
    let mut proto = Writer::default();
    for input in &node.inputs {
        proto = proto.bytes(1, input.as_bytes());
    }
    for output in &node.outputs {
        proto = proto.bytes(2, output.as_bytes());
    }
    proto = proto.bytes(4, node.op_type.as_bytes());
    for (name, value) in &node.attributes {
        let attribute = Writer::default().bytes(1, name.as_bytes());
        // The last field of each attribute is its type number.
        let attribute = match value {
            OnnxAttribute::Float(v) => attribute.float(2, *v).int(20, 1),
            OnnxAttribute::Int(v) => attribute.int(3, *v).int(20, 2),
            OnnxAttribute::Ints(vs) => vs.iter().fold(attribute, |a, &v| a.int(8, v)).int(20, 7),
            OnnxAttribute::Floats(vs) => vs.iter().fold(attribute, |a, &v| a.float(7, v)).int(20, 6),
            OnnxAttribute::Text(text) => attribute.bytes(4, text.as_bytes()).int(20, 3),
            OnnxAttribute::Other => continue,
        };
        proto = proto.message(5, attribute);
    }
    proto
}

fn tensor_proto(name: &str, tensor: &Tensor) -> candle_core::Result<Writer> {
    let flat = tensor.flatten_all()?;
    let (kind, raw): (i64, Vec<u8>) = match tensor.dtype() {
        DType::F32 => (FLOAT, flat.to_vec1::<f32>()?.iter().flat_map(|v| v.to_le_bytes()).collect()),
        DType::U8 => (UINT8, flat.to_vec1()?),
        DType::I16 => (INT8, bytes_of_int8(tensor)?),
        other => candle_core::bail!("expected f32 or 8-bit integers, found {other:?}"),
    };
    let proto = tensor.dims().iter().fold(Writer::default(), |p, &d| p.int(1, d as i64));
    Ok(proto.int(2, kind).bytes(8, name.as_bytes()).bytes(9, &raw))
}

fn value_info(value: &OnnxValue) -> Writer {
    let mut shape = Writer::default();
    for dim in &value.dims {
        shape = shape.message(
            1,
            match dim {
                Some(size) => Writer::default().int(1, *size),
                None => Writer::default().bytes(2, b"batch"),
            },
        );
    }
    let tensor = Writer::default().int(1, FLOAT).message(2, shape);
    Writer::default().bytes(1, value.name.as_bytes()).message(2, Writer::default().message(1, tensor))
}
