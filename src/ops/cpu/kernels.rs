//! The CPU's kernels of a network. Batch norm and PReLU are applied while values are read and written.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::memory::{PassBlock, Pool, seen};
use super::{Cpu, CpuImages};
use crate::ops::backend::{
    Activation, BufferId, ConvShape, FullGrad, Grads, Int8Filter, Kernels, MapGrad, MemoryLayout, NormGrad, NormParams,
    Order, Part, Place, Scale, Scaling, Source, Statistics, Sums, Weight,
};
use crate::ops::batch_norm::{self, EPS, MOMENTUM, Stats};
use crate::ops::channels::{self, Constants, Normalised, Seen};
use crate::ops::concat;
use crate::ops::conv::int8::{Input, Int8Conv, Output};
use crate::ops::conv::{Conv, Epilogue, Filter};
use crate::ops::linear;
use crate::ops::pixels;
use crate::ops::pool::{self, Window};
use crate::ops::slice::Values;

/// A filter packed for inference, and what follows the convolution.
#[derive(Debug)]
pub enum Prepared {
    Float {
        filter: Filter,
        bias: Option<Vec<f32>>,
        slope: Option<Vec<f32>>,
    },
    Int8 {
        conv: Int8Conv,
        /// Whether the input's buffer holds bytes.
        reads_bytes: bool,
    },
}

impl ConvShape {
    fn on_cpu(&self) -> Result<Conv> {
        Conv::new(self.x, self.w, self.config)
    }
}

impl<'a> Part<'a, Cpu> {
    fn values(&self) -> &'a [f32] {
        &self.array[self.range.clone()]
    }
}

impl Kernels for Cpu {
    type Memory = PassBlock;
    type Pool = Pool;
    type Images = CpuImages;
    type Norm = Normalised;
    type Filter = Prepared;
    /// Channels first.
    type Mask = Vec<f32>;

    const FOLDS: bool = true;
    const QUANTISES: bool = true;

    fn filter_order(&self, _conv: &ConvShape) -> Order {
        Order::Same
    }

    fn linear_order(&self, _c: usize, _pixels: usize) -> Order {
        Order::Same
    }

    fn images(&self, images: &Tensor) -> Result<CpuImages> {
        images.contiguous().map(CpuImages::Planes)
    }

    fn pixels(&self, _rgb: &[u8], _side: usize, _scaling: Scaling) -> Result<Option<CpuImages>> {
        Ok(None)
    }

    fn mask(&self, factors: Vec<f32>, _shape: [usize; 4]) -> Result<Vec<f32>> {
        Ok(factors)
    }

    fn memory(&self, layout: &Arc<MemoryLayout>, pool: &Pool, n: usize) -> Result<PassBlock> {
        Ok(PassBlock::new(layout, pool, n))
    }

    fn release(&self, _memory: &mut PassBlock, _moment: usize) {}

    fn load(&self, memory: &mut PassBlock, images: &CpuImages, to: BufferId) -> Result<()> {
        match images {
            CpuImages::Planes(images) => {
                let (_, c, h, w) = images.dims4()?;
                channels::to_channels_last(&Values::of("images", images)?, c, h * w, memory.get_mut(to));
                Ok(())
            }
            CpuImages::Rows(values) => self.set(memory, to, values),
        }
    }

    fn set(&self, memory: &mut PassBlock, to: BufferId, values: &Vec<f32>) -> Result<()> {
        let to = memory.get_mut(to);
        if values.len() != to.len() {
            bail!("expected {} values, found {}", to.len(), values.len());
        }
        to.copy_from_slice(values);
        Ok(())
    }

    fn get(&self, memory: &mut PassBlock, x: Source<Self>, c: usize) -> Result<Vec<f32>> {
        let values = memory.get(x.buffer);
        let mut y = vec![0.0; values.len()];
        channels::write(seen(values, x), c, &mut y);
        Ok(y)
    }

