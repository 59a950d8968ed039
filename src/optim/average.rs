//! The exponential moving average of a network's weights.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor, bail};

use super::optimizer::{NUM_STEPS, num_steps};
use crate::nn::{DeviceParams, Group};
use crate::ops::backend::Backend;

/// Exponential moving average of parameters and running statistics: `average += (1 - decay) * (weights - average)`
/// after each step (Polyak and Juditsky, 1992; in the form of Tarvainen and Valpola, NeurIPS 2017, section 2). The
/// decay of step `n` is at most `(1 + n) / (10 + n)`, so that the initial weights are soon forgotten.
#[derive(Debug)]
pub(crate) struct Average<B: Backend> {
    decay: f64,
    num_steps: u64,
    /// The averages of [`Group::BOTH`], in the layout of the parameters.
    values: [B::Array; 2],
}

impl<B: Backend> Average<B> {
    /// Returns an average that starts from the current weights.
    pub fn new(params: &DeviceParams<B>, decay: f64) -> Result<Self> {
        let copy = |group| {
            let mut values = params.backend().zeros(params.len(group))?;
            params.backend().add(&mut values, &params.values(group).wide)?;
            Ok::<_, candle_core::Error>(values)
        };
        Ok(Self { decay, num_steps: 0, values: [copy(Group::Trained)?, copy(Group::Fixed)?] })
    }

    /// Adds the weights after a step to the average. A step that the guard found not finite is counted, but does not
    /// change the average.
    pub fn update(&mut self, params: &DeviceParams<B>, guard: &B::Guard) -> Result<()> {
        let n = self.num_steps as f64;
        let share = 1.0 - self.decay.min((1.0 + n) / (10.0 + n));
        for (average, group) in self.values.iter_mut().zip(Group::BOTH) {
            params.backend().average(average, &params.values(group).wide, share, guard)?;
        }
        self.num_steps += 1;
        Ok(())
    }

    /// Returns the state of `params`, as in a checkpoint, with the averages in place of the weights.
    pub fn weights(&self, params: &DeviceParams<B>) -> Result<BTreeMap<String, Tensor>> {
        let mut state = params.state()?;
        for (average, group) in self.values.iter().zip(Group::BOTH) {
            state.extend(params.named(average, group)?);
        }
        Ok(state)
    }

    /// Returns the state that [`Self::load`] restores.
    pub fn state(&self, params: &DeviceParams<B>) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::from([(NUM_STEPS.to_owned(), Tensor::new(&[self.num_steps as i64], &Device::Cpu)?)]);
        for (average, group) in self.values.iter().zip(Group::BOTH) {
            for (name, tensor) in params.named(average, group)? {
                state.insert(name, tensor.flatten_all()?);
            }
        }
        Ok(state)
    }

    /// Restores the [`Self::state`] of an average of the same parameters, on any device.
    pub fn load(&mut self, state: &BTreeMap<String, Tensor>, params: &DeviceParams<B>) -> Result<()> {
        let get = |name: &str| match state.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => bail!("ema: no {name}"),
        };
        let loaded = Group::BOTH.iter().map(|group| params.laid_out(*group, get)).collect::<Result<Vec<_>>>()?;
        let num_steps = num_steps("ema", &get(NUM_STEPS)?)?;
        for (average, values) in self.values.iter_mut().zip(&loaded) {
            params.backend().write(average, values)?;
        }
        self.num_steps = num_steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Init, Params};
    use crate::ops::cpu::Cpu;

    #[test]
    fn averages_are_those_of_the_formula_and_go_on_from_a_state() -> Result<()> {
        let mut params = Params::new(candle_core::DType::F32, &Device::Cpu, 0);
        params.root().param("w", 3, Init::Const(1.0))?;
        params.root().buffer("mean", 2, Init::Const(0.0))?;
        params.root().counter("n")?;
        let mut params = DeviceParams::new(&Cpu, params.parts(), BTreeMap::new())?;
        let (mut average, guard) = (Average::new(&params, 0.5)?, Cpu.guard()?);
        let mut expected = 1f64;
        for step in 0..20 {
            let value = f64::from(step).sin();
            let state = BTreeMap::from([
                ("w".to_owned(), Tensor::full(value as f32, 3, &Device::Cpu)?),
                ("mean".to_owned(), Tensor::full(value as f32, 2, &Device::Cpu)?),
                ("n".to_owned(), Tensor::new(i64::from(step), &Device::Cpu)?),
            ]);
            params.load(&state)?;
            average.update(&params, &guard)?;
            let decay = 0.5f64.min((1.0 + f64::from(step)) / (10.0 + f64::from(step)));
            expected = decay * expected + (1.0 - decay) * value;
            // Restoring a saved state continues the average exactly.
            let mut other = Average::new(&params, 0.5)?;
            other.load(&average.state(&params)?, &params)?;
            average = other;
        }
        let weights = average.weights(&params)?;
        let found = weights["w"].to_vec1::<f32>()?;
        assert!(found.iter().all(|w| (f64::from(*w) - expected).abs() < 1e-6), "{found:?}, expected {expected}");
        assert!(weights["mean"].to_vec1::<f32>()?[0] != 0.0);
        assert_eq!(weights["n"].to_scalar::<i64>()?, 19);
        let error = average.load(&BTreeMap::new(), &params).unwrap_err().to_string();
        assert!(error.contains("ema: no"), "{error}");
        Ok(())
    }
}
