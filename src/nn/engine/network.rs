//! Runs programs on a device: forward passes of inference, forward and backward passes of training.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, bail};

use super::fold::Folding;
use super::program::{Norm, Program, Step, View, ViewId};
use super::schedule::{Activations, Schedule};
use super::tape::{Forward, Tape, Task};
use crate::nn::device_params::DeviceParams;
use crate::nn::dropout::Dropout;
use crate::nn::graph::Graph;
use crate::nn::params::{Params, Parts};
use crate::ops::backend::{
    BufferId, ConvShape, FullGrad, Kernels, Order, Part, Scale, Source, Statistics, Sums, Weight,
};
use crate::ops::batch_norm::{EPS, Stats};
use crate::ops::channels::{Constants, Normalised};
use crate::ops::slice::Values;

/// A program on a device. Parameters in its calls are those of the network that it was made for.
#[derive(Debug)]
pub(crate) struct Network<B: Kernels> {
    backend: B,
    program: Program,
    tape: Tape,
    /// Shapes `(1, h, w, c)` of the values of one image.
    shapes: Vec<[usize; 4]>,
    /// Channels of the values without those that the device adds.
    channels: Vec<usize>,
    /// Sizes by the step; the number of images does not matter.
    convs: BTreeMap<usize, ConvShape>,
    pool: B::Pool,
}

/// A network for inference, with the weights it had when it was prepared.
#[derive(Debug)]
pub(crate) struct InferenceNetwork<B: Kernels> {
    network: Network<B>,
    /// By view.
    norms: Vec<Option<B::Norm>>,
    /// By step.
    filters: BTreeMap<usize, B::Filter>,
    /// Weight and bias of fully connected layers, by step.
    full: BTreeMap<usize, (Whole<B>, Option<Whole<B>>)>,
}

/// An array and its length.
#[derive(Debug)]
struct Whole<B: Kernels>(B::Array, usize);

impl<B: Kernels> Whole<B> {
    fn upload(backend: &B, values: Vec<f32>) -> Result<Self> {
        let len = values.len();
        Ok(Self(backend.upload(values)?, len))
    }

    fn part(&self) -> Part<'_, B> {
        Part { array: &self.0, range: 0..self.1 }
    }
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
}

/// Weights of a forward pass.
#[derive(Clone, Copy)]
enum Weights<'a, B: Kernels> {
    Trained(&'a DeviceParams<B>),
    Prepared(&'a InferenceNetwork<B>),
}

impl<'a, B: Kernels> Weights<'a, B> {
    fn filter(self, i: usize, path: &str) -> Result<Weight<'a, B>> {
        match self {
            Self::Trained(params) => params.weight(path).map(Weight::Trained),
            Self::Prepared(inference) => Ok(Weight::Prepared(&inference.filters[&i])),
        }
    }

    /// Weight and bias of a fully connected layer.
    fn full(self, i: usize, path: &str, has_bias: bool) -> Result<(Part<'a, B>, Option<Part<'a, B>>)> {
        match self {
            Self::Trained(params) => {
                Ok((params.weight(path)?, has_bias.then(|| params.part(path, "bias")).transpose()?))
            }
            Self::Prepared(inference) => {
                let (weight, bias) = &inference.full[&i];
                Ok((weight.part(), bias.as_ref().map(Whole::part)))
            }
        }
    }
}

impl<B: Kernels> Network<B> {
    /// Returns a network for training. Parameters that are frozen now stay frozen.
    ///
    /// # Errors
    /// When the device has no kernels for it, or a trained parameter would get no gradient.
    pub fn training(
        graph: &Graph,
        params: &Params,
        side: usize,
        backend: &B,
        activations: Activations,
    ) -> Result<Self> {
        let Lowered { program, shapes, channels, convs } = Lowered::of(graph, params, [1, side], backend)?;
        // A parameter without a gradient would never train.
        let used = program.param_names();
        let unused: Vec<&str> = params.trainable().map(|(name, _)| name).filter(|name| !used.contains(*name)).collect();
        if !unused.is_empty() {
            bail!("{} trainable parameters take no part in the network: {}", unused.len(), unused.join(", "));
        }
        let is_trained = |name: &str| params.is_trained(name);
        let schedule = Schedule::new(&program, &shapes, is_trained, activations);
        let tape = Tape::new(&program, &shapes, &schedule, is_trained)?;
        Ok(Self { backend: backend.clone(), program, tape, shapes, channels, convs, pool: B::Pool::default() })
    }

