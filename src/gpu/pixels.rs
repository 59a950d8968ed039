//! Passes over the pixels of images: `kernels/pixels.cu`.

use candle_core::Result;

use super::batch_norm::Seen;
use super::rows::{lines, over, over_accesses, over_rows};
use super::{Arg, Array, fits};
use crate::ops::backend::Activation;

/// Writes `factor` times the sums over the pixels of `x: (n, pixels, c)`, or of its products with `with`, to `y: (n,
/// c)`.
pub(crate) fn sums(x: Seen, with: Option<&Array>, [n, pixels, c]: [usize; 3], factor: f32, y: &Array) -> Result<()> {
    let element = x.x.element();
    let lines = lines("pixels", c, element)?;
    let len = n * pixels * c;
    fits("pixels", element, &[(Some(x.x), len), (with, len), (Some(y), n * c)])?;
    let [constants, slopes] = x.norm_args(c)?;
    let sizes = [Arg::I64(pixels as i64), Arg::I32(c as i32), Arg::F32(factor)];
    let [num_pixels, channels, factor] = sizes;
    let args = [x.x.arg(), constants, slopes, with.into(), num_pixels, channels, factor, y.arg()];
    // SAFETY: the arrays have these sizes and one type; c is of whole accesses.
    unsafe { y.device().launch(&format!("pixels_sums_{}", element.suffix()), over(n, 4 * lines * c), &args) }
}

/// Writes `x * by * factor + plus` to `y: (n, pixels, c)`, `by` being `(n, c)`; `x` is 1 and `plus` 0 if not given.
pub(crate) fn scale(
    x: Option<Seen>,
    (by, factor): (&Array, f32),
    plus: Option<Seen>,
    [n, pixels, c]: [usize; 3],
    y: &Array,
) -> Result<()> {
    let (element, rows) = (y.element(), n * pixels);
    let launch = over_rows("pixels", rows, c, element)?;
    let [len, of_x, of_plus] = [Some(y), x.map(|x| x.x), plus.map(|plus| plus.x)].map(|x| (x, rows * c));
    fits("pixels", element, &[len, of_x, of_plus, (Some(by), n * c)])?;
    let [constants, slopes] = x.map_or(Ok([Arg::Null; 2]), |x| x.norm_args(c))?;
    let [plus_constants, plus_slopes] = plus.map_or(Ok([Arg::Null; 2]), |plus| plus.norm_args(c))?;
    let [x, plus] = [x, plus].map(|seen| Arg::from(seen.map(|seen| seen.x)));
    let args = [
        x,
        constants,
        slopes,
        by.arg(),
        Arg::F32(factor),
        plus,
        plus_constants,
        plus_slopes,
        Arg::I64(rows as i64),
        Arg::I64(pixels as i64),
        Arg::I32(c as i32),
        y.arg(),
    ];
    // SAFETY: the arrays have these sizes and one type; c is of whole accesses.
    unsafe { y.device().launch(&format!("pixels_scale_{}", element.suffix()), launch, &args) }
}

fn kind(activation: Activation) -> Arg<'static> {
    Arg::I32(match activation {
        Activation::Relu => 0,
        Activation::Sigmoid => 1,
    })
}

/// Writes the activation of `x` to `y`.
pub(crate) fn activate(x: &Array, activation: Activation, y: &Array) -> Result<()> {
    let (element, len) = (y.element(), y.len());
    fits("pixels", element, &[(Some(x), len)])?;
    let launch = over_accesses("pixels", len, element)?;
    let args = [x.arg(), Arg::I64(len as i64), kind(activation), y.arg()];
    // SAFETY: the arrays have this length, of whole accesses, and one type.
    unsafe { y.device().launch(&format!("pixels_activate_{}", element.suffix()), launch, &args) }
}

