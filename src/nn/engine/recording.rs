//! A forward pass in training that can run its backward pass.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::memory::{Memory, Store};
use super::program::{Norm, Program, Step, ViewId};
use super::schedule::{Keep, Schedule};
use super::tape::{BufferId, Forward, Tape, Task};
use crate::nn::gradients::Gradients;
use crate::nn::graph::Graph;
use crate::nn::layers::{BatchNorm, Dropout, RunningStats};
use crate::nn::params::Params;
use crate::nn::pool::Pool;
use crate::ops::batch_norm::{self, Stats};
use crate::ops::channels::{self, Normalised, Seen};
use crate::ops::conv::{Conv, Epilogue};
use crate::ops::linear;
use crate::ops::slice::Values;

/// Trains a network without candle's graph of tensors: one forward and one backward pass.
#[derive(Debug)]
pub struct Engine {
    program: Program,
    tape: Tape,
    /// Shapes `(1, h, w, c)` of the values of one image.
    shapes: Vec<[usize; 4]>,
    store: Store,
    /// Memory for the gradients of the parameters.
    pool: Arc<Pool>,
}

impl Engine {
    /// Returns an engine for the network of `graph` with images `(3, side, side)`; `keep` says how much of the forward
    /// pass it keeps. `None` if the engine does not support the network's operations, channels or dtype, or a trained
    /// parameter would get no gradient. Parameters that are frozen now stay frozen.
    pub fn of(graph: &Graph, params: &Params, side: usize, keep: Keep) -> Option<Self> {
        let program = Program::of(graph)?;
        // A parameter without a gradient would never train.
        let used = program.param_names();
        if !params.is_single_on_cpu() || !params.trainable().all(|(name, _)| used.contains(name)) {
            return None;
        }
        let shapes = program.shapes_on_cpu(&params.shapes(), [1, side, side, 3])?;
        let is_trained = |name: &str| params.is_trained(name);
        let schedule = Schedule::new(&program, &shapes, is_trained, keep);
        let tape = Tape::new(&program, &shapes, &schedule, is_trained)?;
        Some(Self { program, tape, shapes, store: Store::default(), pool: Arc::default() })
    }

    /// Returns the number of bytes that the activations of `n` images and their gradients take.
    pub fn activation_bytes(&self, n: usize) -> usize {
        self.tape.len(n).saturating_mul(size_of::<f32>())
    }

    /// Returns the embeddings of images `(N, 3, S, S)`, f32, in training mode, and the recording for the backward pass.
    /// Running statistics are used and updated as in [`BatchNorm`]; `dropout` acts on the input of the fully connected
    /// layer.
    ///
    /// # Errors
    /// When the images do not match the network, or a batch has one value per channel.
    pub fn record<'a>(
        &'a self,
        params: &'a Params,
        images: &Tensor,
        dropout: Option<&Dropout>,
    ) -> Result<(Tensor, Recording<'a>)> {
        let (n, c, h, w) = images.dims4()?;
        if [1, h, w, c] != self.shapes[0] || n == 0 {
            let [_, side, _, _] = self.shapes[0];
            bail!("expected images (N, 3, {side}, {side}), found {:?}", images.shape());
        }
        let images = images.contiguous()?;
        let images = Values::of("images", &images)?;
        let mut memory = Memory::new(&self.tape, &self.store, n);
        channels::to_channels_last(&images, c, h * w, memory.get_mut(self.tape.images));
        let norms = (0..self.program.views.len()).map(|_| None).collect();
        let mut recording = Recording { engine: self, params, n, memory, norms, masks: BTreeMap::new() };
        for forward in &self.tape.forward {
            recording.forward(forward, dropout)?;
            recording.normalise(forward)?;
        }
        let embedding = recording.output()?;
        Ok((embedding, recording))
    }
}

fn dims4(x: &Tensor) -> Option<[usize; 4]> {
    x.dims().try_into().ok()
}

/// Returns a value with the map of its norm, which is applied when it is read.
fn seen<'a>(norm: &'a Option<Normalised>, x: &'a [f32]) -> Seen<'a> {
    Seen { x, constants: norm.as_ref().map(Normalised::constants) }
}

