//! Inference: norms are folded, filters packed once, activations freed after their last use.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};

use candle_core::{Device, Result, Tensor, bail};

use super::program::{Program, Step, View, ViewId};
use super::recording::normalised;
use crate::nn::graph::Graph;
use crate::nn::layers::RunningStats;
use crate::nn::params::Params;
use crate::nn::pool::Pool;
use crate::ops::channels::{self, Constants, Seen};
use crate::ops::conv::{Conv, ConvConfig, Epilogue, Filter};
use crate::ops::linear;
use crate::ops::slice::Values;

/// A network for inference, with the weights it had when the plan was made.
#[derive(Debug)]
pub struct Plan {
    stages: Vec<Stage>,
    num_values: usize,
    output: Source,
    side: usize,
    pool: Pool,
}

/// An activation `(n, h, w, c)` at the start of memory that may be longer.
struct Value {
    shape: [usize; 4],
    memory: Vec<f32>,
}

impl Value {
    fn data(&self) -> &[f32] {
        &self.memory[..self.shape.iter().product()]
    }

    fn data_mut(&mut self) -> &mut [f32] {
        let len = self.shape.iter().product();
        &mut self.memory[..len]
    }
}

/// A value with the map that is applied when it is read.
#[derive(Clone, Debug)]
struct Source {
    value: usize,
    constants: Option<Constants>,
}

impl Source {
    fn seen<'a>(&'a self, x: &'a [f32]) -> Seen<'a> {
        Seen { x, constants: self.constants.as_ref() }
    }
}

/// One step, and the values that no later step reads.
#[derive(Debug)]
struct Stage {
    work: Work,
    result: usize,
    last_uses: Vec<usize>,
}

#[derive(Debug)]
enum Work {
    Conv {
        x: Source,
        filter: Filter,
        weight: [usize; 4],
        config: ConvConfig,
        bias: Option<Vec<f32>>,
        slope: Option<Vec<f32>>,
        residual: Option<usize>,
    },
    Add {
        a: Source,
        b: Source,
    },
    Write {
        x: Source,
    },
    Linear {
        x: Source,
        weight: Tensor,
        bias: Option<Vec<f32>>,
    },
}

impl Work {
    fn inputs(&self) -> Vec<usize> {
        match self {
            Self::Conv { x, residual, .. } => [Some(x.value), *residual].into_iter().flatten().collect(),
            Self::Add { a, b } => vec![a.value, b.value],
            Self::Write { x } | Self::Linear { x, .. } => vec![x.value],
        }
    }
}

impl Plan {
    /// Returns the plan of the network of `graph` for `images`, `[n, side]`: images `(n, 3, side, side)`. `None` if the
    /// engine does not support the network's operations, channels or dtype. The plan runs any number of images; batches
    /// of about `n` are fastest.
    ///
    /// # Errors
    /// When a parameter cannot be read.
    pub fn of(graph: &Graph, params: &Params, images: [usize; 2]) -> Result<Option<Self>> {
        let Some((program, shapes)) = supported(graph, params, images) else { return Ok(None) };
        Builder::new(&program, &shapes, params, Weights::Shared).build().map(Some)
    }

    /// Like [`Self::of`], but frees convolution weights as soon as they are packed; nothing else should hold them.
    ///
    /// # Errors
    /// When a parameter cannot be read, or the engine does not support the network, which [`Self::fits`] checks
    /// beforehand.
    pub fn consuming(graph: &Graph, mut params: Params, images: [usize; 2]) -> Result<Self> {
        let Some((program, shapes)) = supported(graph, &params, images) else {
            bail!("the engine does not support this network")
        };
        let weights = Weights::Given(params.take_weights());
        Builder::new(&program, &shapes, &params, weights).build()
    }

    /// Whether the engine supports the network.
    pub fn fits(graph: &Graph, params: &Params, images: [usize; 2]) -> bool {
        supported(graph, params, images).is_some()
    }

    /// Returns the embeddings `(N, embedding_size)`, f32, of images `(N, 3, S, S)`, in evaluation mode.
    ///
    /// # Errors
    /// When there are no images, or they have another size or type.
    pub fn run(&self, images: &Tensor) -> Result<Tensor> {
        let (n, side) = (images.dims().first().copied().unwrap_or(0), self.side);
        if images.dims() != [n, 3, side, side] {
            bail!("expected images (N, 3, {side}, {side}), found {:?}", images.shape());
        }
        if n == 0 {
            bail!("expected at least one image");
        }
        // From outside the pool, every parallel loop would wake the worker threads and put this thread to sleep.
        rayon::scope(|_| self.run_as_worker(images))
    }