    fn norm(
        &self,
        memory: &PassBlock,
        x: BufferId,
        c: usize,
        params: NormParams<Self>,
        statistics: Statistics,
    ) -> Result<Normalised> {
        let NormParams { trained, fixed, weight, bias, slope, mean, var } = params;
        let data = memory.get(x);
        let ranks = if let Statistics::OfRanks(ranks) = statistics { Some(ranks) } else { None };
        let stats = match statistics {
            Statistics::Running => {
                let widened =
                    |range: std::ops::Range<usize>| fixed[range].iter().map(|value| f64::from(*value)).collect();
                Stats { mean: widened(mean), var: widened(var) }
            }
            Statistics::OfBatch | Statistics::OfRanks(_) => {
                let (mut stats, mut count) = (batch_norm::stats(data, c), data.len() / c);
                if let Some(ranks) = ranks {
                    stats = stats.over_ranks(ranks).map_err(candle_core::Error::wrap)?;
                    count *= ranks.size();
                }
                let unbiased = stats.unbiased_var(count)?;
                let (share, kept) = (MOMENTUM as f32, (1.0 - MOMENTUM) as f32);
                for (range, new) in [(mean, &stats.mean), (var, &unbiased)] {
                    let running = fixed[range].iter_mut();
                    running.zip(new).for_each(|(running, new)| *running = *running * kept + *new as f32 * share);
                }
                stats
            }
        };
        let read = |Place { is_fixed, range }: Place| if is_fixed { &fixed[range] } else { &trained[range] };
        let of_batch = !matches!(statistics, Statistics::Running);
        let norm = Normalised::new(&stats, of_batch, EPS, [read(weight), read(bias)], slope.map(read));
        Ok(match ranks {
            Some(ranks) => norm.with_ranks(ranks),
            None => norm,
        })
    }

    fn constant_norm(&self, constants: &Constants, _c: usize) -> Result<Normalised> {
        Ok(Normalised::constant(constants.clone()))
    }

    fn filter(&self, conv: &ConvShape, weight: &[f32], norm: Option<&Constants>) -> Result<Prepared> {
        let conv_on_cpu = conv.on_cpu()?;
        let Some(Constants { scale, shift, slope }) = norm else {
            return Ok(Prepared::Float { filter: conv_on_cpu.pack(weight), bias: None, slope: None });
        };
        let per_output = weight.len() / conv.w[0];
        let scaled: Vec<f32> = weight.iter().enumerate().map(|(i, w)| w * scale[i / per_output]).collect();
        Ok(Prepared::Float { filter: conv_on_cpu.pack(&scaled), bias: Some(shift.clone()), slope: slope.clone() })
    }

    fn int8_filter(&self, conv: &ConvShape, filter: Int8Filter, norm: Option<&Constants>) -> Result<Prepared> {
        let Int8Filter { weight, input, reads_bytes, output } = filter;
        let mut conv = Int8Conv::new(weight, conv.config, input)?;
        if let Some(norm) = norm {
            conv = conv.followed_by([&norm.scale, &norm.shift], norm.slope.as_deref());
        }
        if let Some(output) = output {
            conv = conv.into_bytes(output);
        }
        Ok(Prepared::Int8 { conv, reads_bytes })
    }

    fn conv(
        &self,
        memory: &mut PassBlock,
        conv: &ConvShape,
        x: Source<Self>,
        weight: Weight<Self>,
        residual: Option<BufferId>,
        y: BufferId,
    ) -> Result<()> {
        let (y, others) = memory.split(y);
        let (seen, residual) = (others.seen(x), residual.map(|residual| others.get(residual)));
        match weight {
            Weight::Trained(weight) => {
                let epilogue = Epilogue { residual, ..Epilogue::default() };
                conv.on_cpu()?.forward(seen.x, seen.prologue(), weight.values(), epilogue, y);
            }
            Weight::Prepared(Prepared::Int8 { conv: quantised, reads_bytes }) => {
                let len = conv.x.iter().product();
                let input = match reads_bytes {
                    true => Input::Bytes(&bytemuck::cast_slice(seen.x)[..len]),
                    false => Input::Floats(seen.x),
                };
                let output = match quantised.output() {
                    Some(_) => {
                        let len = quantised.output_shape(conv.x)?.iter().product();
                        Output::Bytes(&mut bytemuck::cast_slice_mut(y)[..len])
                    }
                    None => Output::Floats(y),
                };
                quantised.run_between(input, seen.prologue(), conv.x, residual, output)?;
            }
            Weight::Prepared(Prepared::Float { filter, bias, slope }) => {
                let conv = Conv::of_filter(conv.x, conv.w, conv.config, filter)?;
                let epilogue = Epilogue { bias: bias.as_deref(), slope: slope.as_deref(), residual };
                conv.forward_packed(seen.x, seen.prologue(), filter, epilogue, y);
            }
        }
        Ok(())
    }

