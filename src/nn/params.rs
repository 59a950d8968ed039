//! Named parameters and buffers, in name order.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::take;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use rand::SeedableRng;
use rand::distr::{Distribution, Uniform};
use rand_chacha::ChaCha8Rng;

use super::dropout::Dropout;
use crate::parallel;

/// The parameters (trained) and buffers (saved, not trained) of a model, under PyTorch's names.
///
/// A model is built from a [`Scope`] of the set; afterwards both share the variables. Iteration is in name order, so no
/// sum, clipping or file depends on a hash.
#[derive(Debug)]
pub struct Params {
    trainable: BTreeMap<String, Var>,
    /// Parameters that were trainable until [`Self::freeze`].
    frozen: BTreeMap<String, Var>,
    /// Given tensors, which never change.
    given: BTreeMap<String, Tensor>,
    buffers: BTreeMap<String, Var>,
    source: ParamSource,
    rng: ChaCha8Rng,
    dtype: DType,
    device: Device,
    /// By the path of a batch norm: whether its running statistics are frozen.
    frozen_statistics: BTreeMap<String, AtomicBool>,
    dropout: Option<Dropout>,
}

/// The tensors of a set by name, which share their memory with it.
pub(crate) struct Parts {
    /// Trained parameters.
    pub trained: BTreeMap<String, Tensor>,
    /// Given and frozen parameters.
    pub fixed: BTreeMap<String, Tensor>,
    /// Buffers.
    pub buffers: BTreeMap<String, Tensor>,
    /// Paths of the batch norms whose running statistics are frozen.
    pub frozen_statistics: BTreeSet<String>,
}

/// Source of new parameters.
#[derive(Debug)]
enum ParamSource {
    /// Each parameter's [`Init`].
    Init,
    /// Tensors by name, each removed when it is used, and the problems found so far.
    Given { tensors: BTreeMap<String, Tensor>, problems: Vec<String> },
    /// Zeros that take no memory: one element for each parameter.
    Outline,
}

/// Initialisation of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Every element the same.
    Const(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in `[-bound, bound]`.
    Uniform(f64),
}

impl Params {
    /// Returns an empty set whose parameters are initialised from `seed`; they depend on the order of creation, not on
    /// names.
    pub fn new(dtype: DType, device: &Device, seed: u64) -> Self {
        Self::with_source(ParamSource::Init, dtype, device, seed)
    }

    /// Returns an empty set whose parameters will be `tensors`, without a copy where possible. They receive no
    /// gradient, so computing with them builds no graph. [`Self::finish`] reports tensors that do not fit; their
    /// parameters take no memory.
    pub fn given(tensors: BTreeMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self::with_source(ParamSource::Given { tensors, problems: Vec::new() }, dtype, device, 0)
    }

    /// Returns an empty set whose parameters have names and shapes but take no memory; all are zeros.
    pub fn outline(dtype: DType, device: &Device) -> Self {
        Self::with_source(ParamSource::Outline, dtype, device, 0)
    }

    fn with_source(source: ParamSource, dtype: DType, device: &Device, seed: u64) -> Self {
        Self {
            trainable: BTreeMap::new(),
            frozen: BTreeMap::new(),
            given: BTreeMap::new(),
            buffers: BTreeMap::new(),
            source,
            rng: ChaCha8Rng::seed_from_u64(seed),
            dtype,
            device: device.clone(),
            frozen_statistics: BTreeMap::new(),
            dropout: None,
        }
    }

    /// Checks that the given tensors are exactly those that the model needs.
    ///
    /// # Errors
    /// When a name is missing, unexpected or has another shape or kind of number (float or integer): one error that
    /// lists up to 20 of them and their count.
    pub fn finish(&mut self) -> Result<()> {
        match &mut self.source {
            ParamSource::Given { tensors, problems } => {
                problems.extend(tensors.keys().map(|name| format!("unexpected {name}")));
                misfit(problems)
            }
            ParamSource::Init | ParamSource::Outline => Ok(()),
        }
    }

    /// Freezes, or unfreezes, the running statistics of every batch norm: frozen ones are used in training too and not
    /// updated.
    pub fn freeze_statistics(&self, freeze: bool) {
        self.frozen_statistics.values().for_each(|switch| switch.store(freeze, Ordering::Relaxed));
    }