    /// Layouts of the weights on the device.
    pub fn orders(&self) -> BTreeMap<String, Order> {
        let order = |(i, step): (usize, &Step)| match step {
            Step::Conv { path, .. } => Some((format!("{path}.weight"), self.backend.filter_order(&self.convs[&i]))),
            Step::Linear { x, path, .. } => Some((format!("{path}.weight"), self.linear_order(*x))),
            _ => None,
        };
        let mut orders: BTreeMap<String, Order> = self.program.steps.iter().enumerate().filter_map(order).collect();
        for View { value, norm } in &self.program.views {
            let (c, padded) = (self.channels[*value], self.shapes[*value][3]);
            let Some(norm) = norm.as_ref().filter(|_| c < padded) else { continue };
            let statistics = ["running_mean", "running_var"].map(|name| format!("{}.{name}", norm.bn));
            let names = norm.param_names().into_iter().chain(statistics);
            orders.extend(names.map(|name| (name, Order::padded(c, padded))));
        }
        orders
    }

    /// Layout of the weight of a fully connected step that reads a view.
    fn linear_order(&self, x: ViewId) -> Order {
        let value = self.program.views[x].value;
        let [_, h, w, _] = self.shapes[value];
        self.backend.linear_order(self.channels[value], h * w)
    }

    /// Returns the number of bytes that the activations of `n` images and their gradients take, in f32.
    pub fn activation_bytes(&self, n: usize) -> usize {
        self.tape.layout.len(n).saturating_mul(size_of::<f32>())
    }

    /// Returns the embeddings `(N, embedding_size)` of `n` images in training mode, and the recording for the backward
    /// pass. Running statistics are used and updated as PyTorch does; `dropout` acts on the input of the fully
    /// connected layer.
    ///
    /// # Errors
    /// When the images do not match the network, or a norm gets only one value per channel.
    pub fn record(
        &self,
        params: &mut DeviceParams<B>,
        (images, n): (&B::Images, usize),
        dropout: Option<&Dropout>,
    ) -> Result<(B::Array, Recording<'_, B>)> {
        let memory = self.start(images, n)?;
        let norms = (0..self.program.views.len()).map(|_| None).collect();
        let mut recording = Recording { network: self, n, memory, norms, masks: BTreeMap::new() };
        for (i, forward) in self.tape.forward.iter().enumerate() {
            recording.draw_mask(forward, dropout)?;
            recording.forward(params, forward)?;
            recording.normalise(params, forward)?;
            self.backend.release(&mut recording.memory, i + 1);
        }
        params.count_batch();
        let embeddings = self.output(&mut recording.memory, &recording.norms)?;
        Ok((embeddings, recording))
    }

    fn start(&self, images: &B::Images, n: usize) -> Result<B::Memory> {
        let mut memory = self.backend.memory(&self.tape.layout, &self.pool, n)?;
        self.backend.load(&mut memory, images, self.tape.images)?;
        Ok(memory)
    }

    /// Shape of the value of a view, for `n` images.
    fn shape(&self, view: ViewId, n: usize) -> [usize; 4] {
        let [_, h, w, c] = self.shapes[self.program.views[view].value];
        [n, h, w, c]
    }

    fn conv(&self, i: usize, n: usize) -> ConvShape {
        let conv = self.convs[&i];
        let [_, h, w, c] = conv.x;
        ConvShape { x: [n, h, w, c], ..conv }
    }

    /// Runs a step of a forward pass.
    fn step(
        &self,
        memory: &mut B::Memory,
        norms: &[Option<B::Norm>],
        weights: Weights<B>,
        Forward { i, inputs, residual, flat, y }: &Forward,
        (n, mask): (usize, Option<&B::Mask>),
    ) -> Result<()> {
        let backend = &self.backend;
        let source = |view: ViewId, input: usize| Source { buffer: inputs[input], norm: norms[view].as_ref() };
        match &self.program.steps[*i] {
            Step::Conv { x, path, .. } => {
                backend.conv(memory, &self.conv(*i, n), source(*x, 0), weights.filter(*i, path)?, *residual, *y)
            }
            Step::Add { a, b } => backend.sum(memory, source(*a, 0), source(*b, 1), self.shape(*a, n)[3], *y),
            Step::Write { x } => backend.apply(memory, source(*x, 0), self.shape(*x, n)[3], *y),
            Step::Mean { x } => {
                let shape = self.shape(*x, n);
                let of = Sums { x: source(*x, 0), with: None, factor: 1.0 / num_pixels(shape) };
                backend.sums(memory, of, shape, *y)
            }
            Step::Scale { x, plus, .. } => {
                let plus = plus.map(|plus| source(plus, 2));
                let of = Scale { x: Some(source(*x, 0)), by: inputs[1], factor: 1.0, plus };
                backend.scale(memory, of, self.shape(*x, n), *y)
            }
            Step::Activate { x, activation } => {
                backend.activate(memory, source(*x, 0), *activation, self.shape(*x, n)[3], *y)
            }
            Step::Linear { x, path, has_bias, .. } => {
                let Some(flat) = *flat else { bail!("linear: no buffer for the input of {path}") };
                let (shape, outputs) = (self.shape(*x, n), self.shapes[*i + 1][3]);
                backend.flatten(memory, source(*x, 0), shape, mask, flat)?;
                let (weight, bias) = weights.full(*i, path, *has_bias)?;
                backend.full(memory, flat, weight, bias, [n, shape[1..].iter().product(), outputs], *y)
            }
        }
    }

