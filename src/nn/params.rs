//! Named parameters, in name order, with buffers apart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use rand::SeedableRng;
use rand::distr::{Distribution, Uniform};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// The parameters (trained) and buffers (saved, not trained) of a model, under PyTorch's names.
///
/// A model is built against a [`Scope`] of it; afterwards both share the variables. The order is that of the names,
/// so nothing that is summed, clipped or saved depends on a hash.
#[derive(Debug)]
pub struct Params {
    trainable: BTreeMap<String, Var>,
    buffers: BTreeMap<String, Var>,
    rng: ChaCha8Rng,
    dtype: DType,
    device: Device,
    frozen: bool,
    freeze_statistics: Arc<AtomicBool>,
    max_elements: usize,
    num_elements: usize,
}

/// How a parameter starts.
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
    /// Returns an empty set whose parameters will start from `seed`; the names do not enter, the order of creation does.
    pub fn new(dtype: DType, device: &Device, seed: u64) -> Self {
        Self {
            trainable: BTreeMap::new(),
            buffers: BTreeMap::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            dtype,
            device: device.clone(),
            frozen: false,
            freeze_statistics: Arc::default(),
            max_elements: usize::MAX,
            num_elements: 0,
        }
    }

    /// Returns an empty set whose parameters receive no gradient: what is computed with them builds no graph. They are
    /// zeros until they are loaded.
    pub fn frozen(dtype: DType, device: &Device) -> Self {
        Self { frozen: true, ..Self::new(dtype, device, 0) }
    }

    /// Refuses to grow much beyond `elements`: a file that claims to be a larger network than it has weights for ends in
    /// an error before memory is taken, and one that lacks some still in a list of them.
    pub fn with_room_for(self, elements: usize) -> Self {
        const SLACK: usize = 1 << 24;
        Self { max_elements: elements.saturating_mul(2).saturating_add(SLACK), ..self }
    }

    /// Lets batch norm normalise by its running statistics in training too, and leave them as they are.
    pub fn freeze_statistics(&self, freeze: bool) {
        self.freeze_statistics.store(freeze, Ordering::Relaxed);
    }

    /// Returns the scope of the whole model.
    pub fn root(&mut self) -> Scope<'_> {
        Scope { params: self, prefix: String::new() }
    }

    /// The trained parameters in name order; none if frozen.
    pub fn trainable(&self) -> impl Iterator<Item = (&str, &Var)> {
        let trainable = if self.frozen { None } else { Some(&self.trainable) };
        trainable.into_iter().flatten().map(|(name, var)| (name.as_str(), var))
    }

    /// Number of elements of all parameters, frozen or not, without buffers: as papers count.
    pub fn num_parameters(&self) -> usize {
        self.trainable.values().map(|var| var.elem_count()).sum()
    }

    /// Returns the shape of every parameter and buffer by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.variables().map(|(name, var)| (name.to_owned(), var.dims().to_vec())).collect()
    }

    /// Returns a copy of every parameter and buffer by name.
    ///
    /// # Errors
    /// When memory for the copies cannot be had.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        self.variables().map(|(name, var)| Ok((name.to_owned(), var.as_detached_tensor().copy()?))).collect()
    }

    /// Copies `state` into the parameters and buffers, all or nothing.
    ///
    /// # Errors
    /// When a name is missing, unexpected or has another shape or kind of number: one error that lists up to 20 of them and their count.
    pub fn load(&self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut problems = Vec::new();
        for (name, var) in self.variables() {
            match state.get(name) {
                None => problems.push(format!("missing {name} {:?}", var.shape())),
                Some(t) if t.shape() != var.shape() => {
                    problems.push(format!("{name}: expected {:?}, found {:?}", var.shape(), t.shape()));
                }
                Some(t) if t.dtype().is_float() != var.dtype().is_float() => {
                    problems.push(format!("{name}: expected {}, found {}", var.dtype().as_str(), t.dtype().as_str()));
                }
                Some(_) => {}
            }
        }
        let known = |name: &String| self.trainable.contains_key(name) || self.buffers.contains_key(name);
        problems.extend(state.keys().filter(|name| !known(name)).map(|name| format!("unexpected {name}")));
        if !problems.is_empty() {
            let more = problems.len().saturating_sub(20);
            let listed = problems[..problems.len() - more].join("; ");
            let rest = if more > 0 { format!("; and {more} more") } else { String::new() };
            bail!("{} tensors do not fit the model: {listed}{rest}", problems.len());
        }
        let variables: Vec<(&str, &Var)> = self.variables().collect();
        // Most of the time goes into the first touch of the memory of a new model.
        variables.into_par_iter().try_for_each(|(name, var)| {
            var.set(&state[name].to_dtype(var.dtype())?.to_device(&self.device)?.contiguous()?)
        })
    }

    fn variables(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.trainable.iter().chain(&self.buffers).map(|(name, var)| (name.as_str(), var))
    }

    fn create(&mut self, shape: &Shape, init: Init) -> Result<Var> {
        self.num_elements = self.num_elements.saturating_add(shape.elem_count());
        if self.num_elements > self.max_elements {
            bail!("the network has more than {} weights, there is no room for them", self.max_elements);
        }
        if self.frozen {
            // To be loaded: zeros cost no time, and no memory before it is known that a file fits.
            return Var::zeros(shape, self.dtype, &self.device);
        }
        let n = shape.elem_count();
        let mut values = vec![0f64; n];
        match init {
            Init::Const(c) => values.fill(c),
            Init::Uniform(bound) => {
                let uniform = Uniform::new_inclusive(-bound, bound).map_err(candle_core::Error::wrap)?;
                values.fill_with(|| uniform.sample(&mut self.rng));
            }
            Init::Normal(std) => values.fill_with(|| std * standard_normal(&mut self.rng)),
        }
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(self.dtype)?.to_device(&self.device)?)
    }
}