    /// Freezes everything under `prefix`, a layer or a stage such as `layer1`: its parameters receive no gradients, and
    /// its batch norms use their running statistics without updating them. Everything is saved and loaded as before.
    /// Returns the number of frozen parameters, by elements.
    ///
    /// # Errors
    /// When no trained parameter is under `prefix`; the error lists the prefixes that exist.
    pub fn freeze(&mut self, prefix: &str) -> Result<usize> {
        let is_under =
            |name: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        let (frozen, trainable): (BTreeMap<_, _>, BTreeMap<_, _>) =
            take(&mut self.trainable).into_iter().partition(|(name, _)| is_under(name));
        self.trainable = trainable;
        if frozen.is_empty() {
            let mut known: Vec<&str> = self.trainable.keys().filter_map(|name| name.split('.').next()).collect();
            known.dedup();
            bail!("no trained parameter is under {prefix:?}; there are {}", known.join(", "));
        }
        let switches = self.frozen_statistics.iter().filter(|(path, _)| is_under(path));
        switches.for_each(|(_, switch)| switch.store(true, Ordering::Relaxed));
        let num = frozen.values().map(|var| var.elem_count()).sum();
        self.frozen.extend(frozen);
        Ok(num)
    }

    /// Returns the scope of the whole model.
    pub fn root(&mut self) -> Scope<'_> {
        Scope { params: self, prefix: String::new() }
    }

    /// Trained parameters in name order; empty if they were given.
    pub fn trainable(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.trainable.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// Returns the parameter or buffer of this name, outside any graph; it shares the memory, so later changes show in
    /// it.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        let maps = [&self.trainable, &self.frozen, &self.buffers];
        let var = maps.into_iter().find_map(|vars| vars.get(name)).map(Var::as_detached_tensor);
        var.or_else(|| self.given.get(name).cloned())
    }

    /// Returns the parameter or buffer of this name; a trained parameter takes part in candle's graph.
    pub(super) fn tracked(&self, name: &str) -> Result<Tensor> {
        let trained = self.trainable.get(name).map(|var| var.as_tensor().clone());
        match trained.or_else(|| self.get(name)) {
            Some(tensor) => Ok(tensor),
            None => bail!("no parameter {name}"),
        }
    }

    /// Returns the buffer of this name.
    pub(super) fn buffer(&self, name: &str) -> Result<&Var> {
        match self.buffers.get(name) {
            Some(buffer) => Ok(buffer),
            None => bail!("no buffer {name}"),
        }
    }

    /// Dropout of the network in training, if it has it.
    pub fn dropout(&self) -> Option<&Dropout> {
        self.dropout.as_ref()
    }

    /// Whether all parameters and running statistics are f32 on the CPU.
    pub(super) fn is_single_on_cpu(&self) -> bool {
        self.dtype == DType::F32 && matches!(self.device, Device::Cpu)
    }

    /// Whether the batch norm under `path` has frozen running statistics.
    pub(crate) fn has_frozen_statistics(&self, path: &str) -> bool {
        self.frozen_statistics.get(path).is_some_and(|switch| switch.load(Ordering::Relaxed))
    }

    /// Returns the tensors, sharing their memory.
    pub(crate) fn parts(&self) -> Parts {
        let tensors = |vars: &BTreeMap<String, Var>| -> BTreeMap<String, Tensor> {
            vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
        };
        let mut fixed = tensors(&self.frozen);
        fixed.extend(self.given.iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
        let frozen = self.frozen_statistics.keys().filter(|path| self.has_frozen_statistics(path));
        Parts {
            trained: tensors(&self.trainable),
            fixed,
            buffers: tensors(&self.buffers),
            frozen_statistics: frozen.cloned().collect(),
        }
    }

    /// Whether the parameter `name` is trained.
    pub(crate) fn is_trained(&self, name: &str) -> bool {
        self.trainable.contains_key(name)
    }

    /// Number of elements of all parameters, trained, frozen or given, without buffers, as papers count them.
    pub fn num_parameters(&self) -> usize {
        let vars = self.trainable.values().chain(self.frozen.values()).map(|var| var.as_tensor());
        vars.chain(self.given.values()).map(Tensor::elem_count).sum()
    }

    /// Returns the shape of every parameter and buffer by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let vars = self.variables().map(|(name, var)| (name, var.as_tensor()));
        let all = vars.chain(self.given.iter().map(|(name, tensor)| (name.as_str(), tensor)));
        all.map(|(name, tensor)| (name.to_owned(), tensor.dims().to_vec())).collect()
    }

    /// Returns every parameter and buffer by name, as they are now.
    ///
    /// # Errors
    /// When memory for the copies cannot be allocated.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let copy = |(name, var): (&str, &Var)| Ok((name.to_owned(), var.as_detached_tensor().copy()?));
        let mut state = self.variables().map(copy).collect::<Result<BTreeMap<_, _>>>()?;
        state.extend(self.given.iter().map(|(name, tensor)| (name.clone(), tensor.clone())));
        Ok(state)
    }

    /// Returns every parameter and buffer in name order, sharing its memory.
    pub fn all(&self) -> BTreeMap<&str, Tensor> {
        let vars = self.variables().map(|(name, var)| (name, var.as_detached_tensor()));
        vars.chain(self.given.iter().map(|(name, tensor)| (name.as_str(), tensor.clone()))).collect()
    }

    /// Copies `state` into the parameters and buffers, all or nothing.
    ///
    /// # Errors
    /// When a name is missing, unexpected or has another shape or kind of number (float or integer): one error that
    /// lists up to 20 of them and their count. When the parameters were given or are an outline.
    pub fn load(&self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        if !matches!(self.source, ParamSource::Init) {
            bail!("parameters that were given cannot be loaded again");
        }
        let mut problems = Vec::new();
        for (name, var) in self.variables() {
            problems.extend(problem(name, state.get(name), var.shape(), var.dtype()));
        }
        let known =
            |name: &String| [&self.trainable, &self.frozen, &self.buffers].iter().any(|vars| vars.contains_key(name));
        problems.extend(state.keys().filter(|name| !known(name)).map(|name| format!("unexpected {name}")));
        misfit(&problems)?;
        let variables: Vec<(&str, &Var)> = self.variables().collect();
        // In parallel, as most of the time goes into touching a new model's memory for the first time.
        let set = |i: usize| {
            let (name, var) = variables[i];
            var.set(&state[name].to_dtype(var.dtype())?.to_device(&self.device)?.contiguous()?)
        };
        parallel::try_map(variables.len(), set).map(drop)
    }

    fn variables(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.trainable.iter().chain(&self.frozen).chain(&self.buffers).map(|(name, var)| (name.as_str(), var))
    }

    /// Returns the initial value of `path`.
    fn start(&mut self, path: &str, shape: &Shape, dtype: DType, init: Init) -> Result<Tensor> {
        let zero = || Tensor::zeros((), dtype, &self.device)?.broadcast_as(shape);
        match &mut self.source {
            ParamSource::Init => {}
            ParamSource::Outline => return zero(),
            ParamSource::Given { tensors, problems } => {
                let tensor = tensors.remove(path);
                return match (problem(path, tensor.as_ref(), shape, dtype), tensor) {
                    (None, Some(tensor)) => tensor.to_dtype(dtype)?.to_device(&self.device)?.contiguous(),
                    (problem, _) => {
                        problems.extend(problem);
                        zero()
                    }
                };
            }
        }
        let mut values = vec![0f64; shape.elem_count()];
        match init {
            Init::Const(c) => values.fill(c),
            Init::Uniform(bound) => {
                let uniform = Uniform::new_inclusive(-bound, bound).map_err(candle_core::Error::wrap)?;
                values.fill_with(|| uniform.sample(&mut self.rng));
            }
            Init::Normal(std) => values.fill_with(|| std * standard_normal(&mut self.rng)),
        }
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(&self.device)
    }
}

