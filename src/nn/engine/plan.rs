//! Inference: norms folded, filters packed once, activations freed after their last use.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

use candle_core::{DType, Device, Result, Tensor, bail};

use super::pool::Pool;
use super::program::{Program, Step, View, ViewId};
use super::recording::normalised;
use crate::nn::graph::Graph;
use crate::nn::layers::RunningStats;
use crate::nn::params::Params;
use crate::ops::channels::{self, Constants, Seen};
use crate::ops::conv::{Conv, ConvConfig, Epilogue, Filter};
use crate::ops::linear;
use crate::ops::slice::Values;

/// A network for inference, of the weights that it had when the plan was made.
#[derive(Debug)]
pub struct Plan {
    stages: Vec<Stage>,
    num_values: usize,
    output: Source,
    side: usize,
    pool: Pool,
}

/// A value, and what becomes of it when it is read.
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

/// One step, and the values that nobody reads later.
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
    /// Returns the plan of the network of `graph` for `[n, side]`, images `(n, 3, side, side)`; none if it has an operation, a
    /// number of channels or a type that the engine lacks. Any number of images can be run, about `n` at once are fastest.
    ///
    /// # Errors
    /// When a parameter cannot be read.
    pub fn of(graph: &Graph, params: &Params, images: [usize; 2]) -> Result<Option<Self>> {
        let Some(program) = Program::of(graph) else { return Ok(None) };
        let shapes = params.shapes();
        let names = program.param_names();
        let on_cpu = |t: &Tensor| t.dtype() == DType::F32 && matches!(t.device(), Device::Cpu);
        if !names.iter().all(|name| params.get(name).is_some_and(|tensor| on_cpu(&tensor))) {
            return Ok(None);
        }
        let weights = RefCell::new(Weights::Shared);
        Builder { params, weights, shapes, uses: program.num_uses(), program: &program }.build(images)
    }

    /// As [`Self::of`], with the weights given up as soon as they are packed; nobody else should hold them.
    ///
    /// # Errors
    /// When a parameter cannot be read, or the engine lacks something.
    pub fn consuming(graph: &Graph, mut params: Params, images: [usize; 2]) -> Result<Self> {
        let Some(program) = Program::of(graph) else { bail!("the engine lacks an operation of this network") };
        let shapes = params.shapes();
        let weights = RefCell::new(Weights::Given(params.take_weights()));
        let builder = Builder { params: &params, weights, shapes, uses: program.num_uses(), program: &program };
        match builder.build(images)? {
            Some(plan) => Ok(plan),
            None => bail!("the engine lacks a convolution of this network"),
        }
    }

    /// Side of the images in pixels.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Returns the embeddings `(N, embedding_size)`, f32, of images `(N, 3, S, S)`; the networks' evaluation mode.
    ///
    /// # Errors
    /// When the images are of another size or type.
    pub fn run(&self, images: &Tensor) -> Result<Tensor> {
        let (n, side) = (images.dims().first().copied().unwrap_or(0), self.side);
        if images.dims() != [n, 3, side, side] {
            bail!("expected images (N, 3, {side}, {side}), found {:?}", images.shape());
        }
        if n == 0 {
            bail!("expected at least one image");
        }
        let mut values: Vec<Option<([usize; 4], Vec<f32>)>> = (0..self.num_values).map(|_| None).collect();
        let mut first = self.pool.take(images.elem_count());
        let images = images.contiguous()?;
        channels::to_channels_last(&Values::of("images", &images)?, 3, side * side, &mut first);
        values[0] = Some(([n, side, side, 3], first));
        for stage in &self.stages {
            let result = self.carry_out(&stage.work, &values)?;
            values[stage.result] = Some(result);
            for value in &stage.last_uses {
                if let Some((_, memory)) = values[*value].take() {
                    self.pool.give(memory);
                }
            }
        }
        let Some(([_, h, w, c], last)) = values[self.output.value].take() else { bail!("the plan has no result") };
        let mut y = vec![0.0; last.len()];
        channels::write(self.output.seen(&last), c, &mut y);
        self.pool.give(last);
        Tensor::from_vec(y, (n, h * w * c), &Device::Cpu)
    }

    fn carry_out(&self, work: &Work, values: &[Option<([usize; 4], Vec<f32>)>]) -> Result<([usize; 4], Vec<f32>)> {
        let value = |value: usize| match &values[value] {
            Some((shape, data)) => Ok((*shape, data.as_slice())),
            None => bail!("value {value} is not there"),
        };
        match work {
            Work::Conv { x, filter, weight, config, bias, slope, residual } => {
                let (shape, data) = value(x.value)?;
                let Some(conv) = Conv::of_filter(shape, *weight, *config, filter) else {
                    bail!("conv2d: {shape:?} and {weight:?}")
                };
                let residual = residual.map(|residual| Ok::<_, candle_core::Error>(value(residual)?.1)).transpose()?;
                let mut y = self.pool.take(conv.output().iter().product());
                let epilogue = Epilogue { bias: bias.as_deref(), slope: slope.as_deref(), residual };
                conv.forward_packed(data, x.seen(data).prologue(), filter, epilogue, &mut y);
                Ok((conv.output(), y))
            }
            Work::Add { a, b } => {
                let ((shape, of_a), (_, of_b)) = (value(a.value)?, value(b.value)?);
                let mut y = self.pool.take(of_a.len());
                channels::add(a.seen(of_a), b.seen(of_b), shape[3], &mut y);
                Ok((shape, y))
            }
            Work::Write { x } => {
                let (shape, data) = value(x.value)?;
                let mut y = self.pool.take(data.len());
                channels::write(x.seen(data), shape[3], &mut y);
                Ok((shape, y))
            }
            Work::Linear { x, weight, bias } => {
                let ([n, h, w, c], data) = value(x.value)?;
                let (outputs, inputs) = weight.dims2()?;
                let mut flat = self.pool.take(data.len());
                channels::to_channels_first(x.seen(data), c, h * w, &mut flat);
                let mut y = self.pool.take(n * outputs);
                let weight = Values::of("linear", weight)?;
                linear::forward(&flat, &weight, bias.as_deref(), [n, inputs, outputs], &mut y);
                self.pool.give(flat);
                Ok(([n, 1, 1, outputs], y))
            }
        }
    }
}

