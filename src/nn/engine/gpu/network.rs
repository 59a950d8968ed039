//! A network in device memory, and its forward pass.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use candle_core::{Result, bail};

use super::params::orders;
use super::recording::Recording;
use crate::gpu::GpuBackend;
use crate::gpu::batch_norm::{self, Norm, Seen};
use crate::gpu::conv::Conv;
use crate::gpu::{Array, Device, Element, Product, rows};
use crate::nn::device_params::DeviceParams;
use crate::nn::engine::program::{Program, Step, ViewId};
use crate::nn::engine::schedule::{Activations, Schedule};
use crate::nn::graph::Graph;
use crate::nn::layers::Dropout;
use crate::nn::params::Params;

/// A network prepared for a GPU. Its parameters, `params` in the calls, are those that it was made with.
pub(crate) struct Network {
    pub(super) program: Program,
    pub(super) schedule: Schedule,
    pub(super) device: Device,
    pub(super) element: Element,
    /// Shape `(h, w, c)` of each value; the images' channels are padded to a full access.
    pub(super) shapes: Vec<[usize; 3]>,
    side: usize,
    /// Shapes of the filters, by the step of their convolution.
    filters: BTreeMap<usize, [usize; 4]>,
    /// Norms of a network that is not trained, by view: its running statistics never change.
    fixed: Mutex<BTreeMap<ViewId, Norm>>,
}

/// State of a forward pass.
pub(super) struct Forward {
    /// Number of images.
    pub n: usize,
    /// Values `(n, h, w, c)`, with the sizes of [`Network::shapes`].
    pub values: Vec<Option<Array>>,
    /// Element types of the values.
    pub elements: Vec<Element>,
    /// Prepared norms, by view.
    pub norms: Vec<Option<Norm>>,
    /// Inputs of fully connected layers after dropout, with the dropout mask, by step.
    pub flat: Vec<Option<(Array, Option<Array>)>>,
}

/// Statistics that norms use.
#[derive(Clone, Copy)]
pub(super) enum Statistics {
    /// Batch statistics, except for norms whose statistics are frozen.
    OfBatch,
    Running,
}

impl Network {
    /// Whether the engine supports the network of `graph`, for images of `side` pixels and products of `element`: its
    /// operations, channel counts and types.
    pub fn supports(graph: &Graph, params: &Params, side: usize, element: Element) -> bool {
        Self::laid_out(graph, params, side, element).is_some()
    }

    /// Returns the network's steps and the shapes of its values for one image; none if it is not supported.
    fn laid_out(graph: &Graph, params: &Params, side: usize, element: Element) -> Option<(Program, Vec<[usize; 4]>)> {
        let program = Program::of(graph)?;
        let used = program.param_names();
        if !params.is_single_on_cpu() || !params.trainable().all(|(name, _)| used.contains(name)) {
            return None;
        }
        let weights = params.shapes();
        let shapes = program.shapes(&weights, [1, side, side, 3])?;
        let per_access = element.per_access();
        let is_whole = shapes[1..].iter().all(|[.., c]| c.is_multiple_of(per_access));
        let is_known = |step: &Step| match step {
            Step::Conv { x, path, config } => {
                let ([.., c], weight) = (shapes[program.views[*x].value], &weights[&format!("{path}.weight")]);
                let is_grouped = weight[0] == c && per_access.is_multiple_of(weight[1]);
                weight[2] == weight[3] && (config.groups == 1 || is_grouped)
            }
            _ => true,
        };
        let is_supported = is_whole && program.steps.iter().all(is_known);
        is_supported.then_some((program, shapes))
    }

    /// Returns the network of `graph` and its parameters on the device, for images of `side` pixels; none if the engine
    /// does not [support](Self::supports) it.
    ///
    /// # Errors
    /// When the device runs out of memory.
    pub fn upload(
        graph: &Graph,
        params: &Params,
        side: usize,
        backend: &GpuBackend,
        activations: Activations,
    ) -> Result<Option<(Self, DeviceParams<GpuBackend>)>> {
        let GpuBackend { device, element } = backend.clone();
        let Some((program, mut shapes)) = Self::laid_out(graph, params, side, element) else { return Ok(None) };
        let weights = params.shapes();
        let orders = orders(&program, &shapes, &weights, element);
        shapes[0][3] = element.per_access();
        let schedule = Schedule::new(&program, &shapes, |name| params.is_trained(name), activations);
        let Some(filters) = program.filters(&weights) else { bail!("a convolution has no filters") };
        let shapes = shapes.into_iter().map(|[_, h, w, c]| [h, w, c]).collect();
        let network = Self { program, schedule, device, element, shapes, side, filters, fixed: Mutex::default() };
        Ok(Some((network, DeviceParams::new(backend, params.parts(), orders)?)))
    }