/// One draw by Box and Muller's transform (1958).
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

    /// Whether batch norm leaves its running statistics as they are, now and later.
    pub(super) fn statistics_switch(&self) -> Arc<AtomicBool> {
        self.params.freeze_statistics.clone()
    }

    /// The names' prefix, without a dot at its end.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Returns a new parameter; it takes part in the graph unless the set is frozen.
    ///
    /// # Errors
    /// When the name is taken or memory for it cannot be had.
    pub fn param(&mut self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Tensor> {
        let var = self.insert(name, shape.into(), init, true)?;
        Ok(if self.params.frozen { var.as_detached_tensor() } else { var.as_tensor().clone() })
    }

    /// Returns a new buffer: saved and loaded with the model, never trained.
    ///
    /// # Errors
    /// As [`Self::param`].
    pub fn buffer(&mut self, name: &str, shape: impl Into<Shape>, init: Init) -> Result<Var> {
        self.insert(name, shape.into(), init, false)
    }

    /// Returns a new 64-bit counter, starting at 0: a buffer.
    ///
    /// # Errors
    /// As [`Self::param`].
    pub fn counter(&mut self, name: &str) -> Result<Var> {
        let var = Var::from_tensor(&Tensor::new(0i64, &self.params.device)?)?;
        self.register(name, var, false)
    }

    /// Returns a generator that depends on the seed and on what was created before.
    pub(super) fn fork_rng(&mut self) -> ChaCha8Rng {
        ChaCha8Rng::from_rng(&mut self.params.rng)
    }

    fn insert(&mut self, name: &str, shape: Shape, init: Init, trainable: bool) -> Result<Var> {
        let var = self.params.create(&shape, init)?;
        self.register(name, var, trainable)
    }

    fn register(&mut self, name: &str, var: Var, trainable: bool) -> Result<Var> {
        let path = self.path(name);
        if self.params.trainable.contains_key(&path) || self.params.buffers.contains_key(&path) {
            bail!("two parameters are named {path}");
        }
        let set = if trainable { &mut self.params.trainable } else { &mut self.params.buffers };
        set.insert(path, var.clone());
        Ok(var)
    }

    fn path(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
