//! A forward pass in training that can run its backward pass.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, bail};

use super::memory::{Memory, Store};
use super::program::{Norm, Program, Step, ViewId};
use super::schedule::{Activations, Schedule};
use super::tape::{BufferId, Forward, Tape, Task};
use crate::nn::device_params::DeviceParams;
use crate::nn::graph::Graph;
use crate::nn::layers::{BatchNorm, Dropout};
use crate::nn::params::Params;
use crate::ops::batch_norm::{self, Stats};
use crate::ops::channels::{self, Normalised, Seen};
use crate::ops::conv::{Conv, Epilogue};
use crate::ops::cpu::Cpu;
use crate::ops::linear;
use crate::ops::slice::Values;

/// Trains a network without candle's graph of tensors: one forward and one backward pass. The parameters are those of
/// the network that it was made for.
#[derive(Debug)]
pub struct Engine {
    program: Program,
    tape: Tape,
    /// Shapes `(1, h, w, c)` of the values of one image.
    shapes: Vec<[usize; 4]>,
    /// Shapes of the filters, by the step of their convolution.
    filters: BTreeMap<usize, [usize; 4]>,
    store: Store,
}

impl Engine {
    /// Returns an engine for the network of `graph` with images `(3, side, side)`; `activations` says what is kept of
    /// the forward pass. `None` if the engine does not support the network's operations, channels or dtype, or a trained
    /// parameter would get no gradient. Parameters that are frozen now stay frozen.
    pub fn of(graph: &Graph, params: &Params, side: usize, activations: Activations) -> Option<Self> {
        let program = Program::of(graph)?;
        // A parameter without a gradient would never train.
        let used = program.param_names();
        if !params.is_single_on_cpu() || !params.trainable().all(|(name, _)| used.contains(name)) {
            return None;
        }
        let shapes = program.shapes_on_cpu(&params.shapes(), [1, side, side, 3])?;
        let is_trained = |name: &str| params.is_trained(name);
        let schedule = Schedule::new(&program, &shapes, is_trained, activations);
        let tape = Tape::new(&program, &shapes, &schedule, is_trained)?;
        let filters = program.filters(&params.shapes())?;
        Some(Self { program, tape, shapes, filters, store: Store::default() })
    }

    /// Returns the number of bytes that the activations of `n` images and their gradients take.
    pub fn activation_bytes(&self, n: usize) -> usize {
        self.tape.len(n).saturating_mul(size_of::<f32>())
    }

    /// Returns the embeddings `(N, embedding_size)` of images `(N, 3, S, S)`, f32, in training mode, and the recording
    /// for the backward pass. Running statistics are used and updated as in [`BatchNorm`]; `dropout` acts on the input of
    /// the fully connected layer.
    ///
    /// # Errors
    /// When the images do not match the network, or a batch has one value per channel.
    pub(crate) fn record(
        &self,
        params: &mut DeviceParams<Cpu>,
        images: &Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<(Vec<f32>, Recording<'_>)> {
        let [_, side, _, _] = self.shapes[0];
        let n = match images.dims() {
            &[n, 3, h, w] if h == side && w == side && n > 0 => n,
            dims => bail!("expected images (N, 3, {side}, {side}), found {dims:?}"),
        };
        let images = images.contiguous()?;
        let images = Values::of("images", &images)?;
        let mut memory = Memory::new(&self.tape, &self.store, n);
        channels::to_channels_last(&images, 3, side * side, memory.get_mut(self.tape.images));
        let norms = (0..self.program.views.len()).map(|_| None).collect();
        let mut recording = Recording { engine: self, n, memory, norms, masks: BTreeMap::new() };
        for forward in &self.tape.forward {
            recording.forward(params, forward, dropout)?;
            recording.normalise(params, forward)?;
        }
        params.count_batch();
        Ok((recording.output(), recording))
    }
}

/// Returns a value with the map of its norm, which is applied when it is read.
fn seen<'a>(norm: &'a Option<Normalised>, x: &'a [f32]) -> Seen<'a> {
    Seen { x, constants: norm.as_ref().map(Normalised::constants) }
}

/// Activations of a forward pass, for its backward pass.
#[derive(Debug)]
pub struct Recording<'a> {
    engine: &'a Engine,
    /// Number of images.
    n: usize,
    memory: Memory<'a>,
    /// Norm of each view, if it has one.
    norms: Vec<Option<Normalised>>,
    /// Dropout's factors for the input of each fully connected step.
    masks: BTreeMap<usize, Vec<f32>>,
}