    fn run_as_worker(&self, images: &Tensor) -> Result<Tensor> {
        let (n, side) = (images.dims()[0], self.side);
        let mut values: Vec<Option<Value>> = (0..self.num_values).map(|_| None).collect();
        let mut first = self.fresh([n, side, side, 3]);
        let images = images.contiguous()?;
        channels::to_channels_last(&Values::of("images", &images)?, 3, side * side, first.data_mut());
        values[0] = Some(first);
        for stage in &self.stages {
            let result = self.carry_out(&stage.work, &values)?;
            values[stage.result] = Some(result);
            for value in &stage.last_uses {
                if let Some(value) = values[*value].take() {
                    self.pool.give(value.memory);
                }
            }
        }
        let Some(last) = values[self.output.value].take() else { bail!("the plan computed no result") };
        let [_, h, w, c] = last.shape;
        let mut y = vec![0.0; n * h * w * c];
        channels::write(self.output.seen(last.data()), c, &mut y);
        self.pool.give(last.memory);
        Tensor::from_vec(y, (n, h * w * c), &Device::Cpu)
    }

    fn fresh(&self, shape: [usize; 4]) -> Value {
        Value { shape, memory: self.pool.take(shape.iter().product()) }
    }

    fn carry_out(&self, work: &Work, values: &[Option<Value>]) -> Result<Value> {
        let value = |value: usize| match &values[value] {
            Some(value) => Ok((value.shape, value.data())),
            None => bail!("value {value} is missing"),
        };
        match work {
            Work::Conv { x, filter, weight, config, bias, slope, residual } => {
                let (shape, data) = value(x.value)?;
                let Some(conv) = Conv::of_filter(shape, *weight, *config, filter) else {
                    bail!("conv2d: input {shape:?} does not fit weight {weight:?}")
                };
                let residual = residual.map(|residual| Ok::<_, candle_core::Error>(value(residual)?.1)).transpose()?;
                let mut y = self.fresh(conv.output());
                let epilogue = Epilogue { bias: bias.as_deref(), slope: slope.as_deref(), residual };
                conv.forward_packed(data, x.seen(data).prologue(), filter, epilogue, y.data_mut());
                Ok(y)
            }
            Work::Add { a, b } => {
                let ((shape, of_a), (_, of_b)) = (value(a.value)?, value(b.value)?);
                let mut y = self.fresh(shape);
                channels::add(a.seen(of_a), b.seen(of_b), shape[3], y.data_mut());
                Ok(y)
            }
            Work::Write { x } => {
                let (shape, data) = value(x.value)?;
                let mut y = self.fresh(shape);
                channels::write(x.seen(data), shape[3], y.data_mut());
                Ok(y)
            }
            Work::Linear { x, weight, bias } => {
                let ([n, h, w, c], data) = value(x.value)?;
                let (outputs, inputs) = weight.dims2()?;
                let (mut flat, mut y) = (self.fresh([n, h, w, c]), self.fresh([n, 1, 1, outputs]));
                channels::to_channels_first(x.seen(data), c, h * w, flat.data_mut());
                let weight = Values::of("linear", weight)?;
                linear::forward(flat.data(), &weight, bias.as_deref(), [n, inputs, outputs], y.data_mut());
                self.pool.give(flat.memory);
                Ok(y)
            }
        }
    }
}

/// Returns the steps of a network and the shapes of their values, if the engine supports the network.
fn supported(graph: &Graph, params: &Params, [n, side]: [usize; 2]) -> Option<(Program, Vec<[usize; 4]>)> {
    let program = Program::of(graph).filter(|_| params.is_single_on_cpu())?;
    let shapes = program.shapes_on_cpu(&params.shapes(), [n.max(1), side, side, 3])?;
    Some((program, shapes))
}

/// Source of the weights of convolutions and fully connected layers.
enum Weights {
    /// Shared with the other parameters, which keep them.
    Shared,
    /// Owned here; a convolution's weight is freed once it is packed.
    Given(BTreeMap<String, Tensor>),
}

/// Turns steps into stages.
struct Builder<'a> {
    program: &'a Program,
    /// Shapes of all values.
    shapes: &'a [[usize; 4]],
    params: &'a Params,
    weights: RefCell<Weights>,
    uses: Vec<usize>,
}

impl<'a> Builder<'a> {
    fn new(program: &'a Program, shapes: &'a [[usize; 4]], params: &'a Params, weights: Weights) -> Self {
        Self { program, shapes, params, weights: RefCell::new(weights), uses: program.num_uses() }
    }

    fn weight(&self, path: &str) -> Result<Tensor> {
        let name = format!("{path}.weight");
        let weight = match &mut *self.weights.borrow_mut() {
            Weights::Shared => self.params.get(&name),
            Weights::Given(weights) => weights.remove(&name),
        };
        weight.map_or_else(|| bail!("no parameter {name}"), |weight| weight.contiguous())
    }

    /// Whether the norm of a step's result is folded into the step, because nothing reads the result without its norm.
    fn is_folded(&self, value: usize) -> bool {
        let is_seen = self.program.raw_of(value).is_some_and(|view| self.uses[view] > 0);
        let step = value.checked_sub(1).map(|step| &self.program.steps[step]);
        matches!(step, Some(Step::Conv { .. })) && !is_seen && self.program.norm_of(value).is_some()
    }

