//! Batch norm with PReLU over `(rows, c)`, channels last: `kernels/batch_norm.cu`.

use candle_core::{Error, Result, bail};

use super::{Arg, Array, Device, Element, Launch, exchange, fits};
use crate::dist::{Collective, Ranks};

/// Threads per block.
const BLOCK: usize = 256;
/// Maximum number of blocks that share the rows of a sum; the sums' rounding depends on it.
const MAX_CHUNKS: usize = 1024;
/// Maximum number of blocks that share the rows of a pass without sums.
const MAX_BLOCKS: usize = 2048;

/// An activation and the norm it is read through.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    /// `(rows, c)`.
    pub x: &'a Array,
    /// None reads the activation unchanged.
    pub norm: Option<&'a Norm>,
}

impl<'a> Seen<'a> {
    /// The norm's constants and slopes for a kernel over `c` channels; null without a norm or PReLU.
    pub fn norm_args(&self, c: usize) -> Result<[Arg<'a>; 2]> {
        self.norm.map_or(Ok([Arg::Null; 2]), |norm| norm.args(c))
    }
}

/// A norm with its statistics.
#[derive(Clone, Debug)]
pub(crate) struct Norm {
    /// `(4, c)`, f32: scale, shift, mean, inverse standard deviation.
    constants: Array,
    /// Slopes of the PReLU after the norm, `(c)`, f32.
    slopes: Option<Array>,
    /// Whether the statistics are the batch's own, so that the gradient flows through them.
    of_batch: bool,
    /// Ranks whose batches the statistics are of too.
    ranks: Option<Ranks>,
}

/// Parameters and running statistics of a norm, `(c)` each, f32.
#[derive(Clone)]
pub(crate) struct NormArrays {
    pub weight: Array,
    pub bias: Array,
    /// Slopes of the PReLU after the norm.
    pub slopes: Option<Array>,
    pub running_mean: Array,
    pub running_var: Array,
    pub eps: f32,
    /// Weight of the batch's statistics in an update of the running ones.
    pub momentum: f32,
}

/// Output arrays for the gradients of a norm's parameters, `(c)` each, f32.
pub(crate) struct NormGrads<'a> {
    pub weight: &'a Array,
    pub bias: &'a Array,
    pub slopes: Option<&'a Array>,
}

/// Division of rows of `c` channels among the threads of a block, `lines` rows at a time.
struct Share {
    lines: usize,
    rows: usize,
    c: usize,
}

impl Share {
    fn new(x: &Array, c: usize) -> Result<Self> {
        let groups = c / x.element().per_access();
        if groups == 0 || !c.is_multiple_of(x.element().per_access()) || groups > BLOCK || !x.len().is_multiple_of(c) {
            bail!("batch_norm: {} {:?} in rows of {c} channels", x.len(), x.element());
        }
        Ok(Self { lines: BLOCK / groups, rows: x.len() / c, c })
    }

    /// Rows per block in a pass with sums: at least four for each of its lines.
    fn chunk(&self) -> usize {
        self.rows.div_ceil(MAX_CHUNKS).max(4 * self.lines)
    }

    fn chunks(&self) -> usize {
        self.rows.div_ceil(self.chunk())
    }

    fn over_chunks(&self, sums: usize) -> Launch {
        let shared_bytes = (sums * self.lines * self.c * 4) as u32;
        Launch { grid: [self.chunks() as u32, 1], block: BLOCK as u32, shared_bytes }
    }

    fn over_rows(&self) -> Launch {
        let blocks = self.rows.div_ceil(self.lines).min(MAX_BLOCKS);
        Launch { grid: [blocks as u32, 1], block: BLOCK as u32, shared_bytes: 0 }
    }