/// Where the weights of convolutions and fully connected layers are.
enum Weights {
    /// With the other parameters, and they stay there.
    Shared,
    /// Here, and each is freed once it is packed.
    Given(BTreeMap<String, Tensor>),
}

/// Turns steps into stages.
struct Builder<'a> {
    params: &'a Params,
    weights: RefCell<Weights>,
    shapes: BTreeMap<String, Vec<usize>>,
    program: &'a Program,
    uses: Vec<usize>,
}

impl Builder<'_> {
    fn weight(&self, path: &str) -> Result<Tensor> {
        let name = format!("{path}.weight");
        let weight = match &mut *self.weights.borrow_mut() {
            Weights::Shared => self.params.get(&name),
            Weights::Given(weights) => weights.remove(&name),
        };
        weight.map_or_else(|| bail!("no parameter {name}"), |weight| weight.contiguous())
    }

    /// The convolution of a step on values of this shape, with the shape of its weight.
    fn sized(&self, step: &Step, x: [usize; 4]) -> Option<(Conv, [usize; 4])> {
        let Step::Conv { path, config, .. } = step else { return None };
        let weight = self.shapes.get(&format!("{path}.weight"))?.as_slice().try_into().ok()?;
        Some((Conv::new(x, weight, *config)?, weight))
    }

    /// Whether the norm of a step's result becomes a part of the step: nobody sees the result without it.
    fn is_folded(&self, value: usize) -> bool {
        let is_seen = self.program.raw_of(value).is_some_and(|view| self.uses[view] > 0);
        let step = value.checked_sub(1).map(|step| &self.program.steps[step]);
        matches!(step, Some(Step::Conv { .. })) && !is_seen && self.program.norm_of(value).is_some()
    }

    fn constants(&self, view: &View) -> Result<Option<Constants>> {
        let Some(norm) = &view.norm else { return Ok(None) };
        let stats = RunningStats::of(self.params, &norm.bn)?.read()?;
        let normalised = normalised(self.params, (&norm.bn, norm.prelu.as_deref()), &stats, false)?;
        Ok(Some(normalised.constants().clone()))
    }

    fn source(&self, view: ViewId) -> Result<Source> {
        let view = &self.program.views[view];
        let constants = if self.is_folded(view.value) { None } else { self.constants(view)? };
        Ok(Source { value: view.value, constants })
    }

    /// The convolution that only this sum reads: it can add the other side itself, at the place of the sum.
    fn sole_conv(&self, view: ViewId) -> Option<usize> {
        let value = self.program.views[view].value;
        let step = value.checked_sub(1)?;
        let is_bare = self.is_folded(value) || self.program.views[view].norm.is_none();
        let is_conv = matches!(self.program.steps[step], Step::Conv { .. });
        (is_conv && is_bare && self.uses[view] == 1).then_some(step)
    }

    fn build(self, [n, side]: [usize; 2]) -> Result<Option<Plan>> {
        let program = self.program;
        // Sums that a convolution takes over: the convolution's step, by that of the sum, and the other side.
        let mut merged = Vec::new();
        let mut moved = HashSet::new();
        for (i, step) in program.steps.iter().enumerate() {
            let Step::Add { a, b } = step else { continue };
            for (conv, other) in [(*a, *b), (*b, *a)] {
                let other = self.source(other)?;
                if let Some(conv) =
                    self.sole_conv(conv).filter(|conv| *conv + 1 != other.value && !moved.contains(conv))
                    && other.constants.is_none()
                {
                    moved.insert(conv);
                    merged.push((i, conv, other.value));
                    break;
                }
            }
        }
        let mut shapes = vec![[n.max(1), side, side, 3]];
        let mut stages = Vec::new();
        for (i, step) in program.steps.iter().enumerate() {
            let of = |view: ViewId| shapes[program.views[view].value];
            let merge = merged.iter().find(|(sum, ..)| *sum == i);
            let shape = match step {
                Step::Conv { x, .. } => {
                    let Some((conv, weight)) = self.sized(step, of(*x)) else { return Ok(None) };
                    if !conv.has_whole_channels() && self.source(*x)?.constants.is_some() {
                        return Ok(None);
                    }
                    if !moved.contains(&i) {
                        let work = self.conv(step, conv, weight, None)?;
                        stages.push(Stage { work, result: i + 1, last_uses: Vec::new() });
                    }
                    conv.output()
                }
                Step::Add { a, b } => {
                    if of(*a) != of(*b) {
                        return Ok(None);
                    }
                    let work = match merge {
                        Some((_, conv, other)) => {
                            let step = &program.steps[*conv];
                            let Step::Conv { x, .. } = step else { return Ok(None) };
                            let Some((sized, weight)) = self.sized(step, of(*x)) else { return Ok(None) };
                            self.conv(step, sized, weight, Some(*other))?
                        }
                        None => Work::Add { a: self.source(*a)?, b: self.source(*b)? },
                    };
                    stages.push(Stage { work, result: i + 1, last_uses: Vec::new() });
                    of(*a)
                }
                Step::Write { x } => {
                    let work = Work::Write { x: self.source(*x)? };
                    stages.push(Stage { work, result: i + 1, last_uses: Vec::new() });
                    of(*x)
                }
                Step::Linear { x, path, has_bias } => {
                    let weight = self.weight(path)?;
                    let (outputs, inputs) = weight.dims2()?;
                    let [n, rest @ ..] = of(*x);
                    if rest.iter().product::<usize>() != inputs {
                        return Ok(None);
                    }
                    let bias = has_bias.then(|| self.params.get(&format!("{path}.bias"))).flatten();
                    let bias = bias.map(|bias| bias.to_vec1()).transpose()?;
                    let work = Work::Linear { x: self.source(*x)?, weight, bias };
                    stages.push(Stage { work, result: i + 1, last_uses: Vec::new() });
                    [n, 1, 1, outputs]
                }
            };
            shapes.push(shape);
        }
        let output = self.source(program.output)?;
        let mut seen = HashSet::from([output.value]);
        for stage in stages.iter_mut().rev() {
            stage.last_uses = stage.work.inputs().into_iter().filter(|value| seen.insert(*value)).collect();
        }
        Ok(Some(Plan { stages, num_values: shapes.len(), output, side, pool: Pool::default() }))
    }

    /// The convolution with its norm folded into filter, bias and slope.
    fn conv(&self, step: &Step, conv: Conv, weight: [usize; 4], residual: Option<usize>) -> Result<Work> {
        let Step::Conv { x, path, config } = step else { bail!("{step:?} is no convolution") };
        let tensor = self.weight(path)?;
        let value = self.program.steps.iter().position(|s| s == step).map_or(0, |i| i + 1);
        let constants = match self.program.norm_of(value).filter(|_| self.is_folded(value)) {
            Some(view) => self.constants(&self.program.views[view])?,
            None => None,
        };
        let values = Values::of("conv2d", &tensor)?;
        let (filter, bias, slope) = match constants {
            None => (conv.pack(&values), None, None),
            Some(Constants { scale, shift, slope }) => {
                let per_output = values.len() / weight[0];
                let scaled: Vec<f32> = values.iter().enumerate().map(|(i, w)| w * scale[i / per_output]).collect();
                (conv.pack(&scaled), Some(shift), slope)
            }
        };
        Ok(Work::Conv { x: self.source(*x)?, filter, weight, config: *config, bias, slope, residual })
    }
}
