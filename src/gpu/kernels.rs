//! A GPU's kernels of a network. Activations have the type of the products; what follows a fully connected layer is
//! f32. A convolution reads a normalised, activated copy of its input.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::batch_norm::{self, Norm, NormArrays, NormGrads, Seen};
use super::concat::{self, Channels};
use super::conv::Conv;
use super::{Array, Element, GpuBackend, Matrix, Pass, Planned, Product, images, pixels, pool, rows};
use crate::ops::backend::{
    Activation, BufferId, ConvShape, FullGrad, Grads, Kernels, MapGrad, MemoryLayout, NormGrad, NormParams, Order,
    Part, Place, Scale, Scaling, Source, Statistics, Sums, Weight,
};
use crate::ops::batch_norm::{EPS, MOMENTUM};
use crate::ops::channels::Constants;
use crate::ops::conv::ConvolutionPass;
use crate::ops::pool::Window;

/// Arrays of a pass, from their first use to their last.
#[derive(Debug)]
pub(crate) struct PassArrays {
    layout: Arc<MemoryLayout>,
    n: usize,
    arrays: Vec<Option<Array>>,
}

impl PassArrays {
    fn get(&self, buffer: BufferId) -> Result<&Array> {
        match &self.arrays[buffer] {
            Some(array) => Ok(array),
            None => bail!("buffer {buffer} is not kept"),
        }
    }

    /// Returns the array of a buffer, if one is named.
    fn get_any(&self, buffer: Option<BufferId>) -> Result<Option<&Array>> {
        buffer.map(|buffer| self.get(buffer)).transpose()
    }
}

impl GpuBackend {
    /// Returns the array of a buffer to write to.
    fn out(&self, memory: &mut PassArrays, buffer: BufferId) -> Result<Array> {
        let spec = &memory.layout.buffers[buffer];
        let element = if spec.is_wide { Element::F32 } else { self.element };
        let array = self.device.array(element, spec.size * memory.n)?;
        memory.arrays[buffer] = Some(array.clone());
        Ok(array)
    }

    fn seen<'a>(memory: &'a PassArrays, x: Source<'a, Self>) -> Result<Seen<'a>> {
        Ok(Seen { x: memory.get(x.buffer)?, norm: x.norm })
    }

    /// Returns a value with its norm applied, in the type of the products.
    fn materialise(&self, memory: &PassArrays, x: Source<Self>, c: usize) -> Result<Array> {
        let seen = Self::seen(memory, x)?;
        if seen.norm.is_none() {
            return rows::in_type(seen.x, self.element);
        }
        let y = self.device.array(seen.x.element(), seen.x.len())?;
        batch_norm::apply(seen, None, c, &y)?;
        rows::in_type(&y, self.element)
    }

    fn conv_of(&self, conv: &ConvShape) -> Conv {
        let ConvShape { x, w: [co, of_group, k, _], config } = *conv;
        let group = (config.groups > 1).then_some(of_group);
        Conv { x, co: self.channels(co), k, stride: config.stride, padding: config.padding, group }
    }

    /// Returns the output array for a gradient; nothing reads that of a parameter that is not trained.
    fn grad(&self, grads: &Grads<Self>, place: Option<&std::ops::Range<usize>>, len: usize) -> Result<Array> {
        match place {
            Some(place) => Ok(grads.array.part(place.start, place.len())),
            None => self.device.array(Element::F32, len),
        }
    }

    fn multiply(&self, [m, n, k]: [usize; 3], a: Matrix, b: Matrix, c: Matrix) -> Result<()> {
        self.device.multiply(&Product { m, n, k, a, b, c, alpha: 1.0, beta: 0.0 })
    }
}

impl Part<'_, GpuBackend> {
    fn array(&self) -> Array {
        self.array.part(self.range.start, self.range.len())
    }
}

impl Kernels for GpuBackend {
    type Memory = PassArrays;
    type Pool = ();
    type Images = Array;
    type Norm = Norm;
    type Filter = Array;
    /// Channels last, in the type of the products.
    type Mask = Array;

    const FOLDS: bool = false;

    fn check_training(&self) -> Result<()> {
        if self.element == Element::F16 {
            bail!("f16's range is too small for gradients: train in bf16, tf32 or f32");
        }
        Ok(())
    }

