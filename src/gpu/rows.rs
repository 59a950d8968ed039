//! Small passes around matrix products: `kernels/rows.cu`.

use candle_core::{Result, bail};

use super::{Arg, Array, Element, Launch, fits};

/// Threads per block.
pub(super) const BLOCK: usize = 256;
/// Maximum number of blocks of a pass whose threads may loop over several accesses.
pub(super) const MAX_BLOCKS: usize = 4096;

/// Rows of `c` channels that a block takes at once.
pub(super) fn lines(what: &str, c: usize, element: Element) -> Result<usize> {
    let per_access = element.per_access();
    match c / per_access {
        groups @ 1..=BLOCK if c.is_multiple_of(per_access) => Ok(BLOCK / groups),
        _ => bail!("{what}: {c} channels of {element:?}"),
    }
}

/// Launch of blocks of [`BLOCK`] threads.
pub(super) fn over(blocks: usize, shared_bytes: usize) -> Launch {
    Launch { grid: [blocks as u32, 1], block: BLOCK as u32, shared_bytes: shared_bytes as u32 }
}

/// Launch of blocks that take rows of `c` channels, each line of threads one at a time.
///
/// # Errors
/// When the rows are no whole accesses, or too wide for a block.
pub(super) fn over_rows(what: &str, rows: usize, c: usize, element: Element) -> Result<Launch> {
    Ok(over(rows.div_ceil(lines(what, c, element)?).clamp(1, MAX_BLOCKS), 0))
}

/// Adds `bias: (c)` to each row of `y: (rows, c)`, f32.
pub(crate) fn add(y: &Array, bias: &Array) -> Result<()> {
    let (len, c) = (y.len(), bias.len());
    let rows = len / c.max(1);
    fits("add", Element::F32, &[(Some(bias), c), (Some(y), rows * c)])?;
    let args = [y.arg(), bias.arg(), Arg::I64(rows as i64), Arg::I32(c as i32)];
    // SAFETY: the arrays have rows of c elements.
    unsafe { y.device().launch("rows_add", over(len.div_ceil(BLOCK), 0), &args) }
}

/// Writes the column sums of `x: (rows, c)` to `sums: (c)`, f32.
pub(crate) fn sum(x: &Array, sums: &Array) -> Result<()> {
    let c = sums.len();
    let rows = x.len() / c.max(1);
    fits("sum", Element::F32, &[(Some(sums), c), (Some(x), rows * c)])?;
    let args = [x.arg(), Arg::I64(rows as i64), Arg::I32(c as i32), sums.arg()];
    // SAFETY: the arrays have rows of c elements.
    unsafe { x.device().launch("rows_sum", over(c.div_ceil(BLOCK), 0), &args) }
}

/// Writes the element-wise product of `a` and `b` to `y`, which may be one of them.
pub(crate) fn multiply(a: &Array, b: &Array, y: &Array) -> Result<()> {
    let (element, len) = (y.element(), y.len());
    fits("multiply", element, &[(Some(a), len), (Some(b), len)])?;
    let launch = over_accesses("multiply", len, element)?;
    let args = [a.arg(), b.arg(), Arg::I64(len as i64), y.arg()];
    // SAFETY: the arrays have this length and type.
    unsafe { y.device().launch(&format!("rows_multiply_{}", element.suffix()), launch, &args) }
}

/// Launch with a thread per access of `len` elements, up to [`MAX_BLOCKS`] blocks.
///
/// # Errors
/// When they are no whole accesses.
pub(super) fn over_accesses(what: &str, len: usize, element: Element) -> Result<Launch> {
    if !len.is_multiple_of(element.per_access()) {
        bail!("{what}: {len} {element:?} are no whole accesses");
    }
    Ok(over((len / element.per_access()).div_ceil(BLOCK).min(MAX_BLOCKS), 0))
}

/// Returns `x` in the type `element`; either type may be f32, bf16 or f16, and one of them is f32 if they differ.
pub(crate) fn in_type(x: &Array, element: Element) -> Result<Array> {
    if x.element() == element {
        return Ok(x.clone());
    }
    let y = x.device().array(element, x.len())?;
    convert(x, &y)?;
    Ok(y)
}

/// Converts `x` to the type of `y`: one of them is f32, the other bf16 or f16.
pub(crate) fn convert(x: &Array, y: &Array) -> Result<()> {
    let (kernel, short) = match x.element() {
        Element::F32 => ("convert", y.element()),
        short => ("widen", short),
    };
    let is_between =
        matches!(short, Element::Bf16 | Element::F16) && [x, y].iter().any(|x| x.element() == Element::F32);
    if x.len() != y.len() || !is_between {
        bail!("convert: {} {:?} to {} {:?}", x.len(), x.element(), y.len(), y.element());
    }
    let launch = over_accesses("convert", x.len(), short)?;
    let args = [x.arg(), Arg::I64(x.len() as i64), y.arg()];
    // SAFETY: both arrays have this length, one is f32 and the other the kernel's type.
    unsafe { x.device().launch(&format!("rows_{kernel}_{}", short.suffix()), launch, &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tests::{ELEMENTS, close, device, numbers, read, rounded, upload};

    #[test]
    fn biases_sums_products_and_conversions() -> Result<()> {
        let device = device();
        for (rows, c) in [(1, 1), (5, 7), (33, 300)] {
            let [x, bias] = [numbers("x", rows * c, [-1.0, 1.0]), numbers("bias", c, [-1.0, 1.0])];
            let (y, sums) = (device.upload(&x)?, device.upload(&bias)?);
            add(&y, &sums)?;
            let expected: Vec<f32> = x.iter().enumerate().map(|(i, x)| x + bias[i % c]).collect();
            close("add", &y, &expected, 0.0)?;
            sum(&device.upload(&x)?, &sums)?;
            let expected: Vec<f32> = (0..c).map(|j| (0..rows).map(|i| x[i * c + j]).sum()).collect();
            close("sum", &sums, &expected, 1e-6)?;
        }
        for element in ELEMENTS {
            let [a, b] = ["a", "b"].map(|name| rounded(&numbers(name, 4104, [-2.0, 2.0]), element));
            let (on_a, on_b) = (upload(&device, &a, element)?, upload(&device, &b, element)?);
            multiply(&on_a, &on_b, &on_a)?;
            close("multiply", &on_a, &a.iter().zip(&b).map(|(a, b)| a * b).collect::<Vec<_>>(), 0.0)?;
        }
        for element in [Element::Bf16, Element::F16] {
            for len in [8, 808, 50_000] {
                // The largest f16 is 65504: larger values become infinite.
                let x = numbers("x", len, [-70000.0, 70000.0]);
                let (short, back) = (device.array(element, len)?, device.array(Element::F32, len)?);
                convert(&device.upload(&x)?, &short)?;
                assert_eq!(read(&short)?, rounded(&x, element));
                convert(&short, &back)?;
                assert_eq!(read(&back)?, rounded(&x, element));
            }
        }
        Ok(())
    }
}
