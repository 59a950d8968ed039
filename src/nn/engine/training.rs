//! Networks in training: forward passes that are recorded for their backward passes.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Result, bail};

use super::lowered::Lowered;
use super::network::{Network, Weights, num_pixels};
use super::program::{Norm, Step, View, ViewId};
use super::schedule::{Activations, Schedule};
use super::tape::{Forward, Tape, Task};
use crate::dist::{Ranks, RowOrder};
use crate::nn::device_params::DeviceParams;
use crate::nn::dropout::Dropout;
use crate::nn::graph::Graph;
use crate::nn::params::{Params, param_name};
use crate::ops::backend::{BufferId, FullGrad, Kernels, MapGrad, Order, Scale, Source, Statistics, Sums};

/// A network in training.
#[derive(Debug)]
pub(crate) struct TrainingNetwork<B: Kernels>(Network<B>);

/// A batch of which each rank has a part.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SharedBatch<'a> {
    pub ranks: &'a Ranks,
    /// Order of the images of all ranks.
    pub rows: RowOrder,
    /// Whether norms use the statistics of all ranks.
    pub shares_statistics: bool,
}

/// Activations of a forward pass in training, for its backward pass.
#[derive(Debug)]
pub(crate) struct Recording<'a, B: Kernels> {
    network: &'a Network<B>,
    /// Number of images.
    n: usize,
    memory: B::Memory,
    /// By view.
    norms: Vec<Option<B::Norm>>,
    /// Factors of dropout, by step.
    masks: BTreeMap<usize, B::Mask>,
    batch: Option<SharedBatch<'a>>,
}

impl<B: Kernels> TrainingNetwork<B> {
    /// Returns a network for training. Parameters that are frozen now stay frozen.
    ///
    /// # Errors
    /// When the device has no kernels for it, or a trained parameter would get no gradient.
    pub fn new(graph: &Graph, params: &Params, side: usize, backend: &B, activations: Activations) -> Result<Self> {
        let lowered = Lowered::of(graph, params, [1, side, side], backend)?;
        let (program, shapes) = (&lowered.program, &lowered.shapes);
        // A parameter without a gradient would never train.
        let used = program.param_names();
        let unused: Vec<&str> = params.trainable().map(|(name, _)| name).filter(|name| !used.contains(*name)).collect();
        if !unused.is_empty() {
            bail!("{} trainable parameters take no part in the network: {}", unused.len(), unused.join(", "));
        }
        let is_trained = |name: &str| params.is_trained(name);
        let schedule = Schedule::new(program, shapes, is_trained, activations);
        let tape = Tape::new(program, shapes, &schedule, is_trained)?;
        Ok(Self(Network::new(lowered, tape, backend)))
    }

    /// Layouts of the weights on the device.
    pub fn orders(&self) -> BTreeMap<String, Order> {
        let Network { backend, program, shapes, channels, convs, .. } = &self.0;
        let linear = |x: ViewId| {
            let value = program.views[x].value;
            let [_, h, w, _] = shapes[value];
            backend.linear_order(channels[value], h * w)
        };
        let order = |(i, step): (usize, &Step)| match step {
            Step::Conv { path, .. } => Some((param_name(path, "weight"), backend.filter_order(&convs[&i]))),
            Step::Linear { x, path, .. } => Some((param_name(path, "weight"), linear(*x))),
            _ => None,
        };
        let mut orders: BTreeMap<String, Order> = program.steps.iter().enumerate().filter_map(order).collect();
        for View { value, norm } in &program.views {
            let (c, padded) = (channels[*value], shapes[*value][3]);
            let Some(norm) = norm.as_ref().filter(|_| c < padded) else { continue };
            let statistics = ["running_mean", "running_var"].map(|name| param_name(&norm.bn, name));
            let names = norm.param_names().into_iter().chain(statistics);
            orders.extend(names.map(|name| (name, Order::padded(c, padded))));
        }
        orders
    }

    /// Returns the number of bytes that the activations of `n` images and their gradients take, in f32.
    pub fn activation_bytes(&self, n: usize) -> usize {
        self.0.tape.layout.len(n).saturating_mul(size_of::<f32>())
    }

    /// Returns the embeddings `(N, embedding_size)` of `n` images in training mode, and the recording for the backward
    /// pass. Running statistics are used and updated as PyTorch does; `dropout` acts on the input of the fully
    /// connected layer.
    ///
    /// # Errors
    /// When the images do not match the network, or a norm gets only one value per channel.
    pub fn record<'a>(
        &'a self,
        params: &mut DeviceParams<B>,
        (images, n): (&B::Images, usize),
        dropout: Option<&Dropout>,
        batch: Option<SharedBatch<'a>>,
    ) -> Result<(B::Array, Recording<'a, B>)> {
        let network = &self.0;
        let memory = network.start(images, n)?;
        let norms = (0..network.program.views.len()).map(|_| None).collect();
        let mut recording = Recording { network, n, memory, norms, masks: BTreeMap::new(), batch };
        for (i, forward) in network.tape.forward.iter().enumerate() {
            recording.draw_mask(forward, dropout)?;
            recording.forward(params, forward)?;
            recording.normalise(params, forward)?;
            network.backend.release(&mut recording.memory, i + 1);
        }
        params.count_batch();
        let embeddings = network.outputs(&mut recording.memory, &recording.norms)?.swap_remove(0);
        Ok((embeddings, recording))
    }
}