    /// Returns the embeddings `(n, d)`, f32, of normalised images `(n, side, side, c)`, by the running statistics. The
    /// images have the products' type, and `c` is the number of elements per access.
    ///
    /// # Errors
    /// When the images have another size or type.
    pub fn infer(&self, params: &DeviceParams<GpuBackend>, images: &Array) -> Result<Array> {
        let last_uses = self.last_uses();
        let mut forward = self.start(images)?;
        for i in 0..self.program.steps.len() {
            self.step(i, params, &mut forward, Statistics::Running, None)?;
            // Values that no later step reads are freed, so that the next steps can reuse the memory.
            for (value, last) in last_uses.iter().enumerate() {
                if *last == i {
                    forward.values[value] = None;
                }
            }
            forward.flat[i] = None;
        }
        self.output(&forward)
    }

    /// Like [`Self::infer`], but in training mode, and returns a recording for the backward pass. Norms whose statistics
    /// are frozen use the running statistics and do not update them.
    ///
    /// # Errors
    /// When the images have another size or type, or a norm gets only one value per channel.
    pub fn record(
        &self,
        params: &mut DeviceParams<GpuBackend>,
        images: &Array,
        dropout: Option<&Dropout>,
    ) -> Result<(Array, Recording<'_>)> {
        let mut forward = self.start(images)?;
        for (i, released) in self.schedule.released.iter().enumerate() {
            self.step(i, params, &mut forward, Statistics::OfBatch, dropout)?;
            released.iter().for_each(|value| forward.values[*value] = None);
        }
        params.count_batch();
        let embedding = self.output(&forward)?;
        Ok((embedding, Recording::new(self, forward)))
    }

    /// Last step that uses each value; `usize::MAX` for the output.
    fn last_uses(&self) -> Vec<usize> {
        let mut last = vec![0; self.program.steps.len() + 1];
        for (i, step) in self.program.steps.iter().enumerate() {
            last[i + 1] = i;
            step.inputs().iter().for_each(|view| last[self.program.views[*view].value] = i);
        }
        last[self.program.views[self.program.output].value] = usize::MAX;
        last
    }

    fn start(&self, images: &Array) -> Result<Forward> {
        let of_image: usize = self.shapes[0].iter().product();
        if images.element() != self.element || images.len() == 0 || !images.len().is_multiple_of(of_image) {
            bail!(
                "expected images (N, {side}, {side}, {}) of {:?}, found {} {:?}",
                self.shapes[0][2],
                self.element,
                images.len(),
                images.element(),
                side = self.side
            );
        }
        let mut values = vec![None; self.shapes.len()];
        values[0] = Some(images.clone());
        Ok(Forward {
            n: images.len() / of_image,
            values,
            elements: vec![self.element; self.shapes.len()],
            norms: (0..self.program.views.len()).map(|_| None).collect(),
            flat: vec![None; self.program.steps.len()],
        })
    }

    /// Runs step `i` and prepares the norm after it, unless that is already prepared.
    pub(super) fn step(
        &self,
        i: usize,
        params: &DeviceParams<GpuBackend>,
        forward: &mut Forward,
        statistics: Statistics,
        dropout: Option<&Dropout>,
    ) -> Result<()> {
        let step = &self.program.steps[i];
        let (n, [h, w, c]) = (forward.n, self.shapes[i + 1]);
        let is_linear = |step: &Step| matches!(step, Step::Linear { .. });
        let element = match step {
            step if is_linear(step) => Element::F32,
            step => forward.elements[self.program.views[step.inputs()[0]].value],
        };
        let y = self.device.array(element, n * h * w * c)?;
        match step {
            Step::Conv { x, path, .. } => {
                let x = self.materialise(forward, *x)?;
                self.conv(i, n)?.forward(&x, &params.weight(path)?, &y)?;
            }
            Step::Add { a, b } => {
                let (a, b) = (self.seen(forward, *a)?, self.seen(forward, *b)?);
                batch_norm::apply(a, Some(b), c, &y)?;
            }
            Step::Write { x } => batch_norm::apply(self.seen(forward, *x)?, None, c, &y)?,
            Step::Linear { x, path, has_bias } => {
                let mut flat = self.materialise(forward, *x)?;
                let mask = dropout.map(|dropout| self.dropout_mask(dropout, *x, n)).transpose()?.flatten();
                if let Some(mask) = &mask {
                    let dropped = self.device.array(self.element, flat.len())?;
                    rows::multiply(&flat, mask, &dropped)?;
                    flat = dropped;
                }
                let weight = params.weight(path)?;
                let inputs = flat.len() / n;
                self.device.gpu().multiply(&Product {
                    m: n,
                    n: c,
                    k: inputs,
                    a: flat.matrix(inputs),
                    b: weight.matrix(inputs).transposed(),
                    c: y.matrix(c),
                    alpha: 1.0,
                    beta: 0.0,
                })?;
                if *has_bias {
                    rows::add(&y, &params.array(path, "bias")?)?;
                }
                forward.flat[i] = Some((flat, mask));
            }
        }
        (forward.values[i + 1], forward.elements[i + 1]) = (Some(y), element);
        self.prepare_norm(i + 1, params, forward, statistics)
    }