    /// Launch with one warp per channel.
    fn warps(&self) -> Launch {
        Launch { grid: [(self.c * 32).div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 }
    }

    fn sizes(&self) -> [Arg<'static>; 2] {
        [Arg::I64(self.rows as i64), Arg::I32(self.c as i32)]
    }
}

impl NormArrays {
    /// Returns the number of channels.
    ///
    /// # Errors
    /// When the arrays have not all one f32 per channel.
    fn channels(&self) -> Result<usize> {
        let Self { weight, bias, slopes, running_mean, running_var, .. } = self;
        let c = weight.len();
        let all = [Some(weight), Some(bias), slopes.as_ref(), Some(running_mean), Some(running_var)];
        fits("batch_norm", Element::F32, &all.map(|array| (array, c)))?;
        Ok(c)
    }
}

impl Norm {
    /// Constants and slopes for a kernel over `c` channels; null without PReLU.
    fn args(&self, c: usize) -> Result<[Arg<'_>; 2]> {
        if self.constants.len() != 4 * c || self.slopes.as_ref().is_some_and(|slopes| slopes.len() != c) {
            bail!("batch_norm: a norm of {} channels for {c}", self.constants.len() / 4);
        }
        Ok([self.constants.arg(), self.slopes.as_ref().into()])
    }

    /// Returns a norm by the statistics of `x: (rows, c)`, or of those of all `ranks`, which have as many rows; they
    /// also update the running ones.
    pub fn of_batch(x: &Array, params: &NormArrays, ranks: Option<&Ranks>) -> Result<Self> {
        let c = params.channels()?;
        let (device, share) = (x.device(), Share::new(x, c)?);
        let ([rows, channels], chunk) = (share.sizes(), Arg::I64(share.chunk() as i64));
        let means = device.array(Element::F32, share.chunks() * c)?;
        let m2s = device.array(Element::F32, share.chunks() * c)?;
        let constants = device.array(Element::F32, 4 * c)?;
        let stats = format!("batch_norm_stats_{}", x.element().suffix());
        let args = [x.arg(), rows, channels, chunk, means.arg(), m2s.arg()];
        // SAFETY: x has these rows, and each chunk has its own c means and sums.
        unsafe { device.launch(&stats, share.over_chunks(2), &args)? };
        // Of a chunk of rows each, this many floats apart.
        let (moments, stride, all_rows, chunk) = match ranks {
            None => ([means, m2s], c, share.rows, chunk),
            Some(ranks) => {
                let joined = device.array(Element::F32, 2 * c)?;
                let args = [means.arg(), m2s.arg(), rows, channels, chunk, joined.arg()];
                // SAFETY: as above; two numbers per channel are joined.
                unsafe { device.launch("batch_norm_join", share.warps(), &args)? };
                let all = exchange::collect(&joined, Collective::Gather, ranks).map_err(Error::wrap)?;
                let m2s = all.part(c, all.len() - c);
                ([all, m2s], 2 * c, ranks.size() * share.rows, rows)
            }
        };
        let args = [
            moments[0].arg(),
            moments[1].arg(),
            Arg::I32(stride as i32),
            Arg::I64(all_rows as i64),
            channels,
            chunk,
            params.weight.arg(),
            params.bias.arg(),
            Arg::F32(params.eps),
            Arg::F32(params.momentum),
            params.running_mean.arg(),
            params.running_var.arg(),
            constants.arg(),
        ];
        // SAFETY: the parameters have c channels, the constants four times as many, and the rest is as above.
        unsafe { device.launch("batch_norm_finish", share.warps(), &args)? };
        Ok(Self { constants, slopes: params.slopes.clone(), of_batch: true, ranks: ranks.cloned() })
    }