impl<B: Kernels> Recording<'_, B> {
    fn forward(&mut self, params: &DeviceParams<B>, forward: &Forward) -> Result<()> {
        let mask = self.masks.get(&forward.i);
        self.network.step(&mut self.memory, &self.norms, Weights::Trained(params), forward, (self.n, mask))
    }

    /// Draws the factors of dropout of a fully connected step.
    fn draw_mask(&mut self, Forward { i, .. }: &Forward, dropout: Option<&Dropout>) -> Result<()> {
        let Step::Linear { x, drops: true, .. } = &self.network.program.steps[*i] else { return Ok(()) };
        let mut shape = self.network.shape(*x, self.n);
        shape[3] = self.network.channels[self.network.program.views[*x].value];
        let of_image = shape[1..].iter().product::<usize>();
        let num_images = self.batch.map_or(self.n, |batch| batch.rows.num_rows());
        if let Some(mut factors) = dropout.and_then(|dropout| dropout.mask(num_images * of_image)) {
            // All ranks draw the same.
            if let Some(batch) = &self.batch {
                factors = batch.rows.own(&factors, of_image);
            }
            self.masks.insert(*i, self.network.backend.mask(factors, shape)?);
        }
        Ok(())
    }

    /// Prepares the norm of a step's result, if it has one.
    fn normalise(&mut self, params: &mut DeviceParams<B>, Forward { i, y, .. }: &Forward) -> Result<()> {
        let (backend, program) = (&self.network.backend, &self.network.program);
        let Some(view) = program.norm_of(i + 1) else { return Ok(()) };
        let Some(norm) = &program.views[view].norm else { return Ok(()) };
        let is_frozen = params.has_frozen_statistics(&norm.bn);
        let statistics = match self.batch {
            _ if is_frozen => Statistics::Running,
            Some(batch) if batch.shares_statistics => Statistics::OfRanks(batch.ranks),
            _ => Statistics::OfBatch,
        };
        let c = self.network.shape(view, self.n)[3];
        let params = params.norm(&norm.bn, norm.prelu.as_deref())?;
        self.norms[view] = Some(backend.norm(&self.memory, *y, c, params, statistics)?);
        Ok(())
    }

    /// Writes the gradients of all trained parameters from the gradient of the embeddings, `(N, embedding_size)`.
    ///
    /// # Errors
    /// When the gradient has another size than the embeddings.
    pub fn backward(self, params: &mut DeviceParams<B>, gradient: &B::Array) -> Result<()> {
        self.backward_with(params, gradient, &mut |_, _| ())
    }

    /// Like [`Self::backward`]; calls `on_written` with the gradients and each range of them once it is final.
    ///
    /// # Errors
    /// Same as [`Self::backward`].
    pub fn backward_with(
        mut self,
        params: &mut DeviceParams<B>,
        gradient: &B::Array,
        on_written: &mut dyn FnMut(&B::Array, Range<usize>),
    ) -> Result<()> {
        let Network { backend, tape, .. } = self.network;
        let what = |error| candle_core::Error::msg(format!("backward: the gradient of the embeddings: {error}"));
        backend.set(&mut self.memory, tape.gradient, gradient).map_err(what)?;
        let first = tape.forward.len() + 3;
        for (i, task) in tape.backward.iter().enumerate() {
            self.run(task, params)?;
            for range in self.written(task, params)? {
                on_written(params.grads(), range);
            }
            backend.release(&mut self.memory, first + i);
        }
        Ok(())
    }

    /// Ranges of the gradients that a task writes: no other does.
    fn written(&self, task: &Task, params: &DeviceParams<B>) -> Result<Vec<Range<usize>>> {
        let program = &self.network.program;
        let names: Vec<String> = match task {
            Task::Norm { view, .. } => program.views[*view].norm.iter().flat_map(Norm::param_names).collect(),
            Task::Filter { i, .. } | Task::Linear { i, .. } => program.steps[*i].param_names(),
            _ => Vec::new(),
        };
        let ranges = names.iter().map(|name| params.range_of_grad(name));
        Ok(ranges.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn run(&mut self, task: &Task, params: &mut DeviceParams<B>) -> Result<()> {
        let Network { backend, program, .. } = self.network;
        match task {
            Task::Again(forward) => self.forward(params, forward),
            Task::Norm { view, grad } => {
                let (Some(norm), Some(prepared)) = (&program.views[*view].norm, &self.norms[*view]) else {
                    bail!("backward: view {view} has no norm");
                };
                let c = self.network.shape(*view, self.n)[3];
                let grads = params.norm_grads(&norm.bn, norm.prelu.as_deref())?;
                backend.norm_backward(&mut self.memory, prepared, *grad, c, grads)
            }
            Task::Filter { i, x, gy } => {
                let Step::Conv { x: view, path, .. } = &program.steps[*i] else { bail!("step {i} is no convolution") };
                let source = Source { buffer: *x, norm: self.norms[*view].as_ref() };
                let (_, grads) = params.weight_and_grads(path, false)?;
                backend.conv_grad_w(&mut self.memory, &self.network.conv(*i, self.n), source, *gy, grads)
            }
            Task::Input { i, gy, other, gx } => {
                let Step::Conv { path, .. } = &program.steps[*i] else { bail!("step {i} is no convolution") };
                let (conv, weight) = (self.network.conv(*i, self.n), params.weight(path)?);
                backend.conv_grad_x(&mut self.memory, &conv, *gy, weight, *other, *gx)
            }
            Task::Linear { i, flat, gy, gx } => {
                let Step::Linear { x, path, has_bias, .. } = &program.steps[*i] else { bail!("step {i} is no layer") };
                let (shape, outputs) = (self.network.shape(*x, self.n), self.network.shapes[*i + 1][3]);
                let mask = self.masks.get(i);
                let (weight, grads) = params.weight_and_grads(path, *has_bias)?;
                let task = FullGrad { flat: *flat, gy: *gy, gx: *gx, shape, outputs, mask };
                backend.full_backward(&mut self.memory, task, weight, grads)
            }
            Task::Spread { .. } | Task::Scale { .. } | Task::Factors { .. } | Task::Activate { .. } => {
                self.pointwise(task)
            }
            Task::MaxPool { .. } | Task::Upsample { .. } | Task::Part { .. } => self.map(task),
            Task::Sum { view, a, b, y } => {
                let source = |buffer: &usize| Source { buffer: *buffer, norm: None };
                let c = self.network.shape(*view, self.n)[3];
                backend.sum(&mut self.memory, source(a), source(b), c, *y)
            }
        }
    }

    /// Backward passes of means, products and activations.
    fn pointwise(&mut self, task: &Task) -> Result<()> {
        let Network { backend, program, .. } = self.network;
        let raw = |buffer: BufferId| Source { buffer, norm: None };
        match *task {
            Task::Spread { i, grad: MapGrad { gy, other, gx } } => {
                let Step::Mean { x } = program.steps[i] else { bail!("step {i} is no mean") };
                let shape = self.network.shape(x, self.n);
                let of = Scale { x: None, by: gy, factor: 1.0 / num_pixels(shape), plus: other.map(raw) };
                backend.scale(&mut self.memory, of, shape, gx)
            }
            Task::Scale { i, by, grad: MapGrad { gy, other, gx } } => {
                let Step::Scale { x, .. } = program.steps[i] else { bail!("step {i} is no product") };
                let of = Scale { x: Some(raw(gy)), by, factor: 1.0, plus: other.map(raw) };
                backend.scale(&mut self.memory, of, self.network.shape(x, self.n), gx)
            }
            Task::Factors { i, x: buffer, gy, gs } => {
                let Step::Scale { x, .. } = program.steps[i] else { bail!("step {i} is no product") };
                let source = Source { buffer, norm: self.norms[x].as_ref() };
                let of = Sums { x: source, with: Some(gy), factor: 1.0 };
                backend.sums(&mut self.memory, of, self.network.shape(x, self.n), gs)
            }
            Task::Activate { i, y, gy, gx } => {
                let Step::Activate { activation, .. } = program.steps[i] else { bail!("step {i} is no activation") };
                backend.activate_backward(&mut self.memory, y, gy, activation, gx)
            }
            _ => bail!("{task:?} is no pass over pixels"),
        }
    }

    /// Backward passes of max pooling, upsampling and concatenation.
    fn map(&mut self, task: &Task) -> Result<()> {
        let Network { backend, program, channels, .. } = self.network;
        let step = |i: usize| &program.steps[i];
        match *task {
            Task::MaxPool { i, x: buffer, grad } => {
                let Step::MaxPool { x, window } = step(i) else { bail!("step {i} is no pooling") };
                let source = Source { buffer, norm: self.norms[*x].as_ref() };
                let shape = self.network.shape(*x, self.n);
                backend.max_pool_backward(&mut self.memory, source, *window, shape, grad)
            }
            Task::Upsample { i, grad } => {
                let Step::Upsample { x, factor } = step(i) else { bail!("step {i} is no upsampling") };
                backend.upsample_backward(&mut self.memory, *factor, self.network.shape(*x, self.n), grad)
            }
            Task::Part { i, part, grad } => {
                let Step::Concat { parts } = step(i) else { bail!("step {i} is no concatenation") };
                let of = |part: &ViewId| channels[program.views[*part].value];
                let first = parts[..part].iter().map(of).sum();
                backend.concat_backward(&mut self.memory, [first, channels[i + 1], of(&parts[part])], grad)
            }
            _ => bail!("{task:?} is no pass over maps"),
        }
    }
}
