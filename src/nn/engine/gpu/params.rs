//! Parameters of a network as the GPU's kernels read them.

use std::collections::BTreeMap;

use candle_core::Result;

use crate::gpu::GpuBackend;
use crate::gpu::batch_norm::{NormGrads, NormParams};
use crate::gpu::{Array, Element};
use crate::nn::device_params::{DeviceParams, Group, Order};
use crate::nn::engine::program::{Norm, Program, Step, ViewId};
use crate::nn::layers::BatchNorm;

/// Returns the layouts of the weights of a program whose values have `shapes`; the shapes of `weights` are those of the
/// checkpoint.
pub(super) fn orders(
    program: &Program,
    shapes: &[[usize; 4]],
    weights: &BTreeMap<String, Vec<usize>>,
    element: Element,
) -> BTreeMap<String, Order> {
    let mut orders = BTreeMap::new();
    for step in &program.steps {
        let shape = |view: ViewId| shapes[program.views[view].value];
        let (path, order) = match step {
            Step::Conv { x, path, config } if config.groups > 1 => {
                let c = shape(*x)[3];
                (path, Order::Grouped { c, m: c / config.groups })
            }
            Step::Conv { x, path, .. } => {
                let c = shape(*x)[3];
                let pixels = weights[&format!("{path}.weight")][2..].iter().product();
                (path, Order::ChannelsLast { c, pixels, padded: c.next_multiple_of(element.per_access()) })
            }
            Step::Linear { x, path, .. } => {
                let [_, h, w, c] = shape(*x);
                (path, Order::ChannelsLast { c, pixels: h * w, padded: c })
            }
            Step::Add { .. } | Step::Write { .. } => continue,
        };
        orders.insert(format!("{path}.weight"), order);
    }
    orders
}

impl DeviceParams<GpuBackend> {
    /// A parameter or running statistic, f32.
    pub fn array(&self, path: &str, name: &str) -> Result<Array> {
        let place = self.place(path, name)?;
        Ok(self.values(place.group).wide.part(place.range.start, place.range.len()))
    }

    /// Weight of a layer in the type of the products.
    pub fn weight(&self, path: &str) -> Result<Array> {
        let place = self.place(path, "weight")?;
        let values = self.values(place.group);
        Ok(values.short.as_ref().unwrap_or(&values.wide).part(place.range.start, place.range.len()))
    }

    /// Output array for the gradient of a parameter, f32.
    pub fn grad(&self, path: &str, name: &str) -> Result<Array> {
        let place = self.place(path, name)?;
        match place.group {
            // A scratch buffer: nothing reads it.
            Group::Fixed => self.backend().device.array(Element::F32, place.range.len()),
            Group::Trained => Ok(self.grads().part(place.range.start, place.range.len())),
        }
    }

    pub(super) fn norm(&self, Norm { bn, prelu }: &Norm) -> Result<NormParams> {
        Ok(NormParams {
            weight: self.array(bn, "weight")?,
            bias: self.array(bn, "bias")?,
            slopes: prelu.as_ref().map(|prelu| self.array(prelu, "weight")).transpose()?,
            running_mean: self.array(bn, "running_mean")?,
            running_var: self.array(bn, "running_var")?,
            eps: BatchNorm::EPS as f32,
            momentum: BatchNorm::MOMENTUM as f32,
        })
    }

    /// Calls `f` with the output arrays for the gradients of a norm's parameters.
    pub(super) fn with_norm_grads<R>(
        &self,
        Norm { bn, prelu }: &Norm,
        f: impl FnOnce(&NormGrads) -> Result<R>,
    ) -> Result<R> {
        let (weight, bias) = (self.grad(bn, "weight")?, self.grad(bn, "bias")?);
        let slopes = prelu.as_ref().map(|prelu| self.grad(prelu, "weight")).transpose()?;
        f(&NormGrads { weight: &weight, bias: &bias, slopes: slopes.as_ref() })
    }
}