impl Recording<'_> {
    fn shape(&self, view: ViewId) -> [usize; 4] {
        let [_, h, w, c] = self.engine.shapes[self.engine.program.views[view].value];
        [self.n, h, w, c]
    }

    fn forward(
        &mut self,
        params: &DeviceParams<Cpu>,
        Forward { i, inputs, flat, y }: &Forward,
        dropout: Option<&Dropout>,
    ) -> Result<()> {
        let engine = self.engine;
        let (step, [.., c]) = (&engine.program.steps[*i], engine.shapes[*i + 1]);
        match step {
            Step::Conv { x, path, .. } => {
                let conv = self.conv(*i)?;
                let (y, others) = self.memory.split(*y);
                let seen = seen(&self.norms[*x], others.get(inputs[0]));
                conv.forward(seen.x, seen.prologue(), params.value(path, "weight")?, Epilogue::default(), y);
            }
            Step::Add { a, b } => {
                let (y, others) = self.memory.split(*y);
                let of = |view: ViewId, input| seen(&self.norms[view], others.get(inputs[input]));
                channels::add(of(*a, 0), of(*b, 1), c, y);
            }
            Step::Write { x } => {
                let (y, others) = self.memory.split(*y);
                channels::write(seen(&self.norms[*x], others.get(inputs[0])), c, y);
            }
            Step::Linear { x, path, has_bias } => {
                let Some(flat) = *flat else { bail!("linear: no buffer for the input of {path}") };
                let ([n, h, w, of_input], weight) = (self.shape(*x), params.value(path, "weight")?);
                let bias = has_bias.then(|| params.value(path, "bias")).transpose()?;
                let (features, others) = self.memory.split(flat);
                channels::to_channels_first(seen(&self.norms[*x], others.get(inputs[0])), of_input, h * w, features);
                if let Some(mask) = dropout.and_then(|dropout| dropout.mask(features.len())) {
                    features.iter_mut().zip(&mask).for_each(|(x, m)| *x *= m);
                    self.masks.insert(*i, mask);
                }
                let (y, others) = self.memory.split(*y);
                linear::forward(others.get(flat), weight, bias, [n, h * w * of_input, c], y);
            }
        }
        Ok(())
    }

    fn conv(&self, i: usize) -> Result<Conv> {
        let Step::Conv { x, config, path } = &self.engine.program.steps[i] else { bail!("step {i} is no convolution") };
        match Conv::new(self.shape(*x), self.engine.filters[&i], *config) {
            Some(conv) => Ok(conv),
            None => bail!("conv2d: {path}: unsupported sizes"),
        }
    }

    /// Computes the norm of a step's result, if it has one.
    fn normalise(&mut self, params: &mut DeviceParams<Cpu>, Forward { i, y, .. }: &Forward) -> Result<()> {
        let program = &self.engine.program;
        let Some(view) = program.norm_of(i + 1) else { return Ok(()) };
        let Some(norm) = &program.views[view].norm else { return Ok(()) };
        let ([.., c], data) = (self.shape(view), self.memory.get(*y));
        let is_frozen = params.has_frozen_statistics(&norm.bn);
        let stats = match is_frozen {
            true => {
                let read = |name| Ok::<_, candle_core::Error>(widened(params.value(&norm.bn, name)?));
                Stats { mean: read("running_mean")?, var: read("running_var")? }
            }
            false => batch_norm::stats(data, c),
        };
        if !is_frozen {
            track(params, &norm.bn, &stats, data.len() / c)?;
        }
        let read = |path: &str, name: &str| Ok(params.value(path, name)?.to_vec());
        self.norms[view] = Some(normalised(read, norm, &stats, !is_frozen)?);
        Ok(())
    }

    fn output(&self) -> Vec<f32> {
        let output = self.engine.program.output;
        let ([n, h, w, c], x) = (self.shape(output), self.memory.get(self.engine.tape.output));
        let mut y = vec![0.0; n * h * w * c];
        channels::write(seen(&self.norms[output], x), c, &mut y);
        y
    }

    /// Writes the gradients of all trained parameters from the gradient of the embeddings, `(N, embedding_size)`.
    ///
    /// # Errors
    /// When the gradient has another size than the embeddings.
    pub(crate) fn backward(mut self, params: &mut DeviceParams<Cpu>, grad: &[f32]) -> Result<()> {
        let engine = self.engine;
        let to = self.memory.get_mut(engine.tape.gradient);
        if grad.len() != to.len() {
            bail!("backward: a gradient of {} elements for embeddings of {}", grad.len(), to.len());
        }
        to.copy_from_slice(grad);
        engine.tape.backward.iter().try_for_each(|task| self.carry_out(task, params))
    }

    fn carry_out(&mut self, task: &Task, params: &mut DeviceParams<Cpu>) -> Result<()> {
        let program = &self.engine.program;
        match task {
            Task::Again(forward) => self.forward(params, forward, None)?,
            Task::Norm { view, x, gy, direct } => {
                let (Some(norm), Some(normalised)) = (&program.views[*view].norm, &self.norms[*view]) else {
                    bail!("backward: view {view} has no norm");
                };
                let (x, others) = self.memory.split(*x);
                let gy = others.get(*gy);
                let of_params = normalised.param_grads(x, gy);
                write_f64(params, &norm.bn, "weight", &of_params.weight)?;
                write_f64(params, &norm.bn, "bias", &of_params.bias)?;
                if let Some(prelu) = &norm.prelu {
                    write_f64(params, prelu, "weight", &of_params.slope)?;
                }
                normalised.grad_x(x, gy, &of_params, direct.map(|direct| others.get(direct)));
            }
            Task::Filter { i, x, gy } => {
                let conv = self.conv(*i)?;
                let Step::Conv { x: view, path, .. } = &program.steps[*i] else { bail!("step {i} is no convolution") };
                let (seen, gy) = (seen(&self.norms[*view], self.memory.get(*x)), self.memory.get(*gy));
                params.write_grad(path, "weight", |gw| conv.grad_w(seen.x, seen.prologue(), gy, gw))?;
            }
            Task::Input { i, gy, other, gx } => {
                let conv = self.conv(*i)?;
                let Step::Conv { path, .. } = &program.steps[*i] else { bail!("step {i} is no convolution") };
                let (gx, others) = self.memory.split(*gx);
                let epilogue = Epilogue { residual: other.map(|other| others.get(other)), ..Default::default() };
                conv.grad_x(others.get(*gy), params.value(path, "weight")?, epilogue, gx);
            }
            Task::Linear { i, flat, gy, gx } => self.linear(*i, [*flat, *gy], *gx, params)?,
            Task::Sum { view, a, b, y } => {
                let [.., c] = self.shape(*view);
                let (y, others) = self.memory.split(*y);
                channels::add(seen(&None, others.get(*a)), seen(&None, others.get(*b)), c, y);
            }
        }
        Ok(())
    }

    /// Writes the gradients of fully connected step `i`; the gradient of its input, if requested, is channels-last.
    fn linear(
        &mut self,
        i: usize,
        [flat, gy]: [BufferId; 2],
        gx: Option<BufferId>,
        params: &mut DeviceParams<Cpu>,
    ) -> Result<()> {
        let step = &self.engine.program.steps[i];
        let Step::Linear { x, path, has_bias } = step else { bail!("{step:?} is not fully connected") };
        let ([n, h, w, c], [.., outputs]) = (self.shape(*x), self.engine.shapes[i + 1]);
        let inputs = h * w * c;
        let (features, others) = self.memory.split(flat);
        let gy = others.get(gy);
        params.write_grad(path, "weight", |gw| linear::grad_w(features, gy, [n, inputs, outputs], gw))?;
        if *has_bias {
            let sums: Vec<f64> =
                (0..outputs).map(|o| (0..n).map(|row| f64::from(gy[row * outputs + o])).sum()).collect();
            write_f64(params, path, "bias", &sums)?;
        }
        let Some(gx) = gx else { return Ok(()) };
        // The transposed gradient overwrites the flattened input.
        linear::grad_x_transposed(gy, params.value(path, "weight")?, [n, inputs, outputs], features);
        let mask = self.masks.get(&i);
        let (gx, others) = self.memory.split(gx);
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

/// Returns a norm with the parameters of batch norm and PReLU, which `read` returns by path and name.
pub(super) fn normalised(
    read: impl Fn(&str, &str) -> Result<Vec<f32>>,
    Norm { bn, prelu }: &Norm,
    stats: &Stats,
    of_batch: bool,
) -> Result<Normalised> {
    let (weight, bias) = (read(bn, "weight")?, read(bn, "bias")?);
    let slope = prelu.as_ref().map(|prelu| read(prelu, "weight")).transpose()?;
    Ok(Normalised::new(stats, of_batch, BatchNorm::EPS, [&weight, &bias], slope.as_deref()))
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// Updates the running statistics of the batch norm under `path` with those of a batch of `count` values per channel.
fn track(params: &mut DeviceParams<Cpu>, path: &str, stats: &Stats, count: usize) -> Result<()> {
    let (momentum, kept) = (BatchNorm::MOMENTUM as f32, (1.0 - BatchNorm::MOMENTUM) as f32);
    for (name, new) in [("running_mean", &stats.mean), ("running_var", &stats.unbiased_var(count)?)] {
        let running = params.buffer_mut(path, name)?.iter_mut();
        running.zip(new).for_each(|(running, new)| *running = *running * kept + *new as f32 * momentum);
    }
    Ok(())
}

fn write_f64(params: &mut DeviceParams<Cpu>, path: &str, name: &str, values: &[f64]) -> Result<()> {
    params.write_grad(path, name, |grad| grad.iter_mut().zip(values).for_each(|(grad, v)| *grad = *v as f32))
}