    fn sum(&self, memory: &mut PassBlock, a: Source<Self>, b: Source<Self>, c: usize, y: BufferId) -> Result<()> {
        let (y, others) = memory.split(y);
        channels::add(others.seen(a), others.seen(b), c, y);
        Ok(())
    }

    fn apply(&self, memory: &mut PassBlock, x: Source<Self>, c: usize, y: BufferId) -> Result<()> {
        let (y, others) = memory.split(y);
        channels::write(others.seen(x), c, y);
        Ok(())
    }

    fn sums(&self, memory: &mut PassBlock, of: Sums<Self>, [_, h, w, c]: [usize; 4], y: BufferId) -> Result<()> {
        let Sums { x, with, factor } = of;
        let (y, others) = memory.split(y);
        pixels::sums(others.seen(x), with.map(|with| others.get(with)), [h * w, c], factor, y);
        Ok(())
    }

    fn scale(&self, memory: &mut PassBlock, of: Scale<Self>, [.., c]: [usize; 4], y: BufferId) -> Result<()> {
        let Scale { x, by, factor, plus } = of;
        let (y, others) = memory.split(y);
        let [x, plus] = [x, plus].map(|source| source.map(|source| others.seen(source)));
        pixels::scale(x, others.get(by), factor, plus, c, y);
        Ok(())
    }

    fn activate(
        &self,
        memory: &mut PassBlock,
        x: Source<Self>,
        activation: Activation,
        c: usize,
        y: BufferId,
    ) -> Result<()> {
        let (y, others) = memory.split(y);
        pixels::activate(others.seen(x), activation, c, y);
        Ok(())
    }

    fn max_pool(
        &self,
        memory: &mut PassBlock,
        x: Source<Self>,
        window: Window,
        shape: [usize; 4],
        y: BufferId,
    ) -> Result<()> {
        let (y, others) = memory.split(y);
        pool::max_pool(others.seen(x), window, shape, y)
    }

    fn upsample(
        &self,
        memory: &mut PassBlock,
        x: Source<Self>,
        factor: usize,
        shape: [usize; 4],
        y: BufferId,
    ) -> Result<()> {
        let (y, others) = memory.split(y);
        pool::upsample(others.seen(x), factor, shape, y);
        Ok(())
    }

    fn concat(&self, memory: &mut PassBlock, parts: &[(Source<Self>, usize)], y: BufferId) -> Result<()> {
        let (y, others) = memory.split(y);
        let parts: Vec<(Seen, usize)> = parts.iter().map(|(x, c)| (others.seen(*x), *c)).collect();
        concat::concat(&parts, y);
        Ok(())
    }

    fn flatten(
        &self,
        memory: &mut PassBlock,
        x: Source<Self>,
        [_, h, w, c]: [usize; 4],
        mask: Option<&Vec<f32>>,
        flat: BufferId,
    ) -> Result<()> {
        let (flat, others) = memory.split(flat);
        channels::to_channels_first(others.seen(x), c, h * w, flat);
        if let Some(mask) = mask {
            flat.iter_mut().zip(mask).for_each(|(x, m)| *x *= m);
        }
        Ok(())
    }

    fn full(
        &self,
        memory: &mut PassBlock,
        flat: BufferId,
        weight: Part<Self>,
        bias: Option<Part<Self>>,
        sizes: [usize; 3],
        y: BufferId,
    ) -> Result<()> {
        let (y, others) = memory.split(y);
        linear::forward(others.get(flat), weight.values(), bias.map(|bias| bias.values()), sizes, y);
        Ok(())
    }

    fn conv_grad_w(
        &self,
        memory: &mut PassBlock,
        conv: &ConvShape,
        x: Source<Self>,
        gy: BufferId,
        grads: Grads<Self>,
    ) -> Result<()> {
        let Some(place) = grads.weight else { return Ok(()) };
        let seen = seen(memory.get(x.buffer), x);
        conv.on_cpu()?.grad_w(seen.x, seen.prologue(), memory.get(gy), &mut grads.array[place]);
        Ok(())
    }

