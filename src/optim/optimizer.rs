//! SGD with momentum, and AdamW.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use crate::models::Training;
use crate::nn::{DeviceParams, Group};
use crate::ops::adamw::AdamWStep;
use crate::ops::backend::{Backend, Update};
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

/// Class centres of a sample, with their gradient.
#[derive(Debug)]
pub(crate) struct SampledCentres<B: Backend> {
    /// Length of a centre.
    pub size: usize,
    /// The classes, in ascending order.
    pub classes: Vec<u32>,
    /// Gradient of their centres, `(size, classes)`.
    pub gradient: B::Array,
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
        let backend = params.backend().clone();
        let mut moments = std::mem::take(&mut self.moments);
        let updated = self.apply(&backend, params.update(guard, is_clipped), &mut moments, lr);
        self.moments = moments;
        updated
    }

    /// Updates the class centres of a sample, with `gradient` for those alone, and their moments; the other centres stay
    /// as they are, and their moments do not decay (PartialFC, An et al., CVPR 2022). Sampled centres are not clipped.
    pub(crate) fn update_sample(
        &mut self,
        params: &mut DeviceParams<B>,
        sample: &SampledCentres<B>,
        lr: f64,
        guard: &B::Guard,
    ) -> Result<()> {
        self.num_steps += 1;
        let (backend, SampledCentres { size, classes, gradient }) = (params.backend().clone(), sample);
        let mut values = backend.select_classes(params.values_mut(), *size, classes)?;
        let selected = self.moments.iter().map(|moment| backend.select_classes(moment, *size, classes));
        let mut moments = selected.collect::<Result<Vec<_>>>()?;
        let update = Update { values: &mut values, short: None, grads: gradient, guard, is_clipped: false };
        self.apply(&backend, update, &mut moments, lr)?;
        backend.replace_classes(params.values_mut(), *size, classes, &values)?;
        let mut all = self.moments.iter_mut().zip(&moments);
        all.try_for_each(|(all, moment)| backend.replace_classes(all, *size, classes, moment))
    }

    fn apply(&self, backend: &B, update: Update<B>, moments: &mut [B::Array], lr: f64) -> Result<()> {
        let OptimConfig { momentum, weight_decay, betas, .. } = self.config;
        let (grad_scale, num_steps) = (1.0, self.num_steps);
        match moments {
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

    #[test]
    fn a_sample_of_class_centres_is_updated_as_pytorch_does_and_the_others_stay() -> Result<()> {
        use crate::ops::margin_loss::{MarginForm, MarginGradient, MarginLossConfig, MarginTask, Rows};

        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/partial_fc.safetensors");
        let bytes = std::fs::read(path).expect("a fixture");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("safetensors");
        let lists = |name: &str| -> Vec<Vec<i64>> {
            serde_json::from_str(&header.metadata().as_ref().expect("metadata")[name]).expect("lists")
        };
        let fixture = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        let mut kernel = Params::new(candle_core::DType::F32, &Device::Cpu, 0);
        kernel.root().param("kernel", (16, 40), Init::Const(0.0))?;
        kernel.load(&[("kernel".to_owned(), fill("w", &[16, 40], -1.0, 1.0)?)].into())?;
        let mut params = DeviceParams::new(&Cpu, kernel.parts(), BTreeMap::new())?;
        let mut sgd =
            Optimizer::of(&OptimConfig { weight_decay: 5e-4, clip_norm: 0.0, ..OptimConfig::default() }, &params)?;
        let config =
            MarginLossConfig { form: MarginForm::Cosine, gradient: MarginGradient::True, scale: 64.0, matching: None };
        for (step, (labels, classes)) in lists("labels").into_iter().zip(lists("samples")).enumerate() {
            let before = params.state()?["kernel"].to_vec2::<f32>()?;
            let embeddings = fill(&format!("e{step}"), &[8, 16], -1.0, 1.0)?;
            let embeddings = embeddings.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let place = |label: &i64| classes.iter().position(|class| class == label).map_or(-1, |at| at as i64);
            let own: Vec<i64> = labels.iter().map(place).collect();
            let classes: Vec<u32> = classes.iter().map(|class| *class as u32).collect();
            let centres = Cpu.select_classes(params.values_mut(), 16, &classes)?;
            let mut gradient = vec![0.0; centres.len()];
            let rows = Rows { labels: &own, margins: &[0.35; 8] };
            let task = MarginTask { rows, config, weight: 1.0, ranks: None };
            let found = Cpu.margin_loss(&embeddings, &centres, task, &mut gradient)?;
            let expected = fixture["loss"].get(step)?.to_scalar::<f64>()?;
            assert!((found.loss - expected).abs() < 1e-4, "step {step}: {} of {expected}", found.loss);
            let of_embeddings = Tensor::from_vec(found.of_embeddings, (8, 16), &Device::Cpu)?;
            assert_close("the embeddings' gradient", &of_embeddings, &fixture["grad_e"].get(step)?, Tol::F32)?;
            let sample = SampledCentres { size: 16, classes, gradient };
            sgd.update_sample(&mut params, &sample, 0.1, &Cpu.guard()?)?;
            let after = &params.state()?["kernel"];
            assert_close("centres", after, &fixture["w"].get(step)?, Tol::F32)?;
            let velocity = &sgd.state(&params)?["kernel.0"];
            assert_close("velocities", velocity, &fixture["v"].get(step)?, Tol::F32)?;
            let after = after.to_vec2::<f32>()?;
            for class in (0..40).filter(|class| !sample.classes.contains(class)) {
                assert!((0..16).all(|i| after[i][class as usize] == before[i][class as usize]), "{class} has moved");
            }
        }
        let beyond = SampledCentres { size: 16, classes: vec![40], gradient: vec![0.0; 16] };
        let error = sgd.update_sample(&mut params, &beyond, 0.1, &Cpu.guard()?).unwrap_err().to_string();
        assert!(error.contains("expected classes below 40, found 40"), "{error}");
        Ok(())
    }
}
