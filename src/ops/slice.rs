//! The only reader of candle storages and layouts, and the only place that branches on the dtype.

use candle_core::{CpuStorage, Layout, Result, WithDType, bail};

/// Returns the contiguous elements that `layout` selects of a CPU storage.
pub(super) fn cpu<'a, T: WithDType>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{op}: expected a contiguous tensor, found strides {:?} for {:?}", layout.stride(), layout.shape());
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

/// As [`cpu`], to be written.
pub(super) fn cpu_f32_mut<'a>(op: &str, storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{op}: expected a contiguous tensor, found strides {:?} for {:?}", layout.stride(), layout.shape());
    };
    match storage {
        CpuStorage::F32(data) => Ok(&mut data[start..end]),
        _ => bail!("{op}: expected f32 on the CPU"),
    }
}

/// Evaluates `$body` with the type name `$t` standing for the element type of `$storage`: f32, or f64 for gradient
/// checks. A macro because a closure cannot be generic.
macro_rules! for_float {
    ($op:expr, $storage:expr, $t:ident => $body:expr) => {
        match $storage {
            candle_core::CpuStorage::F32(_) => {
                type $t = f32;
                $body
            }
            candle_core::CpuStorage::F64(_) => {
                type $t = f64;
                $body
            }
            _ => candle_core::bail!("{}: expected f32 or f64", $op),
        }
    };
}
pub(super) use for_float;
