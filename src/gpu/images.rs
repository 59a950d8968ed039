//! Image normalisation: `kernels/images.cu`.

use candle_core::Result;

use super::rows::{BLOCK, over};
use super::{Arg, Array, Element, fits};
use crate::ops::backend::Scaling;

/// Writes RGB pixels `(pixels, 3)`, u8, to `y: (pixels, c)`, normalised, with zeros after the third channel; `c` is the
/// number of elements per access.
pub(crate) fn normalise(x: &Array, scaling: Scaling, y: &Array) -> Result<()> {
    let pixels = x.len() / 3;
    fits("images", Element::U8, &[(Some(x), 3 * pixels)])?;
    fits("images", y.element(), &[(Some(y), pixels * y.element().per_access())])?;
    let Scaling { mean, std, is_bgr } = scaling;
    let args = [x.arg(), Arg::I64(pixels as i64), Arg::F32(mean), Arg::F32(std), Arg::I32(is_bgr.into()), y.arg()];
    let (kernel, launch) = (format!("images_normalise_{}", y.element().suffix()), over(pixels.div_ceil(BLOCK), 0));
    // SAFETY: x has three bytes per pixel, y one access.
    unsafe { x.device().launch(&kernel, launch, &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tests::{ELEMENTS, close, device};

    #[test]
    fn pixels_are_normalised_in_the_order_of_the_network() -> Result<()> {
        let device = device();
        let pixels: Vec<u8> = (0..3 * 300).map(|i| (i * 7 % 256) as u8).collect();
        let x = device.upload(&pixels)?;
        for (element, is_bgr) in ELEMENTS.into_iter().flat_map(|e| [(e, false), (e, true)]) {
            let c = element.per_access();
            let y = device.array(element, 300 * c)?;
            normalise(&x, Scaling { mean: 0.5, std: 0.25, is_bgr }, &y)?;
            let value = |i: usize| match i % c {
                channel @ 0..3 => {
                    let channel = if is_bgr { 2 - channel } else { channel };
                    (f32::from(pixels[i / c * 3 + channel]) / 255.0 - 0.5) / 0.25
                }
                _ => 0.0,
            };
            close("pixels", &y, &(0..300 * c).map(value).collect::<Vec<_>>(), 1e-6)?;
        }
        Ok(())
    }
}
