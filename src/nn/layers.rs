//! Convolution, batch norm, PReLU, linear, dropout and squeeze-excitation layers with PyTorch's parameter names and
//! layouts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Module, ModuleT, Result, Tensor, Var};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::graph::{Graph, NodeId, Op, Trace};
use super::params::{Init, Scope};
use crate::ops::batch_norm::{Stats, StatsOrigin, batch_norm, batch_stats};
use crate::ops::conv::{ConvConfig, conv2d};
use crate::ops::prelu::prelu;

/// Convolution without bias.
#[derive(Clone, Debug)]
pub struct Conv2d {
    path: String,
    weight: Tensor,
    config: ConvConfig,
}

impl Conv2d {
    /// Creates `weight: (c_out, c_in / groups, kernel, kernel)`.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn new(c_in: usize, c_out: usize, kernel: usize, config: ConvConfig, init: Init, mut p: Scope) -> Result<Self> {
        let weight = p.param("weight", (c_out, c_in / config.groups, kernel, kernel), init)?;
        Ok(Self { path: p.prefix().to_owned(), weight, config })
    }
}

impl Trace for Conv2d {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        graph.push(Op::Conv2d(self.config), &self.path, &[x])
    }
}

impl Module for Conv2d {
    /// `(N, H, W, c_in)` to `(N, H', W', c_out)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        conv2d(x, &self.weight, self.config)
    }
}

/// Running statistics of a batch norm, as PyTorch keeps them (momentum 0.1, unbiased variance).
#[derive(Clone, Debug)]
struct RunningStats {
    mean: Var,
    var: Var,
    num_batches_tracked: Var,
}

impl RunningStats {
    fn new(channels: usize, p: &mut Scope) -> Result<Self> {
        Ok(Self {
            mean: p.buffer("running_mean", channels, Init::Const(0.0))?,
            var: p.buffer("running_var", channels, Init::Const(1.0))?,
            num_batches_tracked: p.counter("num_batches_tracked")?,
        })
    }

    /// Updates the running statistics with those of a batch of `count` values per channel.
    pub fn track(&self, stats: &Stats, count: usize) -> Result<()> {
        let var = stats.unbiased_var(count)?;
        for (running, new) in [(&self.mean, &stats.mean), (&self.var, &var)] {
            let new = Tensor::new(new.as_slice(), running.device())?.to_dtype(running.dtype())?;
            let kept = (running.as_detached_tensor() * (1.0 - BatchNorm::MOMENTUM))?;
            running.set(&(kept + (new * BatchNorm::MOMENTUM)?)?)?;
        }
        self.num_batches_tracked.set(&(self.num_batches_tracked.as_detached_tensor() + 1.0)?)
    }

    /// Returns the current statistics.
    pub fn read(&self) -> Result<Stats> {
        let to_f64 = |v: &Var| v.as_detached_tensor().to_dtype(candle_core::DType::F64)?.to_vec1();
        Ok(Stats { mean: to_f64(&self.mean)?, var: to_f64(&self.var)? })
    }
}

/// Batch normalisation over the last axis, with PyTorch's running statistics (momentum 0.1, unbiased variance).
#[derive(Clone, Debug)]
pub struct BatchNorm {
    path: String,
    weight: Tensor,
    bias: Tensor,
    running: RunningStats,
    frozen: Arc<AtomicBool>,
}

impl BatchNorm {
    /// Added to the variance; PyTorch's default.
    pub const EPS: f64 = crate::ops::batch_norm::EPS;
    /// Running variance, in f32, with which a batch norm of mean 0, weight 1 and bias 0 is the identity, bit for bit.
    pub const IDENTITY_VAR: f32 = (1.0 - Self::EPS) as f32;
    /// Weight of the newest batch in the running statistics; PyTorch's default.
    pub const MOMENTUM: f64 = crate::ops::batch_norm::MOMENTUM;

    /// Creates `weight` (ones), `bias` (zeros), `running_mean`, `running_var` and `num_batches_tracked`.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn new(channels: usize, mut p: Scope) -> Result<Self> {
        let weight = p.param("weight", channels, Init::Const(1.0))?;
        Self::with_weight(weight, channels, p)
    }

    /// Like [`Self::new`], with a weight that stays 1.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn with_frozen_weight(channels: usize, mut p: Scope) -> Result<Self> {
        let weight = p.buffer("weight", channels, Init::Const(1.0))?.as_detached_tensor();
        Self::with_weight(weight, channels, p)
    }

    fn with_weight(weight: Tensor, channels: usize, mut p: Scope) -> Result<Self> {
        Ok(Self {
            path: p.prefix().to_owned(),
            weight,
            bias: p.param("bias", channels, Init::Const(0.0))?,
            running: RunningStats::new(channels, &mut p)?,
            frozen: p.statistics_switch(),
        })
    }
}

impl Trace for BatchNorm {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        graph.push(Op::BatchNorm, &self.path, &[x])
    }
}

impl ModuleT for BatchNorm {
    /// `(.., C)` to the same shape. Training normalises by the batch's statistics and updates the running ones with
    /// them, unless those are frozen ([`Params::freeze_statistics`](super::Params::freeze_statistics)).
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        if !train || self.frozen.load(Ordering::Relaxed) {
            return batch_norm(x, &self.weight, &self.bias, &self.running.read()?, StatsOrigin::Running, Self::EPS);
        }
        let stats = batch_stats(x)?;
        self.running.track(&stats, x.elem_count() / stats.mean.len())?;
        batch_norm(x, &self.weight, &self.bias, &stats, StatsOrigin::Batch, Self::EPS)
    }
}

