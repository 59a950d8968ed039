//! SGD with momentum, and AdamW.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use crate::models::Training;
use crate::nn::{DeviceParams, Group};
use crate::ops::adamw::AdamWStep;
use crate::ops::backend::Backend;
use crate::ops::cpu::Cpu;
use crate::ops::sgd::SgdStep;

/// Key of the number of steps in the saved states of optimisers and weight averages.
pub(super) const NUM_STEPS: &str = "num_steps";

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

/// The moments of the trained parameters of one component.
#[derive(Debug)]
pub struct Optimizer<B: Backend = Cpu> {
    config: OptimConfig,
    /// The velocity, or the mean gradient and the mean squared gradient, in the layout of the parameters.
    moments: Vec<B::Array>,
    num_steps: u64,
}

impl Optimizer {
    /// Returns an optimiser of the trained parameters of a network.
    ///
    /// # Errors
    /// When memory for the moments cannot be allocated.
    pub fn new(config: &OptimConfig, network: &Training) -> Result<Self> {
        Self::of(config, network.params())
    }

    /// Updates every parameter with learning rate `lr` and the gradients of the last backward pass, which are clipped
    /// as the settings say. Returns their norm before clipping; if it is not finite, nothing is updated.
    ///
    /// # Errors
    /// When `network` is another than the optimiser was made for.
    pub fn step(&mut self, network: &mut Training, lr: f64) -> Result<f64> {
        let mut guard = Cpu.guard()?;
        network.params().measure(&mut guard, self.config.clip_norm, &[])?;
        let state = Cpu.read_guard(&guard)?;
        if state.is_finite {
            self.update(network.params_mut(), lr, &guard, true)?;
        }
        Ok(state.norm)
    }
}

impl<B: Backend> Optimizer<B> {
    /// Returns an optimiser of the trained parameters of `params`.
    pub(crate) fn of(config: &OptimConfig, params: &DeviceParams<B>) -> Result<Self> {
        let num_moments = match config.kind {
            OptimKind::Sgd => 1,
            OptimKind::AdamW => 2,
        };
        let moments = (0..num_moments).map(|_| params.backend().zeros(params.len(Group::Trained)));
        Ok(Self { config: config.clone(), moments: moments.collect::<Result<_>>()?, num_steps: 0 })
    }

    /// Updates every parameter with learning rate `lr` and its gradient, unless the guard found the step not finite;
    /// `is_clipped` says whether the guard's clipping factor scales the gradients.
    pub(crate) fn update(
        &mut self,
        params: &mut DeviceParams<B>,
        lr: f64,
        guard: &B::Guard,
        is_clipped: bool,
    ) -> Result<()> {
        self.num_steps += 1;
        let OptimConfig { momentum, weight_decay, betas, .. } = self.config;
        let (backend, grad_scale, num_steps) = (params.backend().clone(), 1.0, self.num_steps);
        let update = params.update(guard, is_clipped);
        match self.moments.as_mut_slice() {
            [velocity] => backend.sgd(update, velocity, SgdStep { lr, momentum, weight_decay, grad_scale }),
            [mean, square] => {
                let step = AdamWStep { lr, betas, weight_decay, grad_scale, num_steps };
                backend.adamw(update, [mean, square], step)
            }
            moments => bail!("optimizer: {} moments", moments.len()),
        }
    }

    /// Returns the state: the moments of every parameter, `NAME.0` and, for AdamW, `NAME.1`, and the number of steps.
    /// Waits for the device.
    pub(crate) fn state(&self, params: &DeviceParams<B>) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::from([(NUM_STEPS.to_owned(), Tensor::new(&[self.num_steps as i64], &Device::Cpu)?)]);
        for (i, moment) in self.moments.iter().enumerate() {
            let named = params.named(moment, Group::Trained)?.into_iter();
            state.extend(named.map(|(name, tensor)| (format!("{name}.{i}"), tensor)));
        }
        Ok(state)
    }

    /// Loads the [`Self::state`] of an optimiser of the same parameters and rule, on any device, all or nothing.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or of another size.
    pub(crate) fn load(&mut self, state: &BTreeMap<String, Tensor>, params: &DeviceParams<B>) -> Result<()> {
        let mut left = state.clone();
        let mut take =
            |name: &str| left.remove(name).ok_or_else(|| candle_core::Error::msg(format!("optimizer: no {name}")));
        let num_steps = num_steps("optimizer", &take(NUM_STEPS)?)?;
        let laid_out = |i| params.laid_out(Group::Trained, |name| take(&format!("{name}.{i}")));
        let loaded = (0..self.moments.len()).map(laid_out).collect::<Result<Vec<_>>>()?;
        if !left.is_empty() {
            let found = state.len() - 1;
            bail!("optimizer: expected {} moments, found {found}: saved by another update rule", found - left.len());
        }
        self.num_steps = num_steps;
        self.moments.iter_mut().zip(loaded).try_for_each(|(moment, values)| params.backend().write(moment, &values))
    }
}