/// Returns why a tensor cannot be the parameter `name`, if it cannot.
pub(super) fn problem(name: &str, found: Option<&Tensor>, shape: &Shape, dtype: DType) -> Option<String> {
    match found {
        None => Some(format!("missing {name} {shape:?}")),
        Some(t) if t.shape() != shape => Some(format!("{name}: expected {shape:?}, found {:?}", t.shape())),
        Some(t) if t.dtype().is_float() != dtype.is_float() => {
            Some(format!("{name}: expected {}, found {}", dtype.as_str(), t.dtype().as_str()))
        }
        Some(_) => None,
    }
}

/// Returns one error for all problems, if there are any.
pub(super) fn misfit(problems: &[String]) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    let more = problems.len().saturating_sub(20);
    let listed = problems[..problems.len() - more].join("; ");
    let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
    bail!("{} tensors do not fit the model: {listed}{rest}", problems.len());
}

/// Draws from the standard normal distribution by the Box-Muller transform (1958).
pub(crate) fn standard_normal(rng: &mut ChaCha8Rng) -> f64 {
    use rand::Rng;
    // 1 - u is in (0, 1]: the logarithm is finite.
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// A prefix under which a layer creates its parameters.
pub struct Scope<'a> {
    params: &'a mut Params,
    prefix: String,
}

