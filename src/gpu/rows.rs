//! Small passes over matrices of f32: `kernels/rows.cu`.

use candle_core::{Result, bail};

use super::{Arg, Array, Launch};

/// Threads of a block.
const BLOCK: usize = 256;
/// Blocks of a pass in which a thread takes more than one access.
const MAX_BLOCKS: usize = 4096;

/// Adds `bias: (c)` to each row of `y: (rows, c)`, f32.
pub(crate) fn add(y: &Array, bias: &Array) -> Result<()> {
    let (len, c) = (y.len(), bias.len());
    let launch = Launch { grid: [len.div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 };
    y.device().launch("rows_add", launch, &[y.arg(), bias.arg(), Arg::I64((len / c) as i64), Arg::I32(c as i32)])
}

/// Writes the sums of the columns of `x: (rows, c)` to `sums: (c)`, f32.
pub(crate) fn sum(x: &Array, sums: &Array) -> Result<()> {
    let c = sums.len();
    let launch = Launch { grid: [c.div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 };
    x.device().launch("rows_sum", launch, &[x.arg(), Arg::I64((x.len() / c) as i64), Arg::I32(c as i32), sums.arg()])
}

/// Writes the f32 values of `x` to `y` in the type of that.
pub(crate) fn convert(x: &Array, y: &Array) -> Result<()> {
    let per_access = y.element().per_access();
    if x.len() != y.len() || !x.len().is_multiple_of(per_access) {
        bail!("convert: {} f32 to {} {:?}", x.len(), y.len(), y.element());
    }
    let blocks = (x.len() / per_access).div_ceil(BLOCK).min(MAX_BLOCKS);
    let launch = Launch { grid: [blocks as u32, 1], block: BLOCK as u32, shared_bytes: 0 };
    let kernel = format!("rows_convert_{}", y.element().suffix());
    x.device().launch(&kernel, launch, &[x.arg(), Arg::I64(x.len() as i64), y.arg()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Element;
    use crate::gpu::host::Host;
    use crate::gpu::host::tests::{ELEMENTS, close, numbers};

    #[test]
    fn biases_sums_and_conversions() -> Result<()> {
        let device = Host::device();
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
            for len in [8, 808, 50_000] {
                let x = numbers("x", len, [-70000.0, 70000.0]);
                let y = device.array(element, len)?;
                convert(&device.upload(&x)?, &y)?;
                let x: Vec<f32> = match element {
                    // The largest f16 is 65504.
                    Element::F16 => x.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect(),
                    _ => x,
                };
                if element == Element::F16 {
                    assert!(y.read::<half::f16>()?.iter().map(|y| y.to_f32()).eq(x));
                } else {
                    close("convert", &y, &x, 0.0)?;
                }
            }
        }
        Ok(())
    }
}
