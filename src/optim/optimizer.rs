//! SGD with momentum, and AdamW, over named parameters.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, Var, bail};
use serde::{Deserialize, Serialize};

use crate::nn::{Gradients, Params};
use crate::ops::adamw::{AdamWStep, adamw_step};
use crate::ops::sgd::{SgdStep, sgd_step};
use crate::ops::update::sum_of_squares;

/// Key of the number of steps in the saved states of optimisers and weight averages.
pub(crate) const NUM_STEPS: &str = "num_steps";

/// Rule that updates the parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimKind {
    /// Stochastic gradient descent with momentum; weight decay is part of the gradient.
    #[default]
    Sgd,
    /// Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, algorithm 2).
    AdamW,
}

/// Optimiser settings; the defaults are the published recipe (fdbtrs/ElasticFace and fdbtrs/Masked-Face-Recognition-KD,
/// `config/config.py`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Update rule.
    pub kind: OptimKind,
    /// Learning rate before any decay, for a batch of `lr_batch`.
    pub lr: f64,
    /// Batch size that `lr` is meant for; the learning rate is scaled by `batch / lr_batch` (Goyal et al., 2017).
    pub lr_batch: usize,
    /// Momentum: factor of the previous velocity, for [`OptimKind::Sgd`].
    pub momentum: f64,
    /// Decay rates of the mean gradient and the mean squared gradient, for [`OptimKind::AdamW`].
    pub betas: [f64; 2],
    /// Weight decay of every trained parameter, backbone and head: an L2 penalty for SGD; AdamW takes
    /// `lr * weight_decay` times the parameter off in each step.
    pub weight_decay: f64,
    /// Largest norm of the backbone's gradient; a longer one is scaled down to it. 0 turns clipping off.
    pub clip_norm: f64,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            kind: OptimKind::Sgd,
            lr: 0.1,
            lr_batch: 512,
            momentum: 0.9,
            betas: [0.9, 0.999],
            weight_decay: 5e-4,
            clip_norm: 5.0,
        }
    }
}

impl OptimConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let wrong = |what: String| Err(crate::Error::Config(format!("optim.{what}")));
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return wrong(format!("lr: expected a positive number, found {}", self.lr));
        }
        if self.lr_batch == 0 {
            return wrong("lr_batch: expected at least 1, found 0".into());
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return wrong(format!("momentum: expected 0 <= momentum < 1, found {}", self.momentum));
        }
        if self.betas.iter().any(|beta| !(0.0..1.0).contains(beta)) {
            return wrong(format!("betas: expected two numbers, 0 <= beta < 1, found {:?}", self.betas));
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return wrong(format!("weight_decay: expected 0 or more, found {}", self.weight_decay));
        }
        if !(self.clip_norm.is_finite() && self.clip_norm >= 0.0) {
            return wrong(format!("clip_norm: expected 0 or more, found {}", self.clip_norm));
        }
        Ok(())
    }
}

/// The optimiser: parameters with their moments, in name order.
#[derive(Debug)]
pub struct Optimizer {
    /// Name, parameter and moments: the velocity, or the mean gradient and the mean squared gradient.
    vars: Vec<(String, Var, Vec<Vec<f32>>)>,
    config: OptimConfig,
    num_steps: u64,
}

impl Optimizer {
    /// Returns an optimiser of all trainable parameters of `params`.
    pub fn new(params: &Params, config: &OptimConfig) -> Self {
        let num_moments = match config.kind {
            OptimKind::Sgd => 1,
            OptimKind::AdamW => 2,
        };
        let moments = |var: &Var| (0..num_moments).map(|_| vec![0.0; var.elem_count()]).collect();
        let vars = params.trainable().map(|(name, var)| (name.to_owned(), var.clone(), moments(var))).collect();
        Self { vars, config: config.clone(), num_steps: 0 }
    }

