//! Concatenation of channels: `kernels/concat.cu`.

use candle_core::{Result, bail};

use super::batch_norm::Seen;
use super::rows::{BLOCK, MAX_BLOCKS, over};
use super::{Arg, Array, fits};

/// Rows of channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Channels {
    /// Number of channels of a row.
    pub all: usize,
    /// The first one that is read or written.
    pub first: usize,
}

/// Copies `c` channels of each row of `x`, plus `other`, to `y`, where zeros follow them up to `width` channels. `other`
/// lies as `y` does.
pub(crate) fn copy(
    (x, from): (Seen, Channels),
    other: Option<&Array>,
    [c, width]: [usize; 2],
    (y, to): (&Array, Channels),
) -> Result<()> {
    let (element, rows) = (y.element(), y.len() / to.all.max(1));
    let are_inside = c <= width && from.first + c <= from.all && to.first + width <= to.all;
    if !are_inside || i32::try_from(from.all.max(to.all)).is_err() {
        bail!("concat: {c} channels of {from:?} to {width} of {to:?}");
    }
    fits("concat", element, &[(Some(x.x), rows * from.all), (other, rows * to.all), (Some(y), rows * to.all)])?;
    let [constants, slopes] = x.norm_args(from.all)?;
    let size = |size: usize| Arg::I32(size as i32);
    let args = [
        x.x.arg(),
        constants,
        slopes,
        size(from.all),
        size(from.first),
        other.into(),
        Arg::I64(rows as i64),
        size(c),
        size(width),
        y.arg(),
        size(to.all),
        size(to.first),
    ];
    let launch = over((rows * width).div_ceil(BLOCK).clamp(1, MAX_BLOCKS), 0);
    // SAFETY: the arrays have these rows and one type, and the channels lie in them.
    unsafe { y.device().launch(&format!("concat_copy_{}", element.suffix()), launch, &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Element;
    use crate::gpu::batch_norm::Norm;
    use crate::gpu::tests::{ELEMENTS, close, device, numbers, rounded, upload};
    use crate::ops::channels::Constants;
    use crate::ops::{channels, concat};

    #[test]
    fn parts_without_padding_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (element, (rows, of_parts)) in
            ELEMENTS.into_iter().flat_map(|e| [(e, (1, [8, 8])), (e, (7, [3, 21])), (e, (900, [40, 11]))])
        {
            let total: usize = of_parts.iter().sum();
            let padded = |c: usize| c.next_multiple_of(element.per_access());
            let parts = of_parts.map(|c| rounded(&numbers("part", rows * c, [-2.0, 2.0]), element));
            let constants = of_parts.map(|c| Constants {
                scale: numbers("scale", c, [-1.0, 1.0]),
                shift: numbers("shift", c, [-1.0, 1.0]),
                slope: Some(numbers("slope", c, [-0.5, 0.5])),
            });
            let widened = |values: &[f32], c: usize, to: usize| -> Vec<f32> {
                values.chunks(c).flat_map(|row| [row, &vec![0.0; to - c]].concat()).collect()
            };
            let seen = |i: usize| (channels::Seen { x: &parts[i], constants: Some(&constants[i]) }, of_parts[i]);
            let mut expected = vec![f32::NAN; rows * total];
            concat::concat(&[seen(0), seen(1)], &mut expected);
            let y = device.array(element, rows * padded(total))?;
            let mut first = 0;
            for (i, c) in of_parts.into_iter().enumerate() {
                let Constants { scale, shift, slope } = &constants[i];
                let wide = |values: &[f32]| widened(values, c, padded(c));
                let slopes = slope.as_deref().map(wide);
                let norm = Norm::constant(&device, &wide(scale), &wide(shift), slopes.as_deref())?;
                let x = upload(&device, &wide(&parts[i]), element)?;
                let width = if i + 1 == of_parts.len() { padded(total) - first } else { c };
                let from = (Seen { x: &x, norm: Some(&norm) }, Channels { all: padded(c), first: 0 });
                copy(from, None, [c, width], (&y, Channels { all: padded(total), first }))?;
                first += c;
            }
            close("concatenation", &y, &widened(&expected, total, padded(total)), 1e-5)?;
            let gy = rounded(&numbers("gy", rows * total, [-2.0, 2.0]), element);
            let gy_on = upload(&device, &widened(&gy, total, padded(total)), element)?;
            let mut first = 0;
            for (c, has_other) in of_parts.into_iter().zip([true, false]) {
                let other = rounded(&numbers("other", rows * c, [-2.0, 2.0]), element);
                let other = Some(other).filter(|_| has_other);
                let mut expected = vec![f32::NAN; rows * c];
                concat::take(&gy, [first, total, c], other.as_deref(), &mut expected);
                let other = other.map(|other| upload(&device, &widened(&other, c, padded(c)), element)).transpose()?;
                let gx = device.array(element, rows * padded(c))?;
                let from = (Seen { x: &gy_on, norm: None }, Channels { all: padded(total), first });
                copy(from, other.as_ref(), [c, padded(c)], (&gx, Channels { all: padded(c), first: 0 }))?;
                close("gradient", &gx, &widened(&expected, c, padded(c)), 1e-5)?;
                first += c;
            }
        }
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_an_error() -> Result<()> {
        let device = device();
        let (x, y) = (device.zeros(Element::F32, 24)?, device.zeros(Element::F32, 48)?);
        let seen = Seen { x: &x, norm: None };
        let part = |all: usize, first: usize| Channels { all, first };
        let error = |result: Result<()>| result.expect_err("an error").to_string();
        let past = error(copy((seen, part(8, 4)), None, [8, 8], (&y, part(16, 0))));
        assert!(past.contains("8 channels of Channels { all: 8, first: 4 }"), "{past}");
        assert!(error(copy((seen, part(8, 0)), None, [8, 8], (&y, part(16, 9)))).contains("to 8 of"));
        assert!(
            error(copy((seen, part(8, 0)), Some(&x), [8, 8], (&y, part(16, 8)))).contains("expected 48 F32, found 24")
        );
        assert!(
            error(copy((seen, part(12, 0)), None, [8, 8], (&y, part(16, 8)))).contains("expected 36 F32, found 24")
        );
        Ok(())
    }
}