    fn constants(&self, view: &View) -> Result<Option<Constants>> {
        let Some(norm) = &view.norm else { return Ok(None) };
        let stats = RunningStats::of(self.params, &norm.bn)?.read()?;
        let read = |path: &str, name: &str| match self.params.get(&format!("{path}.{name}")) {
            Some(tensor) => tensor.to_vec1(),
            None => bail!("no parameter {path}.{name}"),
        };
        let normalised = normalised(read, norm, &stats, false)?;
        Ok(Some(normalised.constants().clone()))
    }

    fn source(&self, view: ViewId) -> Result<Source> {
        let view = &self.program.views[view];
        let constants = if self.is_folded(view.value) { None } else { self.constants(view)? };
        Ok(Source { value: view.value, constants })
    }

    /// Returns the convolution that only this sum reads: it can run at the place of the sum and add the other side
    /// itself.
    fn sole_conv(&self, view: ViewId) -> Option<usize> {
        let value = self.program.views[view].value;
        let step = value.checked_sub(1)?;
        let is_bare = self.is_folded(value) || self.program.views[view].norm.is_none();
        let is_conv = matches!(self.program.steps[step], Step::Conv { .. });
        (is_conv && is_bare && self.uses[view] == 1).then_some(step)
    }

    /// Sums that are merged into a convolution: by the step of the sum, the convolution's step and the other side's
    /// value.
    fn merged(&self) -> Result<HashMap<usize, (usize, usize)>> {
        let mut merged = HashMap::new();
        let mut moved = HashSet::new();
        for (i, step) in self.program.steps.iter().enumerate() {
            let Step::Add { a, b } = step else { continue };
            for (conv, other) in [(*a, *b), (*b, *a)] {
                let other = self.source(other)?;
                let conv = self.sole_conv(conv).filter(|conv| *conv + 1 != other.value && !moved.contains(conv));
                if let (Some(conv), None) = (conv, &other.constants) {
                    moved.insert(conv);
                    merged.insert(i, (conv, other.value));
                    break;
                }
            }
        }
        Ok(merged)
    }

    fn build(self) -> Result<Plan> {
        let merged = self.merged()?;
        let moved: HashSet<usize> = merged.values().map(|(conv, _)| *conv).collect();
        let mut stages = Vec::new();
        for (i, step) in self.program.steps.iter().enumerate().filter(|(i, _)| !moved.contains(i)) {
            let work = match (step, merged.get(&i)) {
                (Step::Conv { .. }, _) => self.conv(i, None)?,
                (Step::Add { .. }, Some((conv, other))) => self.conv(*conv, Some(*other))?,
                (Step::Add { a, b }, None) => Work::Add { a: self.source(*a)?, b: self.source(*b)? },
                (Step::Write { x }, _) => Work::Write { x: self.source(*x)? },
                (Step::Linear { x, path, has_bias }, _) => {
                    let bias = has_bias.then(|| self.params.get(&format!("{path}.bias"))).flatten();
                    let bias = bias.map(|bias| bias.to_vec1()).transpose()?;
                    Work::Linear { x: self.source(*x)?, weight: self.weight(path)?, bias }
                }
            };
            stages.push(Stage { work, result: i + 1, last_uses: Vec::new() });
        }
        let output = self.source(self.program.output)?;
        let mut seen = HashSet::from([output.value]);
        for stage in stages.iter_mut().rev() {
            stage.last_uses = stage.work.inputs().into_iter().filter(|value| seen.insert(*value)).collect();
        }
        let [_, side, ..] = self.shapes[0];
        Ok(Plan { stages, num_values: self.shapes.len(), output, side, pool: Pool::default() })
    }

    /// Returns the convolution of step `i` with its norm folded into filter, bias and slope.
    fn conv(&self, i: usize, residual: Option<usize>) -> Result<Work> {
        let step = &self.program.steps[i];
        let Step::Conv { x, path, config } = step else { bail!("{step:?} is not a convolution") };
        let tensor = self.weight(path)?;
        let (x, shape): (_, [usize; 4]) = (self.source(*x)?, tensor.dims4()?.into());
        let Some(conv) = Conv::new(self.shapes[x.value], shape, *config) else {
            bail!("conv2d: {path}: unsupported sizes")
        };
        let constants = match self.program.norm_of(i + 1).filter(|_| self.is_folded(i + 1)) {
            Some(view) => self.constants(&self.program.views[view])?,
            None => None,
        };
        let values = Values::of("conv2d", &tensor)?;
        let (filter, bias, slope) = match constants {
            None => (conv.pack(&values), None, None),
            Some(Constants { scale, shift, slope }) => {
                let per_output = values.len() / shape[0];
                let scaled: Vec<f32> = values.iter().enumerate().map(|(i, w)| w * scale[i / per_output]).collect();
                (conv.pack(&scaled), Some(shift), slope)
            }
        };
        Ok(Work::Conv { x, filter, weight: shape, config: *config, bias, slope, residual })
    }
}