    /// Returns the state: the moments of every parameter, `NAME.0` and, for AdamW, `NAME.1`, and the number of steps.
    ///
    /// # Errors
    /// When memory for the copies cannot be allocated.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::from([(NUM_STEPS.to_owned(), Tensor::new(&[self.num_steps as i64], &Device::Cpu)?)]);
        for (name, var, moments) in &self.vars {
            for (i, moment) in moments.iter().enumerate() {
                state.insert(format!("{name}.{i}"), Tensor::from_slice(moment, var.shape(), &Device::Cpu)?);
            }
        }
        Ok(state)
    }

    /// Loads the [`Self::state`] of an optimiser of the same parameters and rule, all or nothing.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or of another shape.
    pub fn load(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let get = |name: &str| state.get(name).ok_or_else(|| candle_core::Error::msg(format!("optimizer: no {name}")));
        let mut loaded = Vec::new();
        for (name, var, moments) in &self.vars {
            for i in 0..moments.len() {
                let moment = get(&format!("{name}.{i}"))?;
                if moment.shape() != var.shape() {
                    bail!("optimizer: {name}.{i}: expected the shape {:?}, found {:?}", var.shape(), moment.shape());
                }
                loaded.push(moment.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        if state.len() != loaded.len() + 1 {
            bail!(
                "optimizer: expected {} moments, found {}: saved by another update rule",
                loaded.len(),
                state.len().saturating_sub(1)
            );
        }
        self.num_steps = num_steps("optimizer", get(NUM_STEPS)?)?;
        let mut loaded = loaded.into_iter();
        for moment in self.vars.iter_mut().flat_map(|(.., moments)| moments) {
            *moment = loaded.next().expect("one was loaded for each");
        }
        Ok(())
    }

    /// Updates every parameter with learning rate `lr` and its gradient times `grad_scale`.
    ///
    /// # Errors
    /// When `gradients` are of other parameters; then nothing is updated.
    pub fn step(&mut self, gradients: &Gradients, lr: f64, grad_scale: f64) -> Result<()> {
        if !gradients.names().eq(self.vars.iter().map(|(name, ..)| name.as_str())) {
            bail!("optimizer: the gradients are not those of its {} parameters", self.vars.len());
        }
        self.num_steps += 1;
        let OptimConfig { momentum, weight_decay, betas, .. } = self.config;
        for (name, var, moments) in &mut self.vars {
            gradients.read(name, |grad| match moments.as_mut_slice() {
                [mean, square] => {
                    let step = AdamWStep { lr, betas, weight_decay, grad_scale, num_steps: self.num_steps };
                    adamw_step(var, [mean, square], grad, step)
                }
                moments => {
                    let step = SgdStep { lr, momentum, weight_decay, grad_scale };
                    moments.iter_mut().try_for_each(|velocity| sgd_step(var, velocity, grad, step))
                }
            })??;
        }
        Ok(())
    }
}

/// Reads the number of steps from the state of an optimiser or of a weight average; `what` names it in errors.
pub(crate) fn num_steps(what: &str, tensor: &Tensor) -> Result<u64> {
    match tensor.to_vec1::<i64>()?.as_slice() {
        &[num] if num >= 0 => Ok(num as u64),
        found => bail!("{what}: {NUM_STEPS}: expected one number, 0 or more, found {found:?}"),
    }
}

/// Returns the L2 norm of all gradients together (PyTorch's `clip_grad_norm_`); blocks are added in f64.
///
/// # Errors
/// When a gradient cannot be read.
pub fn grad_norm(gradients: &Gradients) -> Result<f64> {
    let sums = gradients.names().map(|name| gradients.read(name, sum_of_squares)).collect::<Result<Vec<_>>>()?;
    Ok(sums.iter().sum::<f64>().sqrt())
}

/// Returns the factor that scales gradients of norm `norm` to at most `max_norm`: PyTorch's
/// `min(1, max_norm / (norm + 1e-6))`; 1 if `max_norm` is 0.
pub fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}