    fn output(&self, memory: &mut B::Memory, norms: &[Option<B::Norm>]) -> Result<B::Array> {
        let output = self.program.output;
        let source = Source { buffer: self.tape.output, norm: norms[output].as_ref() };
        let embeddings = self.backend.get(memory, source, self.shape(output, 1)[3])?;
        self.backend.release(memory, self.tape.forward.len() + 1);
        Ok(embeddings)
    }
}

/// Number of pixels of an image of this shape.
fn num_pixels([_, h, w, _]: [usize; 4]) -> f32 {
    (h * w) as f32
}

/// A program with its sizes on a device.
#[derive(Debug)]
pub(crate) struct Lowered {
    program: Program,
    /// Shapes of the values on the device.
    shapes: Vec<[usize; 4]>,
    /// Channels of the values without those that the device adds.
    channels: Vec<usize>,
    /// Sizes of the convolutions, by step.
    convs: BTreeMap<usize, ConvShape>,
}

impl Lowered {
    /// Returns the program of a network for `n` images of `side` pixels, `[n, side]`.
    ///
    /// # Errors
    /// When the engine or the device has no kernels for it: the first thing that it lacks.
    pub fn of(graph: &Graph, params: &Params, [n, side]: [usize; 2], backend: &impl Kernels) -> Result<Self> {
        if !params.is_single_on_cpu() {
            bail!("the engine computes in f32 from parameters on the CPU: ModuleT::forward_t runs other networks");
        }
        let (program, weights) = (Program::of(graph)?, params.shapes());
        let mut shapes = program.shapes(&weights, [n.max(1), side, side, 3])?;
        let channels: Vec<usize> = shapes.iter().map(|shape| shape[3]).collect();
        for (value, shape) in shapes.iter_mut().enumerate() {
            let [.., c] = shape;
            match program.is_wide(value) {
                true => backend.check_embedding_size(*c)?,
                false => *c = backend.channels(*c),
            }
        }
        let convs = program.convs(&weights, &shapes)?;
        program.check_padding(|value| channels[value] < shapes[value][3])?;
        convs.values().try_for_each(|conv| backend.check_conv(conv))?;
        Ok(Self { program, shapes, channels, convs })
    }
}

impl<B: Kernels> InferenceNetwork<B> {
    /// Returns a network for inference with these parameters, which are freed one by one if nothing else holds them.
    /// Other numbers of images than it was lowered for work, but may be slower.
    ///
    /// # Errors
    /// When a parameter is missing, or the device runs out of memory.
    pub fn new(lowered: Lowered, parts: Parts, backend: &B) -> Result<Self> {
        let Lowered { program, mut shapes, channels, convs } = lowered;
        let folding = if B::FOLDS { Folding::of(&program) } else { Folding::none(&program) };
        let mut tensors = Tensors(parts.all());
        let mut constants = Vec::new();
        for View { norm, .. } in &program.views {
            constants.push(norm.as_ref().map(|norm| tensors.constants(norm)).transpose()?);
        }
        shapes.iter_mut().for_each(|shape| shape[0] = 1);
        let tape = Tape::inference(&program, &shapes, &folding);
        let (mut filters, mut full) = (BTreeMap::new(), BTreeMap::new());
        // Fully connected layers are copied, so they come first, before packed filters take memory.
        for (i, step) in program.steps.iter().enumerate() {
            let Step::Linear { x, path, has_bias, .. } = step else { continue };
            let value = program.views[*x].value;
            let [_, h, w, _] = shapes[value];
            let order = backend.linear_order(channels[value], h * w);
            let Whole(wide, len) = Whole::upload(backend, tensors.laid_out(path, "weight", &order)?)?;
            let weight = Whole(backend.short(&wide)?.unwrap_or(wide), len);
            let bias = has_bias.then(|| tensors.laid_out(path, "bias", &Order::Same)).transpose()?;
            full.insert(i, (weight, bias.map(|bias| Whole::upload(backend, bias)).transpose()?));
        }
        for (i, step) in program.steps.iter().enumerate() {
            let Step::Conv { path, .. } = step else { continue };
            let view = program.norm_of(i + 1).filter(|_| folding.norms[i + 1]);
            let norm = view.and_then(|view| constants[view].as_ref());
            let weight = tensors.take(path, "weight")?.contiguous()?;
            filters.insert(i, backend.filter(&convs[&i], &Values::of(path, &weight)?, norm)?);
        }
        let is_seen = |view: &ViewId| !folding.norms[program.views[*view].value];
        let norm = |view: ViewId| constants[view].as_ref().filter(|_| is_seen(&view));
        let memory_channels = |view: ViewId| shapes[program.views[view].value][3];
        let prepared = |view| norm(view).map(|norm| backend.constant_norm(norm, memory_channels(view))).transpose();
        let norms = (0..program.views.len()).map(prepared);
        let norms = norms.collect::<Result<_>>()?;
        let network =
            Network { backend: backend.clone(), program, tape, shapes, channels, convs, pool: B::Pool::default() };
        Ok(Self { network, norms, filters, full })
    }