/// PReLU with a slope per channel.
#[derive(Clone, Debug)]
pub struct PRelu {
    path: String,
    weight: Tensor,
}

impl PRelu {
    /// Creates `weight: (channels)`, 0.25 each as in PyTorch.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn new(channels: usize, mut p: Scope) -> Result<Self> {
        let weight = p.param("weight", channels, Init::Const(0.25))?;
        Ok(Self { path: p.prefix().to_owned(), weight })
    }
}

impl Trace for PRelu {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        graph.push(Op::PRelu, &self.path, &[x])
    }
}

impl Module for PRelu {
    /// `(.., C)` to the same shape.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        prelu(x, &self.weight)
    }
}

/// Fully connected layer.
#[derive(Clone, Debug)]
pub struct Linear {
    path: String,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Creates `weight: (c_out, c_in)` and `bias: (c_out)`, both uniform in `+-1 / sqrt(c_in)` as in PyTorch.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn new(c_in: usize, c_out: usize, mut p: Scope) -> Result<Self> {
        let init = Init::Uniform(1.0 / (c_in as f64).sqrt());
        let weight = p.param("weight", (c_out, c_in), init)?;
        let bias = Some(p.param("bias", c_out, init)?);
        Ok(Self { path: p.prefix().to_owned(), weight, bias })
    }

    /// Creates `weight: (c_out, c_in)` only.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn without_bias(c_in: usize, c_out: usize, init: Init, mut p: Scope) -> Result<Self> {
        let weight = p.param("weight", (c_out, c_in), init)?;
        Ok(Self { path: p.prefix().to_owned(), weight, bias: None })
    }
}

impl Trace for Linear {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        graph.push(Op::Linear { has_bias: self.bias.is_some() }, &self.path, &[x])
    }
}

impl Module for Linear {
    /// `(N, c_in)` to `(N, c_out)`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// Squeeze-excitation (Hu et al., CVPR 2018) with two bias-free 1x1 convolutions, as in ElasticFace's IResNet.
#[derive(Clone, Debug)]
pub struct SqueezeExcitation {
    path: String,
    fc1: Tensor,
    fc2: Tensor,
}

impl SqueezeExcitation {
    /// Creates `fc1.weight: (channels / reduction, channels, 1, 1)` and
    /// `fc2.weight: (channels, channels / reduction, 1, 1)`.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn new(channels: usize, reduction: usize, mut p: Scope) -> Result<Self> {
        let hidden = channels / reduction;
        let init = Init::Normal(0.1);
        Ok(Self {
            path: p.prefix().to_owned(),
            fc1: p.sub("fc1").param("weight", (hidden, channels, 1, 1), init)?,
            fc2: p.sub("fc2").param("weight", (channels, hidden, 1, 1), init)?,
        })
    }
}

impl Trace for SqueezeExcitation {
    fn trace(&self, graph: &mut Graph, x: NodeId) -> NodeId {
        let conv = Op::Conv2d(ConvConfig::default());
        let mean = graph.push(Op::GlobalAveragePool, "", &[x]);
        let hidden = graph.push(conv.clone(), &format!("{}.fc1", self.path), &[mean]);
        let hidden = graph.push(Op::Relu, "", &[hidden]);
        let scale = graph.push(conv, &format!("{}.fc2", self.path), &[hidden]);
        let scale = graph.push(Op::Sigmoid, "", &[scale]);
        graph.push(Op::Mul, "", &[x, scale])
    }
}

impl Module for SqueezeExcitation {
    /// `(N, H, W, C)` to the same shape, each channel scaled by a factor in (0, 1) computed from the means of all
    /// channels.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (n, h, w, c) = x.dims4()?;
        let mean = x.reshape((n, h * w, c))?.mean(1)?;
        let hidden = mean.matmul(&self.fc1.flatten_from(1)?.t()?)?.relu()?;
        let scale = candle_nn::ops::sigmoid(&hidden.matmul(&self.fc2.flatten_from(1)?.t()?)?)?;
        x.broadcast_mul(&scale.reshape((n, 1, 1, c))?)
    }
}

/// Dropout (Srivastava et al., JMLR 2014), scaled so that the mean is unchanged.
///
/// candle's dropout uses a generator that cannot be seeded on the CPU; this one derives its generator from the model's.
#[derive(Clone, Debug)]
pub struct Dropout {
    probability: f64,
    rng: Arc<Mutex<ChaCha8Rng>>,
}

impl Dropout {
    /// Returns a layer that drops each element with `probability`, in `[0, 1)`.
    pub fn new(probability: f64, p: &mut Scope) -> Self {
        Self { probability, rng: Arc::new(Mutex::new(p.fork_rng())) }
    }

    /// Number of words drawn from the generator so far: a resumed training continues from there.
    pub fn num_words(&self) -> u64 {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).get_word_pos() as u64
    }

    /// Moves the generator to where `num_words` words have been drawn.
    pub fn skip_to(&self, num_words: u64) {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).set_word_pos(num_words.into());
    }

    /// Returns the factors of the next `len` elements in training; `None` if nothing is dropped.
    pub(super) fn mask(&self, len: usize) -> Option<Vec<f32>> {
        if self.probability == 0.0 {
            return None;
        }
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = (1.0 / (1.0 - self.probability)) as f32;
        Some((0..len).map(|_| if rng.random_bool(self.probability) { 0.0 } else { kept }).collect())
    }
}

impl ModuleT for Dropout {
    /// Any shape to the same shape; in evaluation, returns the input.
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match train.then(|| self.mask(x.elem_count())).flatten() {
            Some(mask) => x * Tensor::from_vec(mask, x.shape(), x.device())?.to_dtype(x.dtype())?,
            None => Ok(x.clone()),
        }
    }
}