    fn prepare_norm(
        &self,
        value: usize,
        params: &DeviceParams<GpuBackend>,
        forward: &mut Forward,
        statistics: Statistics,
    ) -> Result<()> {
        let Some(view) = self.program.norm_of(value) else { return Ok(()) };
        let Some(norm) = self.program.views[view].norm.as_ref().filter(|_| forward.norms[view].is_none()) else {
            return Ok(());
        };
        let of_norm = params.norm(norm)?;
        let (data, [.., c]) = (forward.value(&self.program, view)?, self.shapes[value]);
        let statistics = match statistics {
            Statistics::OfBatch if params.has_frozen_statistics(&norm.bn) => Statistics::Running,
            other => other,
        };
        forward.norms[view] = Some(match statistics {
            Statistics::Running if params.is_trained() => Norm::frozen(&of_norm)?,
            Statistics::Running => match self.fixed.lock().unwrap_or_else(PoisonError::into_inner).entry(view) {
                Entry::Occupied(known) => known.get().clone(),
                Entry::Vacant(unknown) => unknown.insert(Norm::frozen(&of_norm)?).clone(),
            },
            Statistics::OfBatch if data.len() == c => {
                bail!("batch_norm: training needs more than one value per channel")
            }
            Statistics::OfBatch => Norm::of_batch(data, &of_norm)?,
        });
        Ok(())
    }

    pub(super) fn seen<'a>(&self, forward: &'a Forward, view: ViewId) -> Result<Seen<'a>> {
        Ok(Seen { x: forward.value(&self.program, view)?, norm: forward.norms[view].as_ref() })
    }

    /// Returns the value of a view with its norm applied, in the type of the products.
    pub(super) fn materialise(&self, forward: &Forward, view: ViewId) -> Result<Array> {
        let (seen, [.., c]) = (self.seen(forward, view)?, self.shapes[self.program.views[view].value]);
        let applied = match seen.norm {
            None => seen.x.clone(),
            Some(_) => {
                let y = self.device.array(seen.x.element(), seen.x.len())?;
                batch_norm::apply(seen, None, c, &y)?;
                y
            }
        };
        rows::in_type(&applied, self.element)
    }

    /// Runs every pass of each different convolution once, for `n` images of zeros, and returns them: afterwards the
    /// device knows the fastest way of each.
    ///
    /// # Errors
    /// When the device runs out of memory.
    pub fn try_convolutions(&self, n: usize) -> Result<BTreeSet<Conv>> {
        let steps = self.program.steps.iter().enumerate();
        let indices = steps.filter(|(_, step)| matches!(step, Step::Conv { .. })).map(|(i, _)| i);
        let convs = indices.map(|i| self.conv(i, n)).collect::<Result<BTreeSet<Conv>>>()?;
        for conv in &convs {
            let zeros = |len: usize| self.device.zeros(self.element, len);
            let [x, w, y] = [conv.x.iter().product(), conv.num_weights(), conv.y().iter().product()].map(zeros);
            let (x, w, y) = (x?, w?, y?);
            conv.forward(&x, &w, &y)?;
            conv.grad_x(&y, &w, &x)?;
            conv.grad_w(&x, &y, &self.device.array(Element::F32, conv.num_weights())?)?;
        }
        Ok(convs)
    }

    /// Sizes of the convolution in step `i`, for `n` images.
    pub(super) fn conv(&self, i: usize, n: usize) -> Result<Conv> {
        let Step::Conv { x, config, .. } = &self.program.steps[i] else { bail!("step {i} is not a convolution") };
        let ([h, w, c], [co, _, k, _]) = (self.shapes[self.program.views[*x].value], self.filters[&i]);
        let group = (config.groups > 1).then(|| c / config.groups);
        Ok(Conv { x: [n, h, w, c], co, k, stride: config.stride, padding: config.padding, group })
    }

    /// Dropout mask in channels-last order, drawn in the CPU's order, channels first.
    fn dropout_mask(&self, dropout: &Dropout, view: ViewId, n: usize) -> Result<Option<Array>> {
        let [h, w, c] = self.shapes[self.program.views[view].value];
        let Some(mask) = dropout.mask(n * h * w * c) else { return Ok(None) };
        let mut last = vec![0f32; mask.len()];
        for (i, to) in last.iter_mut().enumerate() {
            let (image, pixel, channel) = (i / (h * w * c), i / c % (h * w), i % c);
            *to = mask[(image * c + channel) * h * w + pixel];
        }
        Ok(Some(rows::in_type(&self.device.upload(&last)?, self.element)?))
    }

    fn output(&self, forward: &Forward) -> Result<Array> {
        let output = self.program.output;
        let (seen, [.., c]) = (self.seen(forward, output)?, self.shapes[self.program.views[output].value]);
        let y = self.device.array(seen.x.element(), seen.x.len())?;
        batch_norm::apply(seen, None, c, &y)?;
        rows::in_type(&y, Element::F32)
    }
}

impl Forward {
    pub fn value(&self, program: &Program, view: ViewId) -> Result<&Array> {
        match self.values.get(program.views[view].value) {
            Some(Some(value)) => Ok(value),
            _ => bail!("value {} is not kept", program.views[view].value),
        }
    }
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Network({} steps, {:?})", self.program.steps.len(), self.element)
    }
}