/// Activations of a forward pass, for its backward pass.
#[derive(Debug)]
pub struct Recording<'a> {
    engine: &'a Engine,
    params: &'a Params,
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

    fn param(&self, path: &str, name: &str) -> Result<Tensor> {
        let name = format!("{path}.{name}");
        match self.params.get(&name) {
            Some(tensor) => tensor.contiguous(),
            None => bail!("no parameter {name}"),
        }
    }

    fn forward(&mut self, Forward { i, inputs, flat, y }: &Forward, dropout: Option<&Dropout>) -> Result<()> {
        let engine = self.engine;
        let (step, [.., c]) = (&engine.program.steps[*i], engine.shapes[*i + 1]);
        match step {
            Step::Conv { x, path, .. } => {
                let (conv, weight) = (self.conv(step)?, self.param(path, "weight")?);
                let (y, others) = self.memory.split(*y);
                let seen = seen(&self.norms[*x], others.get(inputs[0]));
                conv.forward(seen.x, seen.prologue(), &Values::of("conv2d", &weight)?, Epilogue::default(), y);
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
                let ([n, h, w, of_input], weight) = (self.shape(*x), self.param(path, "weight")?);
                let bias = has_bias.then(|| self.param(path, "bias")).transpose()?;
                let bias = bias.as_ref().map(|bias| Values::of("linear", bias)).transpose()?;
                let (features, others) = self.memory.split(flat);
                channels::to_channels_first(seen(&self.norms[*x], others.get(inputs[0])), of_input, h * w, features);
                if let Some(mask) = dropout.and_then(|dropout| dropout.mask(features.len())) {
                    features.iter_mut().zip(&mask).for_each(|(x, m)| *x *= m);
                    self.masks.insert(*i, mask);
                }
                let (y, others) = self.memory.split(*y);
                let weight = Values::of("linear", &weight)?;
                linear::forward(others.get(flat), &weight, bias.as_deref(), [n, h * w * of_input, c], y);
            }
        }
        Ok(())
    }

    fn conv(&self, step: &Step) -> Result<Conv> {
        let Step::Conv { x, path, config } = step else { bail!("{step:?} is not a convolution") };
        let weight = self.param(path, "weight")?;
        match dims4(&weight).and_then(|w| Conv::new(self.shape(*x), w, *config)) {
            Some(conv) => Ok(conv),
            None => bail!("conv2d: {path}: unsupported sizes"),
        }
    }

    /// Computes the norm of a step's result, if it has one.
    fn normalise(&mut self, Forward { i, y, .. }: &Forward) -> Result<()> {
        let program = &self.engine.program;
        let Some(view) = program.norm_of(i + 1) else { return Ok(()) };
        let Some(Norm { bn, prelu }) = &program.views[view].norm else { return Ok(()) };
        let ([.., c], data) = (self.shape(view), self.memory.get(*y));
        let running = RunningStats::of(self.params, bn)?;
        let is_frozen = self.params.has_frozen_statistics(bn);
        let stats = if is_frozen { running.read()? } else { batch_norm::stats(data, c) };
        if !is_frozen {
            running.track(&stats, data.len() / c)?;
        }
        self.norms[view] = Some(normalised(self.params, (bn, prelu.as_deref()), &stats, !is_frozen)?);
        Ok(())
    }

    fn output(&self) -> Result<Tensor> {
        let output = self.engine.program.output;
        let ([n, h, w, c], x) = (self.shape(output), self.memory.get(self.engine.tape.output));
        let mut y = vec![0.0; n * h * w * c];
        channels::write(seen(&self.norms[output], x), c, &mut y);
        Tensor::from_vec(y, (n, h * w * c), &Device::Cpu)
    }

    /// Returns the gradients of all trained parameters from the gradient of the embeddings, `(N, embedding_size)`, f32.
    ///
    /// # Errors
    /// When the gradient's shape is not that of the embeddings.
    pub fn backward(mut self, grad: &Tensor) -> Result<Gradients> {
        let engine = self.engine;
        let grad = grad.contiguous()?;
        let (grad, to) = (Values::of("backward", &grad)?, self.memory.get_mut(engine.tape.gradient));
        if grad.len() != to.len() {
            bail!("backward: a gradient of {} elements for embeddings of {}", grad.len(), to.len());
        }
        to.copy_from_slice(&grad);
        let mut all = Gradients::flat(self.params, &engine.pool);
        for task in &engine.tape.backward {
            self.carry_out(task, &mut all)?;
        }
        Ok(all)
    }

    fn carry_out(&mut self, task: &Task, all: &mut Gradients) -> Result<()> {
        let program = &self.engine.program;
        match task {
            Task::Again(forward) => self.forward(forward, None)?,
            Task::Norm { view, x, gy, direct } => {
                let (Some(norm), Some(normalised)) = (&program.views[*view].norm, &self.norms[*view]) else {
                    bail!("backward: view {view} has no norm");
                };
                let (x, others) = self.memory.split(*x);
                let gy = others.get(*gy);
                let of_params = normalised.param_grads(x, gy);
                write_f64(all, &norm.bn, "weight", &of_params.weight);
                write_f64(all, &norm.bn, "bias", &of_params.bias);
                if let Some(prelu) = &norm.prelu {
                    write_f64(all, prelu, "weight", &of_params.slope);
                }
                normalised.grad_x(x, gy, &of_params, direct.map(|direct| others.get(direct)));
            }
            Task::Filter { i, x, gy } => {
                let step = &program.steps[*i];
                let conv = self.conv(step)?;
                let (view, name) = (step.inputs()[0], &step.param_names()[0]);
                let seen = seen(&self.norms[view], self.memory.get(*x));
                all.write(name, |gw| conv.grad_w(seen.x, seen.prologue(), self.memory.get(*gy), gw));
            }
            Task::Input { i, gy, other, gx } => {
                let step = &program.steps[*i];
                let Step::Conv { path, .. } = step else { bail!("{step:?} is not a convolution") };
                let (conv, weight) = (self.conv(step)?, self.param(path, "weight")?);
                let (gx, others) = self.memory.split(*gx);
                let epilogue = Epilogue { residual: other.map(|other| others.get(other)), ..Default::default() };
                conv.grad_x(others.get(*gy), &Values::of("conv2d", &weight)?, epilogue, gx);
            }
            Task::Linear { i, flat, gy, gx } => self.linear(*i, [*flat, *gy], *gx, all)?,
            Task::Sum { view, a, b, y } => {
                let [.., c] = self.shape(*view);
                let (y, others) = self.memory.split(*y);
                channels::add(seen(&None, others.get(*a)), seen(&None, others.get(*b)), c, y);
            }
        }
        Ok(())
    }

    /// Writes the gradients of fully connected step `i`; the gradient of its input, if requested, is channels-last.
    fn linear(&mut self, i: usize, [flat, gy]: [BufferId; 2], gx: Option<BufferId>, all: &mut Gradients) -> Result<()> {
        let step = &self.engine.program.steps[i];
        let Step::Linear { x, path, has_bias } = step else { bail!("{step:?} is not fully connected") };
        let ([n, h, w, c], [.., outputs]) = (self.shape(*x), self.engine.shapes[i + 1]);
        let inputs = h * w * c;
        let weight = self.param(path, "weight")?;
        let (features, others) = self.memory.split(flat);
        let gy = others.get(gy);
        all.write(&format!("{path}.weight"), |gw| linear::grad_w(features, gy, [n, inputs, outputs], gw));
        if *has_bias {
            let sums: Vec<f64> =
                (0..outputs).map(|o| (0..n).map(|row| f64::from(gy[row * outputs + o])).sum()).collect();
            write_f64(all, path, "bias", &sums);
        }
        let Some(gx) = gx else { return Ok(()) };
        // The transposed gradient overwrites the flattened input.
        linear::grad_x_transposed(gy, &Values::of("linear", &weight)?, [n, inputs, outputs], features);
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

/// Returns a norm with the parameters of batch norm and PReLU.
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
