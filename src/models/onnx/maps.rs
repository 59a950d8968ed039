//! Pooling and upsampling as files write them.

use candle_core::DType;

use super::Result;
use super::file::File;
use crate::ops::pool::Window;
use crate::weights::OnnxNode;

/// Returns the windows of a max pooling.
///
/// # Errors
/// When they are not square, or pads are not explicit, sides are rounded up or pixels left out.
pub(super) fn window(node: &OnnxNode) -> Result<Window> {
    let size = node.same("kernel_shape", 0, 2)?;
    let window = Window { size, stride: node.same("strides", 1, 2)?, padding: node.same("pads", 0, 4)? };
    if node.int("ceil_mode", 0) != 0
        || node.text("auto_pad", "NOTSET") != "NOTSET"
        || node.same("dilations", 1, 2)? != 1
    {
        return Err("expected pooling with explicit pads, without dilation and with sides rounded down".into());
    }
    Ok(window)
}

/// Returns the factor of a nearest upsampling. Sizes that the file computes from another map, which the result is then
/// added to, are taken as a doubling: with any other factor the sum would not fit.
///
/// # Errors
/// When it is another interpolation, or its factor is not whole.
pub(super) fn nearest_factor(file: &File, node: &OnnxNode) -> Result<usize> {
    let mode = node.text("mode", "nearest");
    let rounds = node.text("nearest_mode", "round_prefer_floor");
    let coordinates = node.text("coordinate_transformation_mode", "half_pixel");
    // For whole factors each of these pairs reads the pixel whose square it is: nothing lies half way.
    let is_nearest = match coordinates {
        "asymmetric" => rounds == "floor",
        "half_pixel" | "pytorch_half_pixel" => rounds.starts_with("round"),
        _ => false,
    };
    if mode != "nearest" || !is_nearest {
        return Err(format!("expected nearest upsampling, found {mode}, {coordinates}, {rounds}"));
    }
    // Before operator set 11 there is no region of interest.
    let scales = node.inputs.get(if node.inputs.len() > 2 { 2 } else { 1 }).filter(|name| !name.is_empty());
    let numbers = |name: &String| -> Result<Vec<f32>> {
        let numbers = file.weight(name)?.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1());
        numbers.map_err(|error| error.to_string())
    };
    let scales = scales.map(numbers).transpose()?.filter(|scales| !scales.is_empty());
    match scales.as_deref() {
        None if node.inputs.len() > 3 && !file.onnx.initializers.contains_key(&node.inputs[3]) => Ok(2),
        Some(&[1.0, 1.0, h, w]) if h == w && h >= 1.0 && h.fract() == 0.0 && h <= 64.0 => Ok(h as usize),
        found => Err(format!("expected upsampling by a whole factor, found scales {found:?}")),
    }
}
