//! Conversion of stored little-endian elements to tensors.

use candle_core::{DType, Device, Result, Tensor, bail};

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ElementType {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl ElementType {
    /// Returns the size of one element in bytes.
    pub(super) fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

/// Returns the tensor of shape `dims` whose elements, last dimension fastest, are `bytes`. Types are kept, except for
/// two that candle lacks: `I8` becomes `i16`, and `Bool` becomes `u8` with the values 0 and 1.
///
/// The caller must have checked that `bytes` holds exactly these elements.
pub(super) fn tensor(element: ElementType, bytes: &[u8], dims: &[usize]) -> Result<Tensor> {
    let raw = |dtype| Tensor::from_raw_buffer(bytes, dtype, dims, &Device::Cpu);
    match element {
        ElementType::F64 => raw(DType::F64),
        ElementType::F32 => raw(DType::F32),
        ElementType::F16 => raw(DType::F16),
        ElementType::Bf16 => raw(DType::BF16),
        ElementType::I64 => raw(DType::I64),
        ElementType::I32 => raw(DType::I32),
        ElementType::I16 => raw(DType::I16),
        ElementType::U8 => raw(DType::U8),
        ElementType::I8 => {
            let values = bytes.iter().map(|b| i16::from(b.cast_signed())).collect();
            Tensor::from_vec::<_, i16>(values, dims, &Device::Cpu)
        }
        ElementType::Bool => {
            let values = bytes.iter().map(|b| u8::from(*b != 0)).collect();
            Tensor::from_vec::<_, u8>(values, dims, &Device::Cpu)
        }
    }
}

/// Returns the bytes of 8-bit signed integers, which [`tensor`] makes integers of 16 bits.
///
/// # Errors
/// When one does not fit 8 bits.
pub(super) fn bytes_of_int8(tensor: &Tensor) -> Result<Vec<u8>> {
    let narrow = |value: i16| match i8::try_from(value) {
        Ok(value) => Ok(value.cast_unsigned()),
        Err(_) => bail!("expected an integer of 8 bits, found {value}"),
    };
    tensor.flatten_all()?.to_vec1::<i16>()?.into_iter().map(narrow).collect()
}

/// Returns the number of elements of a tensor of shape `dims`, or `None` on overflow. The product of the non-zero sizes
/// must not overflow either: strides are computed from it even when the tensor is empty.
pub(super) fn num_elements(dims: &[usize]) -> Option<usize> {
    let product = dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim.max(1)))?;
    // At up to 8 bytes per element, the tensor must fit the address space.
    isize::try_from(product.checked_mul(8)?).ok()?;
    Some(if dims.contains(&0) { 0 } else { product })
}