impl Scope<'_> {
    /// Returns the scope `prefix.name`.
    pub fn sub(&mut self, name: impl std::fmt::Display) -> Scope<'_> {
        let prefix = self.path(&name.to_string());
        Scope { params: self.params, prefix }
    }

    /// Creates the running statistics of this scope's batch norm: `running_mean`, `running_var` and
    /// `num_batches_tracked`.
    ///
    /// # Errors
    /// Same as [`Self::param`].
    pub(super) fn running_statistics(&mut self, channels: usize) -> Result<()> {
        self.buffer("running_mean", channels, Init::Const(0.0))?;
        self.buffer("running_var", channels, Init::Const(1.0))?;
        self.counter("num_batches_tracked")?;
        self.params.frozen_statistics.entry(self.prefix.clone()).or_default();
        Ok(())
    }

    /// Creates the network's dropout, whose generator depends on the seed and on what was created before.
    ///
    /// # Errors
    /// When there is one already.
    pub(super) fn dropout(&mut self, probability: f64) -> Result<()> {
        if self.params.dropout.is_some() {
            bail!("a network has dropout once");
        }
        let rng = ChaCha8Rng::from_rng(&mut self.params.rng);
        self.params.dropout = Some(Dropout::new(probability, rng));
        Ok(())
    }

    /// Prefix of the names, without a trailing dot.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Returns a new parameter; it takes part in the graph if it is trained.
    ///
    /// # Errors
    /// When the name is taken or memory for it cannot be allocated.
    pub fn param(&mut self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        let (path, dtype) = (self.new_path(name)?, self.params.dtype);
        let start = self.params.start(&path, &shape.into(), dtype, init)?;
        if !matches!(self.params.source, ParamSource::Init) {
            self.params.given.insert(path, start.clone());
            return Ok(start);
        }
        self.trained(path, &start)
    }

    /// Makes a tensor a trained parameter.
    fn trained(&mut self, path: String, start: &Tensor) -> Result<Tensor> {
        let var = Var::from_tensor(start)?;
        self.params.trainable.insert(path, var.clone());
        Ok(var.as_tensor().clone())
    }

    /// Returns some columns of a new matrix of `rows` and `columns`, f32, from `N(0, std)`: those that [`Self::param`]
    /// would have.
    ///
    /// # Errors
    /// Same as [`Self::param`].
    pub(crate) fn normal_columns(
        &mut self,
        name: &str,
        [rows, columns]: [usize; 2],
        std: f64,
        of: Range<usize>,
    ) -> Result<Tensor> {
        let path = self.new_path(name)?;
        let mut values = Vec::with_capacity(rows * of.len());
        for column in (0..rows).flat_map(|_| 0..columns) {
            let value = std * standard_normal(&mut self.params.rng);
            if of.contains(&column) {
                values.push(value as f32);
            }
        }
        let start = Tensor::from_vec(values, (rows, of.len()), &self.params.device)?;
        self.trained(path, &start)
    }

    /// Returns a new buffer: saved and loaded with the model, never trained.
    ///
    /// # Errors
    /// Same as [`Self::param`].
    pub fn buffer(&mut self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Var> {
        self.insert_buffer(name, &shape.into(), self.params.dtype, init)
    }

    /// Returns a new buffer with a 64-bit counter, starting at 0.
    ///
    /// # Errors
    /// Same as [`Self::param`].
    pub fn counter(&mut self, name: &str) -> Result<Var> {
        self.insert_buffer(name, &Shape::from(()), DType::I64, Init::Const(0.0))
    }

    fn insert_buffer(&mut self, name: &str, shape: &Shape, dtype: DType, init: Init) -> Result<Var> {
        let path = self.new_path(name)?;
        let var = Var::from_tensor(&self.params.start(&path, shape, dtype, init)?)?;
        self.params.buffers.insert(path, var.clone());
        Ok(var)
    }

    fn new_path(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        let Params { trainable, frozen, given, buffers, .. } = &*self.params;
        let is_fixed = frozen.contains_key(&path) || given.contains_key(&path);
        if is_fixed || trainable.contains_key(&path) || buffers.contains_key(&path) {
            bail!("two parameters are named {path}");
        }
        Ok(path)
    }

    fn path(&self, name: &str) -> String {
        param_name(&self.prefix, name)
    }
}

/// Returns the name of a parameter under a path, which is empty for the network itself.
pub(super) fn param_name(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_once_also_by_what_was_frozen() -> Result<()> {
        let mut params = Params::new(DType::F32, &Device::Cpu, 0);
        params.root().sub("layer1").param("weight", 3, Init::Const(1.0))?;
        params.root().buffer("mean", 3, Init::Const(0.0))?;
        params.freeze("layer1")?;
        let error = |e: Result<Tensor>| e.err().map(|e| e.to_string()).unwrap_or_default();
        let again = params.root().sub("layer1").param("weight", 3, Init::Const(2.0));
        assert!(error(again).contains("two parameters are named layer1.weight"));
        let buffer = params.root().param("mean", 3, Init::Const(2.0));
        assert!(error(buffer).contains("two parameters are named mean"));
        Ok(())
    }
}
