//! The optimiser on a GPU: all parameters of a network in one pass.

use std::collections::BTreeMap;

use candle_core::{Device as Candle, Result, Tensor};

use super::optimizer::{NUM_STEPS, OptimConfig, OptimKind, num_steps};
use crate::gpu::update::{Flat, Guard, adamw, sgd};
use crate::gpu::{Array, Device, Element};

/// What the optimiser remembers of parameters on a GPU.
pub(crate) struct GpuOptimizer {
    config: OptimConfig,
    /// The velocity, or the mean gradient and the mean squared gradient.
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

    /// Returns the moments of all parameters in a row, `flat.0` and, for AdamW, `flat.1`, and the number of steps; waits for the device.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let num_steps = Tensor::new(&[self.num_steps as i64], &Candle::Cpu)?;
        let mut state = BTreeMap::from([(NUM_STEPS.to_owned(), num_steps)]);
        for (i, moment) in self.moments.iter().enumerate() {
            state.insert(format!("flat.{i}"), Tensor::new(moment.read::<f32>()?, &Candle::Cpu)?);
        }
        Ok(state)
    }

    /// Takes up what [`Self::state`] returned.
    ///
    /// # Errors
    /// When a tensor is missing or of another size, as those of a training on the CPU are.
    pub fn load(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let get = |name: &str| {
            let missing = || candle_core::Error::msg(format!("optimizer: no {name}: saved by a training on the CPU?"));
            state.get(name).ok_or_else(missing)
        };
        for (i, moment) in self.moments.iter().enumerate() {
            moment.write(&get(&format!("flat.{i}"))?.to_vec1::<f32>()?)?;
        }
        self.num_steps = num_steps(get(NUM_STEPS)?)?;
        Ok(())
    }

    /// Updates the parameters with learning rate `lr`, unless the guard found something that is not finite. `is_clipped`: whether
    /// the gradients are scaled down as it says.
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