    fn check_conv(&self, conv: &ConvShape) -> Result<()> {
        let ([co, of_group, h, w], groups) = (conv.w, conv.config.groups);
        if h != w {
            bail!("the GPU engine has no kernels for filters of {h} x {w}: use --device cpu");
        }
        let is_even = co == of_group * groups && self.element.per_access().is_multiple_of(of_group);
        if groups > 1 && !is_even {
            let to = co / groups;
            bail!("the GPU engine has no kernels for {groups} groups of {of_group} to {to} channels: use --device cpu");
        }
        Ok(())
    }

    fn channels(&self, c: usize) -> usize {
        c.next_multiple_of(self.element.per_access())
    }

    fn filter_order(&self, conv: &ConvShape) -> Order {
        let ([co, c, h, w], groups) = (conv.w, conv.config.groups);
        match groups {
            1 => Order::ChannelsLast { c, pixels: h * w, padded: self.channels(c), rows: Some(self.channels(co)) },
            _ => Order::Grouped { c: c * groups, m: c, padded: self.channels(c * groups) },
        }
    }

    fn linear_order(&self, c: usize, pixels: usize) -> Order {
        Order::ChannelsLast { c, pixels, padded: self.channels(c), rows: None }
    }

    fn images(&self, images: &Tensor) -> Result<Array> {
        let last = images.permute((0, 2, 3, 1))?.pad_with_zeros(3, 0, self.channels(3) - 3)?;
        rows::in_type(&self.device.upload(&last.flatten_all()?.to_vec1::<f32>()?)?, self.element)
    }

    fn pixels(&self, rgb: &[u8], side: usize, scaling: Scaling) -> Result<Option<Array>> {
        let of_image = 3 * side * side;
        if rgb.is_empty() || !rgb.len().is_multiple_of(of_image) {
            bail!("expected images of {of_image} bytes, found {} bytes", rgb.len());
        }
        let y = self.device.array(self.element, rgb.len() / 3 * self.channels(3))?;
        images::normalise(&self.device.upload(rgb)?, scaling, &y)?;
        Ok(Some(y))
    }

    fn mask(&self, factors: Vec<f32>, [_, h, w, c]: [usize; 4]) -> Result<Array> {
        let mut last = Vec::new();
        Order::ChannelsLast { c, pixels: h * w, padded: self.channels(c), rows: None }.laid_out(&factors, &mut last);
        rows::in_type(&self.device.upload(&last)?, self.element)
    }

    fn memory(&self, layout: &Arc<MemoryLayout>, _pool: &(), n: usize) -> Result<PassArrays> {
        Ok(PassArrays { layout: layout.clone(), n, arrays: vec![None; layout.buffers.len()] })
    }

    fn release(&self, memory: &mut PassArrays, moment: usize) {
        let ends = memory.layout.buffers.iter().map(|buffer| buffer.alive.end == moment + 1);
        memory.arrays.iter_mut().zip(ends).filter(|(_, ends)| *ends).for_each(|(array, _)| *array = None);
    }

    fn load(&self, memory: &mut PassArrays, images: &Array, to: BufferId) -> Result<()> {
        let len = memory.layout.buffers[to].size * memory.n;
        if images.element() != self.element || images.len() != len {
            bail!("expected {len} {:?} of images, found {} {:?}", self.element, images.len(), images.element());
        }
        memory.arrays[to] = Some(images.clone());
        Ok(())
    }

    fn set(&self, memory: &mut PassArrays, to: BufferId, values: &Array) -> Result<()> {
        let y = self.out(memory, to)?;
        if values.len() != y.len() || values.element() != Element::F32 {
            bail!("expected {} values, found {} {:?}", y.len(), values.len(), values.element());
        }
        memory.arrays[to] = Some(rows::in_type(values, y.element())?);
        Ok(())
    }

    fn get(&self, memory: &mut PassArrays, x: Source<Self>, c: usize) -> Result<Array> {
        let seen = Self::seen(memory, x)?;
        let y = self.device.array(seen.x.element(), seen.x.len())?;
        batch_norm::apply(seen, None, c, &y)?;
        rows::in_type(&y, Element::F32)
    }

