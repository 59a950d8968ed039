//! A forward pass in training that knows its backward.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::pool::Pool;
use super::program::{Norm, Program, Step, ViewId};
use super::schedule::{Keep, Schedule};
use crate::nn::gradients::Gradients;
use crate::nn::graph::Graph;
use crate::nn::layers::{BatchNorm, Dropout, RunningStats};
use crate::nn::params::Params;
use crate::ops::batch_norm::{self, Stats};
use crate::ops::channels::{self, Normalised, Seen};
use crate::ops::conv::{Conv, Epilogue};
use crate::ops::linear;
use crate::ops::slice::Values;

/// Trains a network without a graph of tensors: one pass forward, one back.
#[derive(Debug)]
pub struct Engine {
    program: Program,
    schedule: Schedule,
    pool: Arc<Pool>,
    /// The shapes of parameters and buffers.
    weights: BTreeMap<String, Vec<usize>>,
    /// The shapes `(1, h, w, c)` of the values of one image.
    shapes: Vec<[usize; 4]>,
}

impl Engine {
    /// Returns an engine for the network of `graph` with images `(3, side, side)`; none if it has an operation, a number of
    /// channels or a type that the engine lacks. Parameters that are frozen now stay so.
    pub fn of(graph: &Graph, params: &Params, side: usize) -> Option<Self> {
        let program = Program::of(graph)?;
        // A parameter without a gradient would never train.
        let used = program.param_names();
        if !params.is_single_on_cpu() || !params.trainable().all(|(name, _)| used.contains(name)) {
            return None;
        }
        let weights = params.shapes();
        let shapes = program.shapes(&weights, [1, side, side, 3])?;
        let schedule = Schedule::new(&program, &shapes, |name| params.is_trained(name), Keep::All);
        Some(Self { program, schedule, pool: Arc::default(), weights, shapes })
    }

    /// Returns the engine, keeping some blocks' results of a forward pass alone and computing the rest again in the backward pass: the
    /// same bits in less memory and more time. `params` are those of [`Self::of`].
    pub fn recomputing(self, params: &Params) -> Self {
        let schedule = Schedule::new(&self.program, &self.shapes, |name| params.is_trained(name), Keep::Some);
        Self { schedule, pool: Arc::new(Pool::lean()), ..self }
    }

    /// Returns about how many bytes the activations of `n` images and their gradients take at the peak.
    pub fn activation_bytes(&self, n: usize) -> usize {
        let largest = self.shapes.iter().map(|shape| shape.iter().product::<usize>()).max().unwrap_or_default();
        let of_image = self.schedule.peak(&self.shapes) + 2 * largest;
        n.saturating_mul(of_image).saturating_mul(size_of::<f32>())
    }

    /// Returns the embeddings of images `(N, 3, S, S)`, f32, in training mode, with what the backward pass needs. Running
    /// statistics take part as in [`BatchNorm`]; `dropout` acts on the input of the fully connected layer.
    ///
    /// # Errors
    /// When the images do not fit the network, or a batch has one value per channel.
    pub fn record<'a>(
        &'a self,
        params: &'a Params,
        images: &Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<(Tensor, Recording<'a>)> {
        let (n, c, h, w) = images.dims4()?;
        let mut first = self.pool.take(images.elem_count());
        let contiguous = images.contiguous()?;
        channels::to_channels_last(&Values::of("images", &contiguous)?, c, h * w, &mut first);
        let Some(shapes) = self.program.shapes(&self.weights, [n, h, w, c]) else {
            bail!("images {:?} do not fit the network", images.shape());
        };
        let mut recording = Recording {
            engine: self,
            params,
            values: vec![None; shapes.len()],
            shapes,
            norms: (0..self.program.views.len()).map(|_| None).collect(),
            flat: BTreeMap::new(),
        };
        recording.values[0] = Some(first);
        for (i, released) in self.schedule.released.iter().enumerate() {
            recording.forward(i, dropout)?;
            recording.normalise(i + 1)?;
            for value in released {
                recording.values[*value].take().into_iter().for_each(|memory| self.pool.give(memory));
            }
        }
        let embedding = recording.output()?;
        Ok((embedding, recording))
    }
}