    /// Returns a norm by the running statistics.
    pub fn frozen(params: &NormArrays) -> Result<Self> {
        let (device, c) = (params.weight.device(), params.channels()?);
        let constants = device.array(Element::F32, 4 * c)?;
        let launch = Launch { grid: [c.div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 };
        let args = [
            params.running_mean.arg(),
            params.running_var.arg(),
            Arg::I32(c as i32),
            params.weight.arg(),
            params.bias.arg(),
            Arg::F32(params.eps),
            constants.arg(),
        ];
        // SAFETY: the parameters have c channels, the constants four times as many.
        unsafe { device.launch("batch_norm_frozen", launch, &args)? };
        Ok(Self { constants, slopes: params.slopes.clone(), of_batch: false, ranks: None })
    }

    /// Returns a norm that scales and shifts each channel, and whose statistics never change: without a backward pass.
    pub fn constant(device: &Device, scale: &[f32], shift: &[f32], slopes: Option<&[f32]>) -> Result<Self> {
        let nothing = vec![0.0; 2 * scale.len()];
        let constants = device.upload(&[scale, shift, &nothing].concat())?;
        Ok(Self {
            constants,
            slopes: slopes.map(|slopes| device.upload(slopes)).transpose()?,
            of_batch: false,
            ranks: None,
        })
    }

    /// Whether a PReLU follows.
    pub fn has_slopes(&self) -> bool {
        self.slopes.is_some()
    }

    /// Writes the gradient of `x` to `gx`: that of the norm's output, `gy`, passed back through the norm, plus
    /// `direct`, the gradient that reaches `x` by other paths. `gx` may be any of the inputs.
    ///
    /// # Errors
    /// When the arrays do not fit, or the ranks cannot exchange their sums.
    pub fn backward(&self, x: &Array, gy: &Array, direct: Option<&Array>, grads: &NormGrads, gx: &Array) -> Result<()> {
        let c = grads.weight.len();
        let (device, share, suffix) = (x.device(), Share::new(x, c)?, x.element().suffix());
        fits("batch_norm", x.element(), &[Some(gy), direct, Some(gx)].map(|other| (other, x.len())))?;
        let of_params = [Some(grads.weight), Some(grads.bias), grads.slopes];
        fits("batch_norm", Element::F32, &of_params.map(|grad| (grad, c)))?;
        let [rows, channels] = share.sizes();
        let [constants, slopes] = self.args(c)?;
        let sums = device.array(Element::F32, share.chunks() * 3 * c)?;
        let means = device.array(Element::F32, 2 * c)?;
        let chunk = Arg::I64(share.chunk() as i64);
        let args = [x.arg(), gy.arg(), rows, channels, chunk, constants, slopes, sums.arg()];
        // SAFETY: x and gy have these rows, and each chunk has its own three sums per channel.
        unsafe { device.launch(&format!("batch_norm_sums_{suffix}"), share.over_chunks(3), &args)? };
        let args = [
            sums.arg(),
            Arg::I32(share.chunks() as i32),
            rows,
            channels,
            grads.bias.arg(),
            grads.weight.arg(),
            grads.slopes.into(),
            means.arg(),
        ];
        // SAFETY: the gradients have c channels, the means twice as many, and the sums are as above.
        unsafe { device.launch("batch_norm_finish_sums", share.warps(), &args)? };
        if let Some(ranks) = &self.ranks {
            exchange::sum_in_place(&means, 1.0 / ranks.size() as f32, ranks).map_err(Error::wrap)?;
        }
        let means = if self.of_batch { means.arg() } else { Arg::Null };
        let args = [x.arg(), gy.arg(), direct.into(), rows, channels, constants, slopes, means, gx.arg()];
        // SAFETY: all activations have the size of x, and the norm has its channels.
        unsafe { device.launch(&format!("batch_norm_grad_{suffix}"), share.over_rows(), &args) }
    }
}

/// Writes `a` read through its norm, plus `b` read through its own if given, to `y`, which may be one of them.
pub(crate) fn apply(a: Seen, b: Option<Seen>, c: usize, y: &Array) -> Result<()> {
    let (device, share) = (y.device(), Share::new(y, c)?);
    fits("batch_norm", y.element(), &[Some(a.x), b.map(|b| b.x)].map(|x| (x, y.len())))?;
    let [rows, channels] = share.sizes();
    let [constants, slopes] = a.norm_args(c)?;
    let [b_constants, b_slopes] = b.map_or(Ok([Arg::Null; 2]), |b| b.norm_args(c))?;
    let of_b = [b.map(|b| b.x).into(), b_constants, b_slopes];
    let args = [[a.x.arg(), constants, slopes], of_b, [rows, channels, y.arg()]].concat();
    // SAFETY: both sides have the size of y, and their norms its channels.
    unsafe { device.launch(&format!("batch_norm_apply_{}", y.element().suffix()), share.over_rows(), &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::threads::on_ranks;
    use crate::gpu::tests::{ELEMENTS, close, device, device_of_rank, numbers, read, rounded, upload};
    use crate::ops::batch_norm::{Stats, stats};
    use crate::ops::channels::{self, Normalised};

    const EPS: f32 = 1e-5;
    const MOMENTUM: f32 = 0.1;

    /// Rows and channels: one row, odd sizes, several chunks, channels that leave threads idle, the widest of a
    /// network.
    const SIZES: [(usize, usize); 6] = [(1, 8), (7, 24), (1000, 64), (5001, 40), (130, 200), (37, 512)];

    /// Parameters of a norm of `c` channels, on the CPU and on the device.
    struct Both {
        values: [Vec<f32>; 5],
        params: NormArrays,
    }

    impl Both {
        fn new(device: &crate::gpu::Device, c: usize, has_slopes: bool) -> Result<Self> {
            let ranges = [[-1.5, 1.5], [-1.0, 1.0], [-0.5, 0.5], [-2.0, 2.0], [0.1, 3.0]];
            let values = std::array::from_fn(|i| numbers(&format!("norm{i}"), c, ranges[i]));
            let up = |i: usize| device.upload::<f32>(&values[i]);
            let params = NormArrays {
                weight: up(0)?,
                bias: up(1)?,
                slopes: if has_slopes { Some(up(2)?) } else { None },
                running_mean: up(3)?,
                running_var: up(4)?,
                eps: EPS,
                momentum: MOMENTUM,
            };
            Ok(Self { values, params })
        }

        fn on_cpu(&self, stats: &Stats, of_batch: bool) -> Normalised {
            let slopes = self.params.slopes.as_ref().map(|_| self.values[2].as_slice());
            Normalised::new(stats, of_batch, f64::from(EPS), [&self.values[0], &self.values[1]], slopes)
        }

        fn running(&self) -> Stats {
            let f64s = |values: &[f32]| values.iter().map(|x| f64::from(*x)).collect();
            Stats { mean: f64s(&self.values[3]), var: f64s(&self.values[4]) }
        }
    }

    #[test]
    fn statistics_are_those_of_the_cpu_and_of_pytorch() -> Result<()> {
        let device = device();
        for (element, (rows, c)) in ELEMENTS.into_iter().flat_map(|e| SIZES.map(|sizes| (e, sizes))) {
            let both = Both::new(&device, c, false)?;
            let x = rounded(&numbers("x", rows * c, [-1.0, 3.0]), element);
            let norm = Norm::of_batch(&upload(&device, &x, element)?, &both.params, None)?;
            let expected = stats(&x, c);
            let mean: Vec<f32> = expected.mean.iter().map(|m| *m as f32).collect();
            let inv_std: Vec<f32> = expected.var.iter().map(|v| (1.0 / (v + f64::from(EPS)).sqrt()) as f32).collect();
            close("mean", &norm.constants.part(2 * c, c), &mean, 1e-6)?;
            close("inv_std", &norm.constants.part(3 * c, c), &inv_std, 1e-5)?;
            let moved = |old: f32, new: f64| old + MOMENTUM * (new as f32 - old);
            let running_mean: Vec<f32> = (0..c).map(|i| moved(both.values[3][i], expected.mean[i])).collect();
            close("running mean", &both.params.running_mean, &running_mean, 1e-6)?;
            let unbiased = |var: f64| var * rows as f64 / (rows as f64 - 1.0);
            let running_var: Vec<f32> = (0..c)
                .map(|i| if rows > 1 { moved(both.values[4][i], unbiased(expected.var[i])) } else { both.values[4][i] })
                .collect();
            close("running variance", &both.params.running_var, &running_var, 1e-5)?;
        }
        Ok(())
    }

    #[test]
    fn a_mean_far_above_the_deviation_loses_no_digits() -> Result<()> {
        let device = device();
        let (rows, c) = (3000, 16);
        let both = Both::new(&device, c, false)?;
        let x = numbers("far", rows * c, [1000.0, 1000.5]);
        let norm = Norm::of_batch(&device.upload(&x)?, &both.params, None)?;
        let var = |v: f64| (1.0 / (v + f64::from(EPS)).sqrt()) as f32;
        let inv_std: Vec<f32> = stats(&x, c).var.into_iter().map(var).collect();
        close("inv_std", &norm.constants.part(3 * c, c), &inv_std, 1e-4)
    }

    #[test]
    fn norms_and_sums_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (element, (rows, c)) in ELEMENTS.into_iter().flat_map(|e| SIZES.map(|sizes| (e, sizes))) {
            let [a, b] = ["a", "b"].map(|name| rounded(&numbers(name, rows * c, [-2.0, 2.0]), element));
            let [on_a, on_b] = [upload(&device, &a, element)?, upload(&device, &b, element)?];
            let y = device.array(element, rows * c)?;
            for has_slopes in [false, true] {
                let both = Both::new(&device, c, has_slopes)?;
                let (norm, on_cpu) = (Norm::frozen(&both.params)?, both.on_cpu(&both.running(), false));
                let seen = channels::Seen { x: &a, constants: Some(on_cpu.constants()) };
                let mut expected = vec![0.0; rows * c];
                channels::write(seen, c, &mut expected);
                apply(Seen { x: &on_a, norm: Some(&norm) }, None, c, &y)?;
                close("one", &y, &expected, 1e-5)?;
                channels::add(seen, channels::Seen { x: &b, constants: None }, c, &mut expected);
                apply(Seen { x: &on_a, norm: Some(&norm) }, Some(Seen { x: &on_b, norm: None }), c, &y)?;
                close("with another", &y, &expected, 1e-5)?;
                channels::add(channels::Seen { x: &b, constants: None }, seen, c, &mut expected);
                apply(Seen { x: &on_b, norm: None }, Some(Seen { x: &on_a, norm: Some(&norm) }), c, &y)?;
                close("the other way round", &y, &expected, 1e-5)?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (element, (rows, c)) in ELEMENTS.into_iter().flat_map(|e| SIZES.map(|sizes| (e, sizes))) {
            let [x, gy, other] = ["x", "gy", "other"].map(|n| rounded(&numbers(n, rows * c, [-1.0, 1.0]), element));
            let [on_x, on_gy, on_other] = [&x, &gy, &other].map(|values| upload(&device, values, element));
            let (on_x, on_gy, on_other) = (on_x?, on_gy?, on_other?);
            for (has_slopes, of_batch, has_direct) in
                [(true, true, true), (true, true, false), (false, true, true), (true, false, false)]
            {
                let both = Both::new(&device, c, has_slopes)?;
                let (norm, on_cpu) = if of_batch {
                    (Norm::of_batch(&on_x, &both.params, None)?, both.on_cpu(&stats(&x, c), true))
                } else {
                    (Norm::frozen(&both.params)?, both.on_cpu(&both.running(), false))
                };
                let of_params = on_cpu.param_grads(&x, &gy);
                let mut expected = x.clone();
                on_cpu.grad_x(&mut expected, &gy, &of_params, has_direct.then_some(other.as_slice()));
                let [weight, bias, slopes] = [(); 3].map(|()| device.array(Element::F32, c));
                let (weight, bias, slopes) = (weight?, bias?, slopes?);
                let grads = NormGrads { weight: &weight, bias: &bias, slopes: has_slopes.then_some(&slopes) };
                let gx = device.array(element, rows * c)?;
                norm.backward(&on_x, &on_gy, has_direct.then_some(&on_other), &grads, &gx)?;
                let f32s = |values: &[f64]| values.iter().map(|x| *x as f32).collect::<Vec<f32>>();
                // With one row in the batch, x - mean and hence the weight's gradient are only rounding error.
                if rows > 1 || !of_batch {
                    close("weight", &weight, &f32s(&of_params.weight), 2e-5)?;
                    close("gx", &gx, &expected, 2e-5)?;
                }
                close("bias", &bias, &f32s(&of_params.bias), 1e-5)?;
                if has_slopes {
                    close("slopes", &slopes, &f32s(&of_params.slope), 1e-5)?;
                }
                // In place, over each of the inputs.
                for at in 0..3 {
                    let inputs = [on_x.clone(), on_gy.clone(), on_other.clone()];
                    let copy = upload(&device, [&x, &gy, &other][at], element)?;
                    let mut inputs = inputs;
                    inputs[at] = copy.clone();
                    norm.backward(&inputs[0], &inputs[1], has_direct.then_some(&inputs[2]), &grads, &copy)?;
                    if has_direct || at < 2 {
                        assert!(read(&copy)? == read(&gx)?, "in place of input {at}");
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn channels_that_are_no_whole_accesses_are_an_error() -> Result<()> {
        let device = device();
        let x = device.zeros(Element::Bf16, 12 * 5)?;
        let error = apply(Seen { x: &x, norm: None }, None, 12, &x).unwrap_err().to_string();
        assert!(error.contains("60 Bf16 in rows of 12 channels"), "{error}");
        Ok(())
    }

    #[test]
    fn statistics_of_all_ranks_are_those_of_the_whole_batch() -> Result<()> {
        for (element, (rows, c)) in ELEMENTS.into_iter().flat_map(|e| [(1, 8), (700, 64), (1300, 40)].map(|s| (e, s))) {
            let size = 3;
            let [x, gy] = ["x", "gy"].map(|n| rounded(&numbers(n, size * rows * c, [-1.0, 3.0]), element));
            let found = on_ranks(size, |ranks| -> Result<_> {
                let device = device_of_rank(ranks.rank());
                let both = Both::new(&device, c, true)?;
                let own = ranks.rank() * rows * c..(ranks.rank() + 1) * rows * c;
                let [on_x, on_gy] = [&x, &gy].map(|values| upload(&device, &values[own.clone()], element));
                let (on_x, on_gy) = (on_x?, on_gy?);
                let norm = Norm::of_batch(&on_x, &both.params, Some(&ranks))?;
                let [weight, bias, slopes] = [(); 3].map(|()| device.array(Element::F32, c));
                let (weight, bias, slopes) = (weight?, bias?, slopes?);
                let grads = NormGrads { weight: &weight, bias: &bias, slopes: Some(&slopes) };
                norm.backward(&on_x, &on_gy, None, &grads, &on_x)?;
                let running = [&both.params.running_mean, &both.params.running_var].map(read);
                let of_params = [&weight, &bias, &slopes].map(read);
                let of_params = of_params.into_iter().collect::<Result<Vec<_>>>()?;
                let [mean, var] = running;
                Ok((read(&on_x)?, of_params, [mean?, var?], read(&norm.constants)?))
            });
            let found = found.into_iter().collect::<Result<Vec<_>>>()?;
            let device = device();
            let both = Both::new(&device, c, true)?;
            let whole = Norm::of_batch(&upload(&device, &x, element)?, &both.params, None)?;
            let on_cpu = both.on_cpu(&stats(&x, c), true);
            let of_params = on_cpu.param_grads(&x, &gy);
            let mut expected = x.clone();
            on_cpu.grad_x(&mut expected, &gy, &of_params, None);
            let joined: Vec<f32> = found.iter().flat_map(|(gx, ..)| gx.clone()).collect();
            close("gx", &upload(&device, &joined, element)?, &expected, 2e-5)?;
            for (_, _, [mean, var], constants) in &found {
                close("running mean", &both.params.running_mean, mean, 1e-6)?;
                close("running variance", &both.params.running_var, var, 1e-5)?;
                close("constants", &whole.constants, constants, 1e-5)?;
                assert!(*constants == found[0].3, "all ranks have the same bits");
            }
            // A rank's own gradients of the parameters: they are added later.
            for (i, of_all) in [of_params.weight, of_params.bias, of_params.slope].iter().enumerate() {
                let sum = |channel: usize| found.iter().map(|(_, grads, ..)| grads[i][channel]).sum();
                let sums: Vec<f32> = (0..c).map(sum).collect();
                close(
                    "parameters",
                    &device.upload(&sums)?,
                    &of_all.iter().map(|x| *x as f32).collect::<Vec<_>>(),
                    5e-5,
                )?;
            }
        }
        Ok(())
    }
}