    fn norm(
        &self,
        memory: &PassArrays,
        x: BufferId,
        c: usize,
        params: NormParams<Self>,
        statistics: Statistics,
    ) -> Result<Norm> {
        let NormParams { trained, fixed, weight, bias, slope, mean, var } = params;
        let part = |array: &Array, range: std::ops::Range<usize>| array.part(range.start, range.len());
        let of = |Place { is_fixed, range }: Place| part(if is_fixed { fixed } else { trained }, range);
        let params = NormArrays {
            weight: of(weight),
            bias: of(bias),
            slopes: slope.map(of),
            running_mean: part(fixed, mean),
            running_var: part(fixed, var),
            eps: EPS as f32,
            momentum: MOMENTUM as f32,
        };
        let x = memory.get(x)?;
        match statistics {
            Statistics::Running => Norm::frozen(&params),
            Statistics::OfBatch if x.len() == c => bail!("batch_norm: training needs more than one value per channel"),
            Statistics::OfBatch => Norm::of_batch(x, &params, None),
            Statistics::OfRanks(ranks) => Norm::of_batch(x, &params, Some(ranks)),
        }
    }

    fn constant_norm(&self, Constants { scale, shift, slope }: &Constants, c: usize) -> Result<Norm> {
        let padded = |values: &Vec<f32>| -> Vec<f32> {
            let zeros = vec![0.0; c - values.len()];
            [values.as_slice(), &zeros].concat()
        };
        Norm::constant(&self.device, &padded(scale), &padded(shift), slope.as_ref().map(padded).as_deref())
    }

    fn filter(&self, conv: &ConvShape, weight: &[f32], _norm: Option<&Constants>) -> Result<Array> {
        let mut laid_out = Vec::new();
        self.filter_order(conv).laid_out(weight, &mut laid_out);
        rows::in_type(&self.device.upload(&laid_out)?, self.element)
    }

    fn conv(
        &self,
        memory: &mut PassArrays,
        conv: &ConvShape,
        x: Source<Self>,
        weight: Weight<Self>,
        residual: Option<BufferId>,
        y: BufferId,
    ) -> Result<()> {
        let x = self.materialise(memory, x, conv.x[3])?;
        let residual = residual.map(|residual| memory.get(residual).cloned()).transpose()?;
        let y = self.out(memory, y)?;
        match weight {
            Weight::Trained(weight) => self.conv_of(conv).forward(&x, &weight.array(), &y)?,
            Weight::Prepared(filter) => self.conv_of(conv).forward(&x, filter, &y)?,
        }
        match residual {
            Some(residual) => add(&y, &residual, self.channels(conv.w[0])),
            None => Ok(()),
        }
    }

    fn sum(&self, memory: &mut PassArrays, a: Source<Self>, b: Source<Self>, c: usize, y: BufferId) -> Result<()> {
        let y = self.out(memory, y)?;
        batch_norm::apply(Self::seen(memory, a)?, Some(Self::seen(memory, b)?), c, &y)
    }

    fn apply(&self, memory: &mut PassArrays, x: Source<Self>, c: usize, y: BufferId) -> Result<()> {
        let y = self.out(memory, y)?;
        batch_norm::apply(Self::seen(memory, x)?, None, c, &y)
    }

    fn sums(&self, memory: &mut PassArrays, of: Sums<Self>, [n, h, w, c]: [usize; 4], y: BufferId) -> Result<()> {
        let Sums { x, with, factor } = of;
        let y = self.out(memory, y)?;
        let with = memory.get_any(with)?;
        pixels::sums(Self::seen(memory, x)?, with, [n, h * w, c], factor, &y)
    }

    fn scale(&self, memory: &mut PassArrays, of: Scale<Self>, [n, h, w, c]: [usize; 4], y: BufferId) -> Result<()> {
        let Scale { x, by, factor, plus } = of;
        let y = self.out(memory, y)?;
        let x = x.map(|x| Self::seen(memory, x)).transpose()?;
        let plus = plus.map(|plus| Self::seen(memory, plus)).transpose()?;
        pixels::scale(x, (memory.get(by)?, factor), plus, [n, h * w, c], &y)
    }

    fn activate(
        &self,
        memory: &mut PassArrays,
        x: Source<Self>,
        activation: Activation,
        c: usize,
        y: BufferId,
    ) -> Result<()> {
        let y = self.out(memory, y)?;
        let x = rows::in_type(&self.materialise(memory, x, c)?, y.element())?;
        pixels::activate(&x, activation, &y)
    }

    fn max_pool(
        &self,
        memory: &mut PassArrays,
        x: Source<Self>,
        window: Window,
        shape: [usize; 4],
        y: BufferId,
    ) -> Result<()> {
        let y = self.out(memory, y)?;
        pool::max_pool(Self::seen(memory, x)?, window, shape, &y)
    }