/// Reads the number of steps from the state of an optimiser or of a weight average; `what` names it in errors.
pub(super) fn num_steps(what: &str, tensor: &Tensor) -> Result<u64> {
    match tensor.to_vec1::<i64>()?.as_slice() {
        &[num] if num >= 0 => Ok(num as u64),
        found => bail!("{what}: {NUM_STEPS}: expected one number, 0 or more, found {found:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::Path;

    use super::*;
    use crate::nn::{Init, Params};
    use crate::testing::{Tol, assert_close, fill};

    /// Tensors that `tests/fixtures/losses.py` made with PyTorch.
    fn fixture(name: &str) -> Result<HashMap<String, Tensor>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        candle_core::safetensors::load(folder.join(name).with_extension("safetensors"), &Device::Cpu)
    }

    /// Ten parameters `p` as in the fixtures.
    fn start() -> Result<DeviceParams<Cpu>> {
        let mut params = Params::new(candle_core::DType::F32, &Device::Cpu, 0);
        params.root().sub("layer").param("p", 10, Init::Const(0.0))?;
        params.load(&[("layer.p".to_owned(), fill("p", &[10], -1.0, 1.0)?)].into())?;
        DeviceParams::new(&Cpu, params.parts(), BTreeMap::new())
    }

    /// Makes an update with the gradient that the fixtures have in `step`; returns the gradient's norm.
    fn update(params: &mut DeviceParams<Cpu>, optimizer: &mut Optimizer, step: usize, lr: f64) -> Result<f64> {
        let gradient = fill(&format!("g{step}"), &[10], -1.0, 1.0)?.to_dtype(candle_core::DType::F32)?;
        *params.grads_mut() = gradient.to_vec1()?;
        let mut guard = Cpu.guard()?;
        params.measure(&mut guard, optimizer.config.clip_norm, &[])?;
        optimizer.update(params, lr, &guard, true)?;
        Ok(Cpu.read_guard(&guard)?.norm)
    }

    #[test]
    fn sgd_and_clipping_are_those_of_pytorch() -> Result<()> {
        let fixture = fixture("sgd")?;
        for (file, clip_norm) in [("params", 0.0), ("params_clipped", 0.5)] {
            let mut params = start()?;
            let config = OptimConfig { weight_decay: 5e-4, clip_norm, ..OptimConfig::default() };
            let mut sgd = Optimizer::of(&config, &params)?;
            for step in 0..3 {
                let norm = update(&mut params, &mut sgd, step, 0.1)?;
                let expected = fixture["grad_norm"].get(step)?.to_scalar::<f64>()?;
                assert!((norm - expected).abs() <= 1e-6, "norm {norm}, expected {expected}");
                let found = &params.state()?["layer.p"];
                assert_close(&format!("{file} after step {step}"), found, &fixture[file].get(step)?, Tol::F32)?;
            }
        }
        Ok(())
    }

    #[test]
    fn adamw_is_that_of_pytorch() -> Result<()> {
        let (fixture, mut params) = (fixture("adamw")?, start()?);
        let config =
            OptimConfig { kind: OptimKind::AdamW, weight_decay: 0.05, clip_norm: 0.0, ..OptimConfig::default() };
        let mut adamw = Optimizer::of(&config, &params)?;
        for step in 0..4 {
            update(&mut params, &mut adamw, step, 0.01)?;
            let found = &params.state()?["layer.p"];
            assert_close(&format!("after step {step}"), found, &fixture["params"].get(step)?, Tol::F32)?;
        }
        let other = Optimizer::of(&OptimConfig::default(), &params)?.state(&params)?;
        let error = adamw.load(&other, &params).unwrap_err().to_string();
        assert!(error.contains("optimizer: no layer.p.1"), "{error}");
        let mut sgd = Optimizer::of(&OptimConfig::default(), &params)?;
        let error = sgd.load(&adamw.state(&params)?, &params).unwrap_err().to_string();
        assert!(error.contains("expected 1 moments, found 2: saved by another update rule"), "{error}");
        Ok(())
    }
}
