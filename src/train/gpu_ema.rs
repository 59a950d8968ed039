//! The exponential moving average of weights on a GPU.

use std::collections::BTreeMap;

use candle_core::{Device as Candle, Tensor};

use super::ema::{share, steps_of, values_of};
use crate::error::Result;
use crate::gpu::update::{Guard, blend};
use crate::gpu::{Array, Element};
use crate::nn::engine::gpu::{DeviceParams, Group};
use crate::optim::NUM_STEPS;

const GROUPS: [Group; 2] = [Group::Updated, Group::Fixed];

/// GPU counterpart of [`Ema`](super::ema::Ema), over parameters and running statistics. A step that the guard stops is
/// counted but does not change the average.
pub(super) struct GpuEma {
    decay: f64,
    num_steps: u64,
    /// The averages of [`GROUPS`], in the layout of the parameters.
    averages: [Array; 2],
}

impl GpuEma {
    /// Returns an average initialised with the current weights.
    pub fn new(params: &DeviceParams, decay: f64) -> Result<Self> {
        let copy = |group| {
            let from = params.array(group);
            let to = from.device().array(Element::F32, from.len())?;
            blend(&to, from, [0.0, 1.0], None).map(|()| to)
        };
        Ok(Self { decay, num_steps: 0, averages: [copy(GROUPS[0])?, copy(GROUPS[1])?] })
    }

    /// Adds the weights after a step to the average.
    pub fn update(&mut self, params: &DeviceParams, guard: &Guard) -> Result<()> {
        let share = share(self.decay, self.num_steps) as f32;
        for (average, group) in self.averages.iter().zip(GROUPS) {
            blend(average, params.array(group), [1.0 - share, share], Some(guard))?;
        }
        self.num_steps += 1;
        Ok(())
    }

    /// Returns the same state as [`Ema::state`](super::ema::Ema::state). Waits for the device.
    pub fn state(&self, params: &DeviceParams) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (average, group) in self.averages.iter().zip(GROUPS) {
            for (name, tensor) in params.restored(average, group)? {
                state.insert(name, tensor.flatten_all()?);
            }
        }
        state.insert(NUM_STEPS.to_owned(), Tensor::new(&[self.num_steps as i64], &Candle::Cpu)?);
        Ok(state)
    }

    /// Restores the [`Self::state`] of an average on the CPU or a GPU.
    pub fn load(&mut self, state: &BTreeMap<String, Tensor>, params: &DeviceParams) -> Result<()> {
        let get = |name: &str| values_of(state, name).map_err(candle_core::Error::wrap);
        let laid_out = |group| params.laid_out(group, get);
        let (values, num_steps) = ([laid_out(GROUPS[0])?, laid_out(GROUPS[1])?], steps_of(state)?);
        for (average, values) in self.averages.iter().zip(values) {
            average.write(&values)?;
        }
        self.num_steps = num_steps;
        Ok(())
    }
}
