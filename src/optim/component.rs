//! A component in training: the student, its head or its projection.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::optimizer::{OptimConfig, Optimizer, SampledCentres};
use crate::nn::{DeviceParams, Group};
use crate::ops::backend::Backend;

/// Parameters in training, with their gradients and moments.
#[derive(Debug)]
pub(crate) struct Component<B: Backend> {
    /// Name in messages and in saved states.
    pub name: &'static str,
    /// The parameters and their gradients.
    pub params: DeviceParams<B>,
    optimizer: Optimizer<B>,
    /// Sum of the gradients of earlier mini-batches, with gradient accumulation.
    sum: Option<B::Array>,
}

impl<B: Backend> Component<B> {
    /// Returns a component for batches of `accumulate` mini-batches.
    pub fn new(name: &'static str, params: DeviceParams<B>, config: &OptimConfig, accumulate: usize) -> Result<Self> {
        let optimizer = Optimizer::of(config, &params)?;
        let sum = (accumulate > 1).then(|| params.backend().zeros(params.len(Group::Trained))).transpose()?;
        Ok(Self { name, params, optimizer, sum })
    }

    /// Adds the gradients of mini-batch `i` to those of the mini-batches before it; the component has the sum after the
    /// last of `num`.
    pub fn accumulate(&mut self, i: usize, num: usize) -> Result<()> {
        let Some(sum) = &mut self.sum else { return Ok(()) };
        let backend = self.params.backend().clone();
        let grads = self.params.grads_mut();
        match i {
            0 => std::mem::swap(grads, sum),
            _ if i + 1 < num => backend.add(sum, grads)?,
            _ => backend.add(grads, sum)?,
        }
        Ok(())
    }

    /// Updates the parameters with learning rate `lr`, unless the guard found the step not finite.
    pub fn update(&mut self, lr: f64, guard: &B::Guard, is_clipped: bool) -> Result<()> {
        self.optimizer.update(&mut self.params, lr, guard, is_clipped)
    }

    /// Updates class centres of a sample with learning rate `lr`, unless the guard found the step not finite.
    pub fn update_sample(&mut self, sample: &SampledCentres<B>, lr: f64, guard: &B::Guard) -> Result<()> {
        self.optimizer.update_sample(&mut self.params, sample, lr, guard)
    }

    /// Returns the optimiser's state under this component's name.
    pub fn optimizer_state(&self) -> Result<impl Iterator<Item = (String, Tensor)>> {
        let name = self.name;
        Ok(self.optimizer.state(&self.params)?.into_iter().map(move |(key, tensor)| (format!("{name}.{key}"), tensor)))
    }

    /// Loads this component's part of the states of all optimisers.
    pub fn load_optimizer(&mut self, states: &BTreeMap<String, Tensor>) -> Result<()> {
        let of_this = |(key, tensor): (&String, &Tensor)| {
            Some((key.strip_prefix(self.name)?.strip_prefix('.')?.to_owned(), tensor.clone()))
        };
        let state = states.iter().filter_map(of_this).collect();
        self.optimizer.load(&state, &self.params)
    }
}
