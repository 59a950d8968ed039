//! Optimiser on a GPU: updates all parameters of a network in one pass.

use std::collections::BTreeMap;

use candle_core::{Device as Candle, Result, Tensor, bail};

use super::optimizer::{NUM_STEPS, OptimConfig, OptimKind, num_steps};
use crate::gpu::update::{Flat, Guard, adamw, sgd};
use crate::gpu::{Array, Device, Element};

/// An optimiser with its moments on a GPU.
pub(crate) struct GpuOptimizer {
    config: OptimConfig,
    /// Velocity, or mean gradient and mean squared gradient.
    moments: Vec<Array>,
    rates: Array,
    num_steps: u64,
}

impl GpuOptimizer {
    /// Returns an optimiser of `len` parameters.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(config: &OptimConfig, device: &Device, len: usize) -> Result<Self> {
        let num_moments = match config.kind {
            OptimKind::Sgd => 1,
            OptimKind::AdamW => 2,
        };
        let moments = (0..num_moments).map(|_| device.zeros(Element::F32, len)).collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), moments, rates: device.array(Element::F32, 3)?, num_steps: 0 })
    }

    /// Returns the same state as [`Optimizer::state`](super::Optimizer::state). `restored` splits an array in the
    /// device's layout of the parameters into tensors by name. Waits for the device.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn state(
        &self,
        restored: impl Fn(&Array) -> Result<BTreeMap<String, Tensor>>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let num_steps = Tensor::new(&[self.num_steps as i64], &Candle::Cpu)?;
        let mut state = BTreeMap::from([(NUM_STEPS.to_owned(), num_steps)]);
        for (i, moment) in self.moments.iter().enumerate() {
            state.extend(restored(moment)?.into_iter().map(|(name, tensor)| (format!("{name}.{i}"), tensor)));
        }
        Ok(state)
    }

    /// Loads the state of an optimiser of the same parameters and rule, from a GPU or the CPU. `laid_out` arranges the
    /// values that it requests by name in the device's layout of the parameters.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or of another size.
    pub fn load(
        &mut self,
        state: &BTreeMap<String, Tensor>,
        laid_out: impl Fn(&mut dyn FnMut(&str) -> Result<Vec<f32>>) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let mut left = state.clone();
        let mut take =
            |name: String| left.remove(&name).ok_or_else(|| candle_core::Error::msg(format!("optimizer: no {name}")));
        let num_steps = num_steps("optimizer", &take(NUM_STEPS.to_owned())?)?;
        let mut loaded = Vec::new();
        for i in 0..self.moments.len() {
            loaded.push(laid_out(&mut |name| take(format!("{name}.{i}"))?.flatten_all()?.to_vec1())?);
        }
        if !left.is_empty() {
            let found = state.len() - 1;
            bail!("optimizer: expected {} moments, found {found}: saved by another update rule", found - left.len());
        }
        self.num_steps = num_steps;
        self.moments.iter().zip(loaded).try_for_each(|(moment, values)| moment.write(&values))
    }

    /// Updates the parameters with learning rate `lr`, unless the guard found a non-finite value. `is_clipped` says
    /// whether the guard's clipping factor scales the gradients.
    ///
    /// # Errors
    /// When the sizes differ.
    pub fn step(&mut self, flat: &Flat, lr: f64, guard: &Guard, is_clipped: bool) -> Result<()> {
        self.num_steps += 1;
        let OptimConfig { momentum, weight_decay, betas: [beta1, beta2], .. } = self.config;
        match self.moments.as_slice() {
            [mean, square] => {
                let t = self.num_steps as f64;
                let rates = [lr / (1.0 - beta1.powf(t)), (1.0 - beta2.powf(t)).sqrt(), 1.0 - lr * weight_decay];
                self.rates.write(&rates.map(|rate| rate as f32))?;
                adamw(flat, [mean, square], &self.rates, [beta1 as f32, beta2 as f32], (guard, is_clipped))
            }
            moments => {
                self.rates.write(&[lr as f32; 3])?;
                let constants = [momentum as f32, weight_decay as f32];
                moments.iter().try_for_each(|velocity| sgd(flat, velocity, &self.rates, constants, (guard, is_clipped)))
            }
        }
    }
}

impl std::fmt::Debug for GpuOptimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuOptimizer").field("config", &self.config).finish_non_exhaustive()
    }
}