    fn conv_grad_x(
        &self,
        memory: &mut PassBlock,
        conv: &ConvShape,
        gy: BufferId,
        weight: Part<Self>,
        other: Option<BufferId>,
        gx: BufferId,
    ) -> Result<()> {
        let (gx, others) = memory.split(gx);
        let epilogue = Epilogue { residual: other.map(|other| others.get(other)), ..Epilogue::default() };
        conv.on_cpu()?.grad_x(others.get(gy), weight.values(), epilogue, gx);
        Ok(())
    }

    fn norm_backward(
        &self,
        memory: &mut PassBlock,
        norm: &Normalised,
        NormGrad { x, gy, direct }: NormGrad,
        _c: usize,
        grads: Grads<Self>,
    ) -> Result<()> {
        let (x, others) = memory.split(x);
        let gy = others.get(gy);
        let of_params = norm.param_grads(x, gy);
        let Grads { array, weight, bias, slope } = grads;
        for (place, values) in [(weight, &of_params.weight), (bias, &of_params.bias), (slope, &of_params.slope)] {
            place.into_iter().for_each(|place| narrow(values, &mut array[place]));
        }
        let of_ranks = norm.over_ranks(of_params).map_err(candle_core::Error::wrap)?;
        norm.grad_x(x, gy, &of_ranks, direct.map(|direct| others.get(direct)));
        Ok(())
    }

    fn activate_backward(
        &self,
        memory: &mut PassBlock,
        y: BufferId,
        gy: BufferId,
        activation: Activation,
        gx: BufferId,
    ) -> Result<()> {
        let (gx, others) = memory.split(gx);
        pixels::activate_backward(others.get(y), others.get(gy), activation, gx);
        Ok(())
    }

    fn max_pool_backward(
        &self,
        memory: &mut PassBlock,
        x: Source<Self>,
        window: Window,
        shape: [usize; 4],
        MapGrad { gy, other, gx }: MapGrad,
    ) -> Result<()> {
        let (gx, others) = memory.split(gx);
        let other = other.map(|other| others.get(other));
        pool::max_pool_backward(others.seen(x), window, shape, others.get(gy), other, gx)
    }

    fn upsample_backward(
        &self,
        memory: &mut PassBlock,
        factor: usize,
        shape: [usize; 4],
        MapGrad { gy, other, gx }: MapGrad,
    ) -> Result<()> {
        let (gx, others) = memory.split(gx);
        pool::upsample_backward(others.get(gy), factor, shape, other.map(|other| others.get(other)), gx);
        Ok(())
    }

    fn concat_backward(
        &self,
        memory: &mut PassBlock,
        channels: [usize; 3],
        MapGrad { gy, other, gx }: MapGrad,
    ) -> Result<()> {
        let (gx, others) = memory.split(gx);
        concat::take(others.get(gy), channels, other.map(|other| others.get(other)), gx);
        Ok(())
    }

    /// The transposed gradient overwrites the flattened input.
    fn full_backward(
        &self,
        memory: &mut PassBlock,
        task: FullGrad<Self>,
        weight: Part<Self>,
        grads: Grads<Self>,
    ) -> Result<()> {
        let FullGrad { flat, gy, gx, shape: [n, h, w, c], outputs, mask } = task;
        let inputs = h * w * c;
        let (features, others) = memory.split(flat);
        let gy = others.get(gy);
        if let Some(place) = grads.weight {
            linear::grad_w(features, gy, [n, inputs, outputs], &mut grads.array[place]);
        }
        if let Some(place) = grads.bias {
            let of_output = |o: usize| (0..n).map(|row| f64::from(gy[row * outputs + o])).sum();
            narrow(&(0..outputs).map(of_output).collect::<Vec<f64>>(), &mut grads.array[place]);
        }
        let Some(gx) = gx else { return Ok(()) };
        linear::grad_x_transposed(gy, weight.values(), [n, inputs, outputs], features);
        let (gx, others) = memory.split(gx);
        let transposed = others.get(flat);
        for (row, gx) in gx.chunks_exact_mut(inputs).enumerate() {
            for (pixel, gx) in gx.chunks_exact_mut(c).enumerate() {
                for (channel, gx) in gx.iter_mut().enumerate() {
                    let at = channel * h * w + pixel;
                    *gx = transposed[at * n + row] * mask.map_or(1.0, |mask| mask[row * inputs + at]);
                }
            }
        }
        Ok(())
    }
}

fn narrow(from: &[f64], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from as f32);
}