/// Writes the gradient of an activation's input to `gx`, from its result and the gradient of that.
pub(crate) fn activate_backward(y: &Array, gy: &Array, activation: Activation, gx: &Array) -> Result<()> {
    let (element, len) = (gx.element(), gx.len());
    fits("pixels", element, &[(Some(y), len), (Some(gy), len)])?;
    let launch = over_accesses("pixels", len, element)?;
    let args = [y.arg(), gy.arg(), Arg::I64(len as i64), kind(activation), gx.arg()];
    // SAFETY: the arrays have this length, of whole accesses, and one type.
    unsafe { gx.device().launch(&format!("pixels_activate_grad_{}", element.suffix()), launch, &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Element;
    use crate::gpu::batch_norm::Norm;
    use crate::gpu::tests::{ELEMENTS, close, device, numbers, rounded, upload};
    use crate::ops::channels::{self, Constants};
    use crate::ops::pixels;

    /// One pixel, odd numbers of pixels, several lines, channels that leave threads idle, the widest of a network.
    const SIZES: [[usize; 3]; 4] = [[1, 1, 8], [2, 7, 24], [3, 900, 40], [2, 49, 512]];

    #[test]
    fn sums_and_products_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (element, [n, pixels, c]) in ELEMENTS.into_iter().flat_map(|e| SIZES.map(|sizes| (e, sizes))) {
            let [x, other] = ["x", "other"].map(|name| rounded(&numbers(name, n * pixels * c, [-2.0, 2.0]), element));
            let by = rounded(&numbers("by", n * c, [0.0, 1.0]), element);
            let constants = Constants {
                scale: numbers("scale", c, [0.5, 1.5]),
                shift: numbers("shift", c, [-0.5, 0.5]),
                slope: Some(numbers("slope", c, [0.1, 0.4])),
            };
            let norm = Norm::constant(&device, &constants.scale, &constants.shift, constants.slope.as_deref())?;
            let [on_x, on_other, on_by] = [&x, &other, &by].map(|values| upload(&device, values, element));
            let (on_x, on_other, on_by) = (on_x?, on_other?, on_by?);
            let (factors, y) = (device.array(element, n * c)?, device.array(element, n * pixels * c)?);
            for is_normed in [false, true] {
                let seen = Seen { x: &on_x, norm: is_normed.then_some(&norm) };
                let on_cpu = channels::Seen { x: &x, constants: is_normed.then_some(&constants) };
                let share = 1.0 / pixels as f32;
                for (with, of_cpu) in [(None, None), (Some(&on_other), Some(other.as_slice()))] {
                    sums(seen, with, [n, pixels, c], share, &factors)?;
                    let mut expected = vec![0.0; n * c];
                    pixels::sums(on_cpu, of_cpu, [pixels, c], share, &mut expected);
                    close("sums", &factors, &expected, 1e-5)?;
                }
                for (x, of_x, plus, of_plus) in [
                    (Some(seen), Some(on_cpu), None, None),
                    (None, None, Some(seen), Some(on_cpu)),
                    (
                        Some(seen),
                        Some(on_cpu),
                        Some(Seen { x: &on_other, norm: None }),
                        Some(channels::Seen { x: &other, constants: None }),
                    ),
                ] {
                    scale(x, (&on_by, 0.5), plus, [n, pixels, c], &y)?;
                    let mut expected = vec![0.0; n * pixels * c];
                    pixels::scale(of_x, &by, 0.5, of_plus, c, &mut expected);
                    close("scale", &y, &expected, 1e-5)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn activations_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (element, len) in ELEMENTS.into_iter().flat_map(|e| [(e, 8), (e, 5000)]) {
            let [x, gy] = ["x", "gy"].map(|name| rounded(&numbers(name, len, [-4.0, 4.0]), element));
            for activation in [Activation::Relu, Activation::Sigmoid] {
                let (y, gx) = (device.array(element, len)?, device.array(element, len)?);
                activate(&upload(&device, &x, element)?, activation, &y)?;
                let mut expected = vec![0.0; len];
                pixels::activate(channels::Seen { x: &x, constants: None }, activation, 1, &mut expected);
                close("activation", &y, &expected, 1e-6)?;
                let result = rounded(&expected, element);
                activate_backward(
                    &upload(&device, &result, element)?,
                    &upload(&device, &gy, element)?,
                    activation,
                    &gx,
                )?;
                let mut expected = vec![0.0; len];
                pixels::activate_backward(&result, &gy, activation, &mut expected);
                close("gradient", &gx, &expected, 1e-6)?;
            }
        }
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_an_error() -> Result<()> {
        let device = device();
        let (x, y) = (device.zeros(Element::F32, 2 * 3 * 12)?, device.zeros(Element::F32, 24)?);
        let seen = Seen { x: &x, norm: None };
        let error = sums(seen, None, [2, 4, 12], 1.0, &y).unwrap_err().to_string();
        assert!(error.contains("expected 96 F32, found 72"), "{error}");
        let error = scale(Some(seen), (&y, 1.0), None, [2, 4, 9], &x).unwrap_err().to_string();
        assert!(error.contains("9 channels of F32"), "{error}");
        let error = activate(&x, Activation::Relu, &y).unwrap_err().to_string();
        assert!(error.contains("expected 24 F32, found 72"), "{error}");
        let odd = device.zeros(Element::Bf16, 12)?;
        let error = activate_backward(&odd, &odd, Activation::Sigmoid, &odd).unwrap_err().to_string();
        assert!(error.contains("12 Bf16 are no whole accesses"), "{error}");
        let norm = Norm::constant(&device, &[1.0; 8], &[0.0; 8], None)?;
        let seen = Seen { x: &x, norm: Some(&norm) };
        let error = sums(seen, None, [2, 3, 12], 1.0, &y).unwrap_err().to_string();
        assert!(error.contains("a norm of 8 channels for 12"), "{error}");
        Ok(())
    }
}
