//! Turns candle's storages and layouts into slices, and selects code by dtype. No other file of `ops` reads strides or
//! offsets.

use std::ops::{Deref, Range};

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, WithDType, bail};

/// The elements of a contiguous f32 tensor on the CPU, borrowed.
pub(crate) struct Values<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    /// Borrows the elements of `x`.
    ///
    /// # Errors
    /// When `x` is not contiguous, not f32 or not on the CPU.
    pub fn of(op: &str, x: &'a Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(_)) = &*storage else { bail!("{op}: expected f32 on the CPU") };
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("{op}: expected a contiguous tensor, found strides {:?} for {:?}", layout.stride(), layout.shape());
        };
        Ok(Self { range: start..end, storage: Box::new(storage) })
    }
}

impl Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.range.clone()],
            _ => unreachable!("checked when it was borrowed"),
        }
    }
}

/// Returns the contiguous elements that `layout` selects from a CPU storage.
pub(super) fn cpu<'a, T: WithDType>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{op}: expected a contiguous tensor, found strides {:?} for {:?}", layout.stride(), layout.shape());
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
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
