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

/// Returns some rows of `x: (k, d)`, f32.
///
/// # Errors
/// When there is no such row.
pub(crate) fn select(x: &Array, d: usize, index: &[u32]) -> Result<Array> {
    let y = x.device().array(Element::F32, index.len() * d)?;
    move_rows("rows_select", x, d, index, &y)?;
    Ok(y)
}

/// Replaces some rows of `x: (k, d)`, f32, each once.
///
/// # Errors
/// When there is no such row, or `by` has another size.
pub(crate) fn replace(x: &Array, d: usize, index: &[u32], by: &Array) -> Result<()> {
    move_rows("rows_replace", x, d, index, by)
}

/// Copies between some rows of `x` and all rows of `y`.
fn move_rows(kernel: &str, x: &Array, d: usize, index: &[u32], y: &Array) -> Result<()> {
    let (num, k) = (index.len(), x.len() / d.max(1));
    fits(kernel, Element::F32, &[(Some(x), k * d), (Some(y), num * d)])?;
    if let Some(row) = index.iter().find(|row| **row as usize >= k) {
        bail!("{kernel}: expected rows below {k}, found {row}");
    }
    if num == 0 {
        return Ok(());
    }
    let index: Vec<i64> = index.iter().map(|row| i64::from(*row)).collect();
    let index = x.device().upload(&index)?;
    let launch = over((num * d).div_ceil(BLOCK).min(MAX_BLOCKS), 0);
    let args = [x.arg(), index.arg(), Arg::I64(num as i64), Arg::I32(d as i32), y.arg()];
    // SAFETY: x has the rows of the index, and y as many of d elements.
    unsafe { x.device().launch(kernel, launch, &args) }
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
    fn rows_are_selected_and_replaced() -> Result<()> {
        let device = device();
        for (k, d, index) in [(1, 1, vec![0]), (7, 24, vec![0, 3, 6]), (300, 40, (0..300).rev().collect())] {
            let x = numbers("x", k * d, [-1.0, 1.0]);
            let on_gpu = device.upload(&x)?;
            let selected = select(&on_gpu, d, &index)?;
            let expected: Vec<f32> = index.iter().flat_map(|row| &x[*row as usize * d..][..d]).copied().collect();
            close("select", &selected, &expected, 0.0)?;
            let doubled: Vec<f32> = expected.iter().map(|x| 2.0 * x).collect();
            replace(&on_gpu, d, &index, &device.upload(&doubled)?)?;
            let of = |i: usize| if index.contains(&((i / d) as u32)) { 2.0 * x[i] } else { x[i] };
            close("replace", &on_gpu, &(0..k * d).map(of).collect::<Vec<f32>>(), 0.0)?;
        }
        let x = device.zeros(Element::F32, 12)?;
        let error = select(&x, 4, &[1, 3]).unwrap_err().to_string();
        assert!(error.contains("expected rows below 3, found 3"), "{error}");
        assert!(replace(&x, 4, &[1], &device.zeros(Element::F32, 8)?).is_err());
        assert_eq!(select(&x, 4, &[])?.len(), 0);
        Ok(())
    }

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
