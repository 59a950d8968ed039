//! The exponential moving average of a network's weights.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::nn::Params;
use crate::ops::slice::Values;
use crate::ops::update::each_pair;
use crate::optim::{NUM_STEPS, num_steps};

/// Exponential moving average of parameters and running statistics: `average += (1 - decay) * (weights - average)`
/// after each step (Polyak and Juditsky, 1992; in the form of Tarvainen and Valpola, NeurIPS 2017, section 2). The
/// decay of step `n` is at most `(1 + n) / (10 + n)`, so that the initial weights are soon forgotten.
#[derive(Debug)]
pub(super) struct Ema {
    decay: f64,
    num_steps: u64,
    /// Averages of f32 tensors by name. Tensors of other types are not averaged.
    values: BTreeMap<String, Vec<f32>>,
}

impl Ema {
    /// Returns an average initialised with the current weights.
    pub fn new(params: &Params, decay: f64) -> Result<Self> {
        let floats = params.state()?.into_iter().filter(|(_, tensor)| tensor.dtype() == DType::F32);
        let values = floats.map(|(name, tensor)| Ok((name, tensor.flatten_all()?.to_vec1()?)));
        Ok(Self { decay, num_steps: 0, values: values.collect::<Result<_>>()? })
    }

    /// Adds the weights after a step to the average.
    pub fn update(&mut self, params: &Params) -> Result<()> {
        let share = share(self.decay, self.num_steps);
        for (name, average) in &mut self.values {
            let weights = params.get(name).ok_or_else(|| missing(name))?.contiguous()?;
            let weights = Values::of(name, &weights)?;
            each_pair(average, &weights, |a, w| *a += share as f32 * (w - *a));
        }
        self.num_steps += 1;
        Ok(())
    }

    /// Returns `params` as a network's state, with averages in place of the f32 tensors.
    pub fn weights(&self, params: &Params) -> Result<BTreeMap<String, Tensor>> {
        let mut state = params.state()?;
        for (name, values) in &self.values {
            let tensor = state.get_mut(name).ok_or_else(|| missing(name))?;
            *tensor = Tensor::from_slice(values, tensor.shape(), &Device::Cpu)?;
        }
        Ok(state)
    }

    /// Returns the state that [`Self::load`] restores.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let values = self
            .values
            .iter()
            .map(|(name, values)| Ok((name.clone(), Tensor::from_slice(values, values.len(), &Device::Cpu)?)));
        let mut state = values.collect::<Result<BTreeMap<_, _>>>()?;
        state.insert(NUM_STEPS.to_owned(), Tensor::new(&[self.num_steps as i64], &Device::Cpu)?);
        Ok(state)
    }

    /// Restores the state that [`Self::state`] returned.
    pub fn load(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let read = |name: &str, len: usize| -> Result<Vec<f32>> {
            let values = values_of(state, name)?;
            if values.len() != len {
                return Err(Error::Training(format!("ema: {name}: expected {len} elements, found {}", values.len())));
            }
            Ok(values)
        };
        let values = self.values.iter().map(|(name, values)| Ok((name.clone(), read(name, values.len())?)));
        let values = values.collect::<Result<BTreeMap<_, _>>>()?;
        (self.num_steps, self.values) = (steps_of(state)?, values);
        Ok(())
    }
}

/// Returns the share of the newest weights in an average over `num_steps` earlier ones.
pub(super) fn share(decay: f64, num_steps: u64) -> f64 {
    let n = num_steps as f64;
    1.0 - decay.min((1.0 + n) / (10.0 + n))
}

/// Returns one tensor's average from a saved state.
pub(super) fn values_of(state: &BTreeMap<String, Tensor>, name: &str) -> Result<Vec<f32>> {
    Ok(state.get(name).ok_or_else(|| missing(name))?.to_vec1()?)
}

/// Returns the number of steps from a saved state.
pub(super) fn steps_of(state: &BTreeMap<String, Tensor>) -> Result<u64> {
    Ok(num_steps("ema", state.get(NUM_STEPS).ok_or_else(|| missing(NUM_STEPS))?)?)
}

fn missing(name: &str) -> Error {
    Error::Training(format!("ema: no {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Init;

    #[test]
    fn averages_are_those_of_the_formula_and_go_on_from_a_state() -> Result<()> {
        let mut params = Params::new(DType::F32, &Device::Cpu, 0);
        params.root().param("w", 3, Init::Const(1.0))?;
        params.root().counter("n")?;
        let mut average = Ema::new(&params, 0.5)?;
        let mut expected = 1f64;
        for step in 0..20 {
            let value = f64::from(step).sin();
            let state = BTreeMap::from([
                ("w".to_owned(), Tensor::full(value as f32, 3, &Device::Cpu)?),
                ("n".to_owned(), Tensor::new(i64::from(step), &Device::Cpu)?),
            ]);
            params.load(&state)?;
            average.update(&params)?;
            let decay = 0.5f64.min((1.0 + f64::from(step)) / (10.0 + f64::from(step)));
            expected = decay * expected + (1.0 - decay) * value;
            // Restoring a saved state continues the average exactly.
            let mut other = Ema::new(&params, 0.5)?;
            other.load(&average.state()?)?;
            average = other;
        }
        let weights = average.weights(&params)?;
        let found = weights["w"].to_vec1::<f32>()?;
        assert!(found.iter().all(|w| (f64::from(*w) - expected).abs() < 1e-6), "{found:?}, expected {expected}");
        assert_eq!(weights["n"].to_scalar::<i64>()?, 19);
        let error = average.load(&BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("ema: no w"), "{error}");
        Ok(())
    }
}