fn dims4(x: &Tensor) -> Option<[usize; 4]> {
    x.dims().try_into().ok()
}

/// The activations of a forward pass.
#[derive(Debug)]
pub struct Recording<'a> {
    engine: &'a Engine,
    params: &'a Params,
    /// The shapes `(n, h, w, c)` of all values.
    shapes: Vec<[usize; 4]>,
    values: Vec<Option<Vec<f32>>>,
    /// By view.
    norms: Vec<Option<Normalised>>,
    /// The input of each fully connected step, and what dropout multiplied it by.
    flat: BTreeMap<usize, (Vec<f32>, Option<Vec<f32>>)>,
}

impl Recording<'_> {
    fn value(&self, view: ViewId) -> &[f32] {
        let value = &self.values[self.engine.program.views[view].value];
        value.as_ref().expect("the schedule keeps, or computes again, what is read")
    }

    fn shape(&self, view: ViewId) -> [usize; 4] {
        self.shapes[self.engine.program.views[view].value]
    }

    fn seen(&self, view: ViewId) -> Seen<'_> {
        Seen { x: self.value(view), constants: self.norms[view].as_ref().map(Normalised::constants) }
    }

    fn param(&self, path: &str, name: &str) -> Result<Tensor> {
        let name = format!("{path}.{name}");
        match self.params.get(&name) {
            Some(tensor) => tensor.contiguous(),
            None => bail!("no parameter {name}"),
        }
    }

    /// Carries out step `i`.
    fn forward(&mut self, i: usize, dropout: Option<&Dropout>) -> Result<()> {
        let (step, shape) = (&self.engine.program.steps[i], self.shapes[i + 1]);
        let mut y = self.engine.pool.take(shape.iter().product());
        match step {
            Step::Conv { x, path, .. } => {
                let (weight, seen) = (self.param(path, "weight")?, self.seen(*x));
                let weight = Values::of("conv2d", &weight)?;
                self.conv(step)?.forward(seen.x, seen.prologue(), &weight, Epilogue::default(), &mut y);
            }
            Step::Add { a, b } => channels::add(self.seen(*a), self.seen(*b), shape[3], &mut y),
            Step::Write { x } => channels::write(self.seen(*x), shape[3], &mut y),
            Step::Linear { x, path, has_bias } => {
                let [n, h, w, c] = self.shape(*x);
                let mut flat = self.engine.pool.take(n * h * w * c);
                channels::to_channels_first(self.seen(*x), c, h * w, &mut flat);
                let mask = dropout.and_then(|dropout| dropout.mask(flat.len()));
                if let Some(mask) = &mask {
                    flat.iter_mut().zip(mask).for_each(|(x, m)| *x *= m);
                }
                let weight = self.param(path, "weight")?;
                let bias = has_bias.then(|| self.param(path, "bias")).transpose()?;
                let bias = bias.as_ref().map(|bias| Values::of("linear", bias)).transpose()?;
                let weight = Values::of("linear", &weight)?;
                linear::forward(&flat, &weight, bias.as_deref(), [n, h * w * c, shape[3]], &mut y);
                self.flat.insert(i, (flat, mask));
            }
        }
        self.values[i + 1] = Some(y);
        Ok(())
    }

    fn conv(&self, step: &Step) -> Result<Conv> {
        let Step::Conv { x, path, config } = step else { bail!("{step:?} is no convolution") };
        let weight = self.param(path, "weight")?;
        match dims4(&weight).and_then(|w| Conv::new(self.shape(*x), w, *config)) {
            Some(conv) => Ok(conv),
            None => bail!("conv2d: {path}: no method"),
        }
    }

    /// Prepares the view of `value` after its norm, if it has one.
    fn normalise(&mut self, value: usize) -> Result<()> {
        let Some(view) = self.engine.program.norm_of(value) else { return Ok(()) };
        let Some(Norm { bn, prelu }) = &self.engine.program.views[view].norm else { return Ok(()) };
        let (shape, data) = (self.shape(view), self.value(view));
        let running = RunningStats::of(self.params, bn)?;
        let is_frozen = self.params.has_frozen_statistics(bn);
        let stats = if is_frozen { running.read()? } else { batch_norm::stats(data, shape[3]) };
        if !is_frozen {
            running.track(&stats, data.len() / shape[3])?;
        }
        self.norms[view] = Some(normalised(self.params, (bn, prelu.as_deref()), &stats, !is_frozen)?);
        Ok(())
    }

    fn output(&self) -> Result<Tensor> {
        let output = self.engine.program.output;
        let [n, h, w, c] = self.shape(output);
        let mut y = vec![0.0; n * h * w * c];
        channels::write(self.seen(output), c, &mut y);
        Tensor::from_vec(y, (n, h * w * c), &Device::Cpu)
    }

    /// Returns the gradients of all trained parameters from that of the embeddings, `(N, embedding_size)`, f32.
    ///
    /// # Errors
    /// When the gradient's shape is not that of the embeddings.
    pub fn backward(mut self, grad: &Tensor) -> Result<Gradients> {
        let (program, pool, schedule) = (&self.engine.program, &self.engine.pool, &self.engine.schedule);
        let mut all = Gradients::flat(self.params, pool);
        let grad = grad.contiguous()?;
        let grad = Values::of("backward", &grad)?;
        let len: usize = self.shape(program.output).iter().product();
        if grad.len() != len {
            bail!("backward: a gradient of {} elements for {len}", grad.len());
        }
        // By view; shared where a sum hands it on to both sides.
        let mut grads: Vec<Option<Rc<Vec<f32>>>> = vec![None; program.views.len()];
        grads[program.output] = Some(Rc::new(grad.to_vec()));
        for (i, step) in program.steps.iter().enumerate().rev() {
            let gy = self.through_norm(i + 1, &mut grads, &mut all)?;
            if !schedule.values[i + 1] {
                // Nothing that it was computed from is trained.
                self.release(gy);
                continue;
            }
            let Some(gy) = gy else { bail!("backward: no gradient reaches step {i}") };
            for again in schedule.again.get(&(i + 1)).into_iter().flat_map(Clone::clone) {
                self.forward(again, None)?;
            }
            match step {
                Step::Conv { x, path, .. } => {
                    let (conv, weight) = (self.conv(step)?, self.param(path, "weight")?);
                    all.write(&format!("{path}.weight"), |gw| {
                        let seen = self.seen(*x);
                        conv.grad_w(seen.x, seen.prologue(), &gy, gw);
                    });
                    if schedule.views[*x] {
                        let (mut gx, other) = (pool.take(self.shape(*x).iter().product()), grads[*x].take());
                        let epilogue =
                            Epilogue { residual: other.as_ref().map(|g| g.as_slice()), ..Default::default() };
                        conv.grad_x(&gy, &Values::of("conv2d", &weight)?, epilogue, &mut gx);
                        self.release(other);
                        grads[*x] = Some(Rc::new(gx));
                    }
                }
                Step::Add { a, b } => {
                    self.hand_on(*a, &gy, &mut grads);
                    self.hand_on(*b, &gy, &mut grads);
                }
                Step::Write { x } => self.hand_on(*x, &gy, &mut grads),
                Step::Linear { x, path, has_bias } => {
                    let gx = self.linear(i, (*x, path, *has_bias), &gy, &mut all)?;
                    self.hand_on(*x, &Rc::new(gx), &mut grads);
                }
            }
            self.release(Some(gy));
        }
        Ok(all)
    }

    /// The gradient of a value as it is: what reached it directly, and through its norm. The value is given up.
    fn through_norm(
        &mut self,
        value: usize,
        grads: &mut [Option<Rc<Vec<f32>>>],
        all: &mut Gradients,
    ) -> Result<Option<Rc<Vec<f32>>>> {
        let program = &self.engine.program;
        let direct = program.raw_of(value).and_then(|view| grads[view].take());
        let normed = program.norm_of(value).and_then(|view| Some((view, grads[view].take()?)));
        let x = self.values[value].take();
        let Some((view, gy)) = normed else {
            x.into_iter().for_each(|memory| self.engine.pool.give(memory));
            return Ok(direct);
        };
        let mut x = x.expect("the schedule keeps, or computes again, what is read");
        let (Some(norm), Some(normalised)) = (&program.views[view].norm, &self.norms[view]) else {
            bail!("backward: view {view} has no norm");
        };
        let of_params = normalised.param_grads(&x, &gy);
        write_f64(all, &norm.bn, "weight", &of_params.weight);
        write_f64(all, &norm.bn, "bias", &of_params.bias);
        if let Some(prelu) = &norm.prelu {
            write_f64(all, prelu, "weight", &of_params.slope);
        }
        normalised.grad_x(&mut x, &gy, &of_params, direct.as_ref().map(|g| g.as_slice()));
        self.release(Some(gy));
        self.release(direct);
        Ok(Some(Rc::new(x)))
    }

    /// Adds a gradient to that of a view.
    fn hand_on(&self, view: ViewId, gy: &Rc<Vec<f32>>, grads: &mut [Option<Rc<Vec<f32>>>]) {
        if !self.engine.schedule.views[view] {
            return;
        }
        grads[view] = Some(match grads[view].take() {
            None => gy.clone(),
            Some(old) => {
                let mut sum = self.engine.pool.take(gy.len());
                let seen = |x| Seen { x, constants: None };
                channels::add(seen(&old), seen(gy), self.shape(view)[3], &mut sum);
                self.release(Some(old));
                Rc::new(sum)
            }
        });
    }

    fn release(&self, memory: Option<Rc<Vec<f32>>>) {
        if let Some(memory) = memory.and_then(Rc::into_inner) {
            self.engine.pool.give(memory);
        }
    }

    /// Writes the gradients of a fully connected step; returns that of its input, channels last.
    fn linear(
        &mut self,
        i: usize,
        (x, path, has_bias): (ViewId, &str, bool),
        gy: &[f32],
        all: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let Some((flat, mask)) = self.flat.remove(&i) else { bail!("backward: step {i} was not recorded") };
        let [n, h, w, c] = self.shape(x);
        let (inputs, outputs) = (h * w * c, gy.len() / n);
        all.write(&format!("{path}.weight"), |gw| linear::grad_w(&flat, gy, [n, inputs, outputs], gw));
        if has_bias {
            let sums: Vec<f64> =
                (0..outputs).map(|o| (0..n).map(|row| f64::from(gy[row * outputs + o])).sum()).collect();
            write_f64(all, path, "bias", &sums);
        }
        let weight = self.param(path, "weight")?;
        let mut transposed = flat;
        linear::grad_x_transposed(gy, &Values::of("linear", &weight)?, [n, inputs, outputs], &mut transposed);
        let mut gx = self.engine.pool.take(n * inputs);
        for (row, gx) in gx.chunks_exact_mut(inputs).enumerate() {
            for (pixel, gx) in gx.chunks_exact_mut(c).enumerate() {
                for (channel, gx) in gx.iter_mut().enumerate() {
                    let at = channel * h * w + pixel;
                    *gx = transposed[at * n + row] * mask.as_ref().map_or(1.0, |mask| mask[row * inputs + at]);
                }
            }
        }
        self.engine.pool.give(transposed);
        Ok(gx)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        let values = self.values.drain(..).flatten();
        let flat = std::mem::take(&mut self.flat).into_values().map(|(flat, _)| flat);
        values.chain(flat).for_each(|memory| self.engine.pool.give(memory));
    }
}

/// The constants of a norm from its parameters.
pub(super) fn normalised(
    params: &Params,
    (bn, prelu): (&str, Option<&str>),
    stats: &Stats,
    of_batch: bool,
) -> Result<Normalised> {
    let read = |path: &str, name: &str| match params.get(&format!("{path}.{name}")) {
        Some(tensor) => tensor.to_vec1::<f32>(),
        None => bail!("no parameter {path}.{name}"),
    };
    let (weight, bias) = (read(bn, "weight")?, read(bn, "bias")?);
    let slope = prelu.map(|prelu| read(prelu, "weight")).transpose()?;
    Ok(Normalised::new(stats, of_batch, BatchNorm::EPS, [&weight, &bias], slope.as_deref()))
}

fn write_f64(all: &mut Gradients, path: &str, name: &str, values: &[f64]) {
    all.write(&format!("{path}.{name}"), |grad| grad.iter_mut().zip(values).for_each(|(grad, v)| *grad = *v as f32));
}