    /// Returns the embeddings `(n, embedding_size)` in evaluation mode.
    ///
    /// # Errors
    /// When the images do not match the network.
    pub fn run(&self, images: &B::Images, n: usize) -> Result<B::Array> {
        let network = &self.network;
        let mut memory = network.start(images, n)?;
        for (i, forward) in network.tape.forward.iter().enumerate() {
            network.step(&mut memory, &self.norms, Weights::Prepared(self), forward, (n, None))?;
            network.backend.release(&mut memory, i + 1);
        }
        network.output(&mut memory, &self.norms)
    }

    /// The convolutions of `n` images.
    pub fn convs(&self, n: usize) -> Vec<ConvShape> {
        self.network.convs.keys().map(|i| self.network.conv(*i, n)).collect()
    }
}

/// Parameters and buffers by name.
struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    /// Removes and returns a tensor.
    fn take(&mut self, path: &str, name: &str) -> Result<Tensor> {
        let name = format!("{path}.{name}");
        self.0.remove(&name).ok_or_else(|| candle_core::Error::msg(format!("no parameter {name}")))
    }

    fn laid_out(&mut self, path: &str, name: &str, order: &Order) -> Result<Vec<f32>> {
        let tensor = self.take(path, name)?.contiguous()?;
        let (values, mut to) = (Values::of(path, &tensor)?, Vec::with_capacity(tensor.elem_count()));
        order.laid_out(&values, &mut to);
        Ok(to)
    }

    /// Returns the map of a norm by its running statistics.
    fn constants(&mut self, Norm { bn, prelu }: &Norm) -> Result<Constants> {
        let mut read = |path: &str, name: &str| self.take(path, name)?.to_vec1::<f32>();
        let widened = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
        let stats = Stats { mean: widened(read(bn, "running_mean")?), var: widened(read(bn, "running_var")?) };
        let (weight, bias) = (read(bn, "weight")?, read(bn, "bias")?);
        let slope = prelu.as_ref().map(|prelu| read(prelu, "weight")).transpose()?;
        let norm = Normalised::new(&stats, false, EPS, [&weight, &bias], slope.as_deref());
        Ok(norm.constants().clone())
    }
}

impl Parts {
    fn all(self) -> BTreeMap<String, Tensor> {
        self.trained.into_iter().chain(self.fixed).chain(self.buffers).collect()
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
        if let Some(factors) = dropout.and_then(|dropout| dropout.mask(shape.iter().product())) {
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
        let statistics = if is_frozen { Statistics::Running } else { Statistics::OfBatch };
        let c = self.network.shape(view, self.n)[3];
        let params = params.norm(&norm.bn, norm.prelu.as_deref())?;
        self.norms[view] = Some(backend.norm(&self.memory, *y, c, params, statistics)?);
        Ok(())
    }

    /// Writes the gradients of all trained parameters from the gradient of the embeddings, `(N, embedding_size)`.
    ///
    /// # Errors
    /// When the gradient has another size than the embeddings.
    pub fn backward(mut self, params: &mut DeviceParams<B>, gradient: &B::Array) -> Result<()> {
        let Network { backend, tape, .. } = self.network;
        let what = |error| candle_core::Error::msg(format!("backward: the gradient of the embeddings: {error}"));
        backend.set(&mut self.memory, tape.gradient, gradient).map_err(what)?;
        let first = tape.forward.len() + 3;
        for (i, task) in tape.backward.iter().enumerate() {
            self.run(task, params)?;
            backend.release(&mut self.memory, first + i);
        }
        Ok(())
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
            Task::Spread { i, gy, other, gx } => {
                let Step::Mean { x } = program.steps[i] else { bail!("step {i} is no mean") };
                let shape = self.network.shape(x, self.n);
                let of = Scale { x: None, by: gy, factor: 1.0 / num_pixels(shape), plus: other.map(raw) };
                backend.scale(&mut self.memory, of, shape, gx)
            }
            Task::Scale { i, by, gy, other, gx } => {
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
}