    fn upsample(
        &self,
        memory: &mut PassArrays,
        x: Source<Self>,
        factor: usize,
        shape: [usize; 4],
        y: BufferId,
    ) -> Result<()> {
        let y = self.out(memory, y)?;
        pool::upsample(Self::seen(memory, x)?, factor, shape, &y)
    }

    fn concat(&self, memory: &mut PassArrays, parts: &[(Source<Self>, usize)], y: BufferId) -> Result<()> {
        let y = self.out(memory, y)?;
        let all = self.channels(parts.iter().map(|(_, c)| c).sum());
        let mut first = 0;
        for (i, (x, c)) in parts.iter().enumerate() {
            // Zeros follow the last part.
            let width = if i + 1 == parts.len() { all - first } else { *c };
            let from = (Self::seen(memory, *x)?, Channels { all: self.channels(*c), first: 0 });
            concat::copy(from, None, [*c, width], (&y, Channels { all, first }))?;
            first += c;
        }
        Ok(())
    }

    fn flatten(
        &self,
        memory: &mut PassArrays,
        x: Source<Self>,
        [.., c]: [usize; 4],
        mask: Option<&Array>,
        flat: BufferId,
    ) -> Result<()> {
        // Without norm and mask it is the input itself, which is not overwritten before the layer's backward pass.
        let mut values = self.materialise(memory, x, c)?;
        if let Some(mask) = mask {
            let dropped = self.out(memory, flat)?;
            rows::multiply(&values, mask, &dropped)?;
            values = dropped;
        }
        memory.arrays[flat] = Some(values);
        Ok(())
    }

    fn full(
        &self,
        memory: &mut PassArrays,
        flat: BufferId,
        weight: Part<Self>,
        bias: Option<Part<Self>>,
        [n, inputs, outputs]: [usize; 3],
        y: BufferId,
    ) -> Result<()> {
        let y = self.out(memory, y)?;
        let (x, weight) = (memory.get(flat)?, weight.array());
        self.multiply([n, outputs, inputs], x.matrix(inputs), weight.matrix(inputs).transposed(), y.matrix(outputs))?;
        bias.map_or(Ok(()), |bias| rows::add(&y, &bias.array()))
    }

    fn conv_grad_w(
        &self,
        memory: &mut PassArrays,
        conv: &ConvShape,
        x: Source<Self>,
        gy: BufferId,
        grads: Grads<Self>,
    ) -> Result<()> {
        let Some(place) = &grads.weight else { return Ok(()) };
        let x = self.materialise(memory, x, conv.x[3])?;
        self.conv_of(conv).grad_w(&x, memory.get(gy)?, &grads.array.part(place.start, place.len()))
    }

    fn conv_grad_x(
        &self,
        memory: &mut PassArrays,
        conv: &ConvShape,
        gy: BufferId,
        weight: Part<Self>,
        other: Option<BufferId>,
        gx: BufferId,
    ) -> Result<()> {
        let gx = self.out(memory, gx)?;
        self.conv_of(conv).grad_x(memory.get(gy)?, &weight.array(), &gx)?;
        other.map_or(Ok(()), |other| add(&gx, memory.get(other)?, conv.x[3]))
    }

    fn norm_backward(
        &self,
        memory: &mut PassArrays,
        norm: &Norm,
        NormGrad { x, gy, direct }: NormGrad,
        c: usize,
        grads: Grads<Self>,
    ) -> Result<()> {
        let direct = memory.get_any(direct)?;
        let (weight, bias) = (self.grad(&grads, grads.weight.as_ref(), c)?, self.grad(&grads, grads.bias.as_ref(), c)?);
        let slopes = norm.has_slopes().then(|| self.grad(&grads, grads.slope.as_ref(), c)).transpose()?;
        let of_params = NormGrads { weight: &weight, bias: &bias, slopes: slopes.as_ref() };
        let x = memory.get(x)?;
        norm.backward(x, memory.get(gy)?, direct, &of_params, x)
    }

    fn activate_backward(
        &self,
        memory: &mut PassArrays,
        y: BufferId,
        gy: BufferId,
        activation: Activation,
        gx: BufferId,
    ) -> Result<()> {
        let gx = self.out(memory, gx)?;
        pixels::activate_backward(memory.get(y)?, memory.get(gy)?, activation, &gx)
    }

