//! Max pooling and nearest upsampling: `kernels/pool.cu`.

use candle_core::{Result, bail};

use super::batch_norm::Seen;
use super::rows::over_rows;
use super::{Arg, Array, fits};
use crate::ops::pool::Window;

/// Sizes for a kernel, each of which counts pixels or channels of an image.
fn sizes<const N: usize>(sizes: [usize; N]) -> Result<[Arg<'static>; N]> {
    if sizes.iter().any(|size| i32::try_from(*size).is_err()) {
        bail!("pool: sizes {sizes:?} are too large");
    }
    Ok(sizes.map(|size| Arg::I32(size as i32)))
}

/// Writes the largest value of each window of `x: (n, h, w, c)` to `y`.
pub(crate) fn max_pool(x: Seen, window: Window, shape: [usize; 4], y: &Array) -> Result<()> {
    let [_, h, w, c] = shape;
    let [n, ho, wo, _] = window.output_shape(shape)?;
    let (element, rows) = (y.element(), n * ho * wo);
    fits("pool", element, &[(Some(x.x), n * h * w * c), (Some(y), rows * c)])?;
    let [constants, slopes] = x.norm_args(c)?;
    let mut args = vec![x.x.arg(), constants, slopes, Arg::I64(rows as i64)];
    args.extend(sizes([h, w, ho, wo, window.size, window.stride, window.padding, c])?);
    args.push(y.arg());
    // SAFETY: the arrays have these sizes and one type.
    unsafe { y.device().launch(&format!("pool_max_{}", element.suffix()), over_rows("pool", rows, c, element)?, &args) }
}

/// Writes the gradient of the input `x: (n, h, w, c)` of max pooling, plus `other`, to `gx`.
pub(crate) fn max_pool_backward(
    x: Seen,
    window: Window,
    shape: [usize; 4],
    gy: &Array,
    other: Option<&Array>,
    gx: &Array,
) -> Result<()> {
    let [_, h, w, c] = shape;
    let [n, ho, wo, _] = window.output_shape(shape)?;
    let (element, rows) = (gx.element(), n * h * w);
    let of_input = [Some(x.x), other, Some(gx)].map(|x| (x, rows * c));
    fits("pool", element, &[&of_input[..], &[(Some(gy), n * ho * wo * c)]].concat())?;
    let [constants, slopes] = x.norm_args(c)?;
    let mut args = vec![x.x.arg(), constants, slopes, gy.arg(), other.into(), Arg::I64(rows as i64)];
    args.extend(sizes([h, w, ho, wo, window.size, window.stride, window.padding, c])?);
    args.push(gx.arg());
    // SAFETY: the arrays have these sizes and one type.
    unsafe {
        gx.device().launch(&format!("pool_max_grad_{}", element.suffix()), over_rows("pool", rows, c, element)?, &args)
    }
}

/// Writes each pixel of `x: (n, h, w, c)` to a square of `factor` by `factor` pixels of `y`.
pub(crate) fn upsample(x: Seen, factor: usize, [n, h, w, c]: [usize; 4], y: &Array) -> Result<()> {
    let (element, rows) = (y.element(), n * h * w * factor * factor);
    fits("pool", element, &[(Some(x.x), n * h * w * c), (Some(y), rows * c)])?;
    let [constants, slopes] = x.norm_args(c)?;
    let mut args = vec![x.x.arg(), constants, slopes, Arg::I64(rows as i64)];
    args.extend(sizes([w * factor, factor, c])?);
    args.push(y.arg());
    // SAFETY: the arrays have these sizes and one type.
    unsafe {
        y.device().launch(&format!("pool_upsample_{}", element.suffix()), over_rows("pool", rows, c, element)?, &args)
    }
}