    fn max_pool_backward(
        &self,
        memory: &mut PassArrays,
        x: Source<Self>,
        window: Window,
        shape: [usize; 4],
        MapGrad { gy, other, gx }: MapGrad,
    ) -> Result<()> {
        let gx = self.out(memory, gx)?;
        let other = memory.get_any(other)?;
        pool::max_pool_backward(Self::seen(memory, x)?, window, shape, memory.get(gy)?, other, &gx)
    }

    fn upsample_backward(
        &self,
        memory: &mut PassArrays,
        factor: usize,
        shape: [usize; 4],
        MapGrad { gy, other, gx }: MapGrad,
    ) -> Result<()> {
        let gx = self.out(memory, gx)?;
        let other = memory.get_any(other)?;
        pool::upsample_backward(memory.get(gy)?, factor, shape, other, &gx)
    }

    fn concat_backward(
        &self,
        memory: &mut PassArrays,
        [first, all, c]: [usize; 3],
        MapGrad { gy, other, gx }: MapGrad,
    ) -> Result<()> {
        let gx = self.out(memory, gx)?;
        let other = memory.get_any(other)?;
        let from = (Seen { x: memory.get(gy)?, norm: None }, Channels { all: self.channels(all), first });
        let width = self.channels(c);
        concat::copy(from, other, [c, width], (&gx, Channels { all: width, first: 0 }))
    }

    fn full_backward(
        &self,
        memory: &mut PassArrays,
        task: FullGrad<Self>,
        weight: Part<Self>,
        grads: Grads<Self>,
    ) -> Result<()> {
        let FullGrad { flat, gy, gx, shape: [n, h, w, c], outputs, mask } = task;
        let inputs = h * w * c;
        if let Some(place) = &grads.bias {
            rows::sum(memory.get(gy)?, &grads.array.part(place.start, place.len()))?;
        }
        let gy = rows::in_type(memory.get(gy)?, self.element)?;
        if let Some(place) = &grads.weight {
            let gw = grads.array.part(place.start, place.len());
            let (a, b) = (gy.matrix(outputs).transposed(), memory.get(flat)?.matrix(inputs));
            self.multiply([outputs, inputs, n], a, b, gw.matrix(inputs))?;
        }
        let Some(gx) = gx else { return Ok(()) };
        let found = self.device.array(self.element, n * inputs)?;
        let (a, b) = (gy.matrix(outputs), weight.array());
        self.multiply([n, inputs, outputs], a, b.matrix(inputs), found.matrix(inputs))?;
        if let Some(mask) = mask {
            rows::multiply(&found, mask, &found)?;
        }
        let is_wide = memory.layout.buffers[gx].is_wide;
        memory.arrays[gx] = Some(rows::in_type(&found, if is_wide { Element::F32 } else { self.element })?);
        Ok(())
    }

    fn convolutions(&self, convs: &[ConvShape]) -> Result<Vec<ConvolutionPass>> {
        let convs: BTreeSet<Conv> = convs.iter().map(|conv| self.conv_of(conv)).collect();
        for conv in &convs {
            let zeros = |len: usize| self.device.zeros(self.element, len);
            let [x, w, y] = [conv.x.iter().product(), conv.num_weights(), conv.y().iter().product()].map(zeros);
            let (x, w, y) = (x?, w?, y?);
            conv.forward(&x, &w, &y)?;
            conv.grad_x(&y, &w, &x)?;
            conv.grad_w(&x, &y, &self.device.array(Element::F32, conv.num_weights())?)?;
        }
        let planned = self.device.gpu().planned();
        let of = |conv: &Conv, pass: Pass| {
            let fits = |plan: &&Planned| plan.conv == *conv && plan.pass == pass && plan.element == self.element;
            let plan = planned.iter().find(fits);
            let own = if conv.group.is_some() { "own kernel" } else { "patches, product by cuBLAS" };
            ConvolutionPass {
                pass: pass.title(),
                convolution: conv.to_string(),
                algorithm: plan.and_then(|plan| plan.algorithm.clone()).unwrap_or_else(|| own.to_owned()),
                milliseconds: plan.and_then(|plan| plan.ms),
                workspace_bytes: plan.map_or(0, |plan| plan.workspace),
            }
        };
        Ok(convs.iter().flat_map(|conv| Pass::ALL.map(|pass| of(conv, pass))).collect())
    }
}

/// `y += x`, in rows of `c` channels.
fn add(y: &Array, x: &Array, c: usize) -> Result<()> {
    batch_norm::apply(Seen { x: y, norm: None }, Some(Seen { x, norm: None }), c, y)
}