/// Writes the gradient of the input of upsampling, `(n, h, w, c)`, plus `other`, to `gx`.
pub(crate) fn upsample_backward(
    gy: &Array,
    factor: usize,
    [n, h, w, c]: [usize; 4],
    other: Option<&Array>,
    gx: &Array,
) -> Result<()> {
    let (element, rows) = (gx.element(), n * h * w);
    fits("pool", element, &[(Some(gy), rows * factor * factor * c), (other, rows * c), (Some(gx), rows * c)])?;
    let mut args = vec![gy.arg(), other.into(), Arg::I64(rows as i64)];
    args.extend(sizes([w, factor, c])?);
    args.push(gx.arg());
    // SAFETY: the arrays have these sizes and one type.
    unsafe {
        gx.device().launch(
            &format!("pool_upsample_grad_{}", element.suffix()),
            over_rows("pool", rows, c, element)?,
            &args,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Element;
    use crate::gpu::batch_norm::Norm;
    use crate::gpu::tests::{ELEMENTS, close, device, numbers, rounded, upload};
    use crate::ops::channels::{self, Constants};
    use crate::ops::pool;

    /// Shapes and windows: one pixel, separate and overlapping ones, pixels that no window reads, several lines of
    /// threads, channels that leave threads idle.
    const CASES: [([usize; 4], [usize; 3]); 5] = [
        ([1, 1, 1, 8], [1, 1, 0]),
        ([2, 4, 6, 24], [2, 2, 0]),
        ([2, 7, 5, 40], [3, 2, 1]),
        ([3, 5, 6, 8], [3, 1, 1]),
        ([1, 8, 9, 512], [2, 3, 1]),
    ];

    #[test]
    fn pooling_and_upsampling_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (element, (shape, [size, stride, padding])) in ELEMENTS.into_iter().flat_map(|e| CASES.map(|c| (e, c))) {
            let (window, c) = (Window { size, stride, padding }, shape[3]);
            let len: usize = shape.iter().product();
            let num_results = window.output_shape(shape)?.iter().product();
            // Few different values: many windows have several largest ones.
            let x: Vec<f32> = numbers("x", len, [-3.0, 3.0]).into_iter().map(f32::round).collect();
            let [gy, other] = [("gy", num_results), ("other", len)]
                .map(|(name, len)| rounded(&numbers(name, len, [-2.0, 2.0]), element));
            let constants = Constants {
                scale: numbers("scale", c, [-1.0, 1.0]),
                shift: numbers("shift", c, [-1.0, 1.0]),
                slope: Some(numbers("slope", c, [-0.5, 0.5])),
            };
            let norm = Norm::constant(&device, &constants.scale, &constants.shift, constants.slope.as_deref())?;
            let on_device = |values: &[f32]| upload(&device, values, element);
            let (x_on, gy_on, other_on) = (on_device(&x)?, on_device(&gy)?, on_device(&other)?);
            for has_norm in [false, true] {
                let seen = channels::Seen { x: &x, constants: Some(&constants).filter(|_| has_norm) };
                let seen_on = Seen { x: &x_on, norm: Some(&norm).filter(|_| has_norm) };
                let (y, mut expected) = (device.array(element, num_results)?, vec![f32::NAN; num_results]);
                max_pool(seen_on, window, shape, &y)?;
                pool::max_pool(seen, window, shape, &mut expected)?;
                close("max pooling", &y, &expected, 1e-5)?;
                let factor = stride;
                let (y, mut expected) =
                    (device.array(element, len * factor * factor)?, vec![f32::NAN; len * factor * factor]);
                upsample(seen_on, factor, shape, &y)?;
                pool::upsample(seen, factor, shape, &mut expected);
                close("upsampling", &y, &expected, 1e-5)?;
                for has_other in [false, true] {
                    let (gx, mut expected) = (device.array(element, len)?, vec![f32::NAN; len]);
                    let of = Some(other.as_slice()).filter(|_| has_other);
                    let of_device = Some(&other_on).filter(|_| has_other);
                    max_pool_backward(seen_on, window, shape, &gy_on, of_device, &gx)?;
                    pool::max_pool_backward(seen, window, shape, &gy, of, &mut expected)?;
                    close("gradient of max pooling", &gx, &expected, 1e-5)?;
                    let gy = rounded(&numbers("wide", len * factor * factor, [-2.0, 2.0]), element);
                    upsample_backward(&on_device(&gy)?, factor, shape, of_device, &gx)?;
                    pool::upsample_backward(&gy, factor, shape, of, &mut expected);
                    close("gradient of upsampling", &gx, &expected, 1e-5)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_nan_stays_nan() -> Result<()> {
        let (device, window) = (device(), Window { size: 2, stride: 2, padding: 0 });
        let mut x = vec![f32::NEG_INFINITY; 2 * 4 * 8];
        x[5] = f32::NAN;
        let y = device.array(Element::F32, 16)?;
        max_pool(Seen { x: &device.upload(&x)?, norm: None }, window, [1, 2, 4, 8], &y)?;
        for (i, y) in y.read::<f32>()?.into_iter().enumerate() {
            assert!(if i == 5 { y.is_nan() } else { y == f32::NEG_INFINITY }, "{i}: {y}");
        }
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_an_error() -> Result<()> {
        let (device, window) = (device(), Window { size: 2, stride: 2, padding: 0 });
        let (x, y) = (device.zeros(Element::F32, 128)?, device.zeros(Element::F32, 32)?);
        let seen = Seen { x: &x, norm: None };
        let error = |result: Result<()>| result.expect_err("an error").to_string();
        assert!(error(max_pool(seen, window, [1, 4, 4, 4], &y)).contains("expected 64 F32, found 128"));
        assert!(error(max_pool(seen, window, [1, 1, 4, 32], &y)).contains("1x4 pixels by windows of size 2"));
        assert!(error(max_pool_backward(seen, window, [1, 4, 4, 8], &x, None, &x)).contains("expected 32"));
        assert!(error(upsample(seen, 2, [1, 4, 4, 8], &y)).contains("expected 512"));
        assert!(error(upsample_backward(&x, 2, [1, 2, 2, 8], Some(&x), &y)).contains("expected 32"));
        let odd = device.zeros(Element::F32, 8 * 9)?;
        let result = max_pool(Seen { x: &odd, norm: None }, window, [1, 2, 4, 9], &device.zeros(Element::F32, 18)?);
        assert!(error(result).contains("pool: 9 channels of F32"));
        let bf16 = device.zeros(Element::Bf16, 32)?;
        assert!(error(max_pool(seen, window, [1, 4, 4, 8], &bf16)).contains("expected 128 Bf16, found 128 F32"));
        Ok(())
    }
}
