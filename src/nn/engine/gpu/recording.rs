//! The backward pass of a network on a GPU.

use candle_core::{Result, bail};

use super::network::{Forward, Network, Statistics};
use crate::gpu::GpuBackend;
use crate::gpu::batch_norm::{self, Seen};
use crate::gpu::{Array, Element, Product, rows};
use crate::nn::device_params::DeviceParams;
use crate::nn::engine::program::{Step, ViewId};

/// Activations of a forward pass, for its backward pass.
pub(crate) struct Recording<'a> {
    network: &'a Network,
    forward: Forward,
}

impl<'a> Recording<'a> {
    pub(super) fn new(network: &'a Network, forward: Forward) -> Self {
        Self { network, forward }
    }

    /// Writes the gradients of all parameters from that of the embeddings, `(n, d)`, f32.
    ///
    /// # Errors
    /// When the gradient's size is not that of the embeddings.
    pub fn backward(mut self, params: &DeviceParams<GpuBackend>, grad: &Array) -> Result<()> {
        let network = self.network;
        let (program, schedule) = (&network.program, &network.schedule);
        let output = self.forward.value(program, program.output)?;
        if grad.len() != output.len() || grad.element() != Element::F32 {
            bail!("backward: a gradient of {} {:?} for {} embeddings", grad.len(), grad.element(), output.len());
        }
        // By view. A sum passes the same array on to both of its inputs, so arrays in here are never written to.
        let mut grads: Vec<Option<Array>> = vec![None; program.views.len()];
        grads[program.output] = Some(rows::in_type(grad, output.element())?);
        for (i, step) in program.steps.iter().enumerate().rev() {
            let gy = self.through_norm(i + 1, params, &mut grads)?;
            if !schedule.values[i + 1] {
                // Nothing that the value was computed from is trained.
                continue;
            }
            let Some(gy) = gy else { bail!("backward: no gradient reaches step {i}") };
            for again in schedule.again.get(&(i + 1)).into_iter().flat_map(Clone::clone) {
                network.step(again, params, &mut self.forward, Statistics::Running, None)?;
            }
            match step {
                Step::Conv { x, path, .. } => {
                    let conv = network.conv(i, self.forward.n)?;
                    if params.trains(&format!("{path}.weight")) {
                        let seen = network.materialise(&self.forward, *x)?;
                        conv.grad_w(&seen, &gy, &params.grad(path, "weight")?)?;
                    }
                    if schedule.views[*x] {
                        let [h, w, c] = network.shapes[program.views[*x].value];
                        let gx = network.device.array(network.element, self.forward.n * h * w * c)?;
                        conv.grad_x(&gy, &params.weight(path)?, &gx)?;
                        self.hand_on(*x, gx, &mut grads)?;
                    }
                }
                Step::Add { a, b } => {
                    self.hand_on(*a, gy.clone(), &mut grads)?;
                    self.hand_on(*b, gy, &mut grads)?;
                }
                Step::Write { x } => self.hand_on(*x, gy, &mut grads)?,
                Step::Linear { x, path, has_bias } => {
                    let gx = self.linear(i, params, (path, *has_bias), &gy)?;
                    self.hand_on(*x, gx, &mut grads)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the gradient of a value before its norm: what reached it directly plus what reached it through the norm.
    /// The value itself is dropped.
    fn through_norm(
        &mut self,
        value: usize,
        params: &DeviceParams<GpuBackend>,
        grads: &mut [Option<Array>],
    ) -> Result<Option<Array>> {
        let program = &self.network.program;
        let direct = program.raw_of(value).and_then(|view| grads[view].take());
        let normed = program.norm_of(value).and_then(|view| Some((view, grads[view].take()?)));
        let x = self.forward.values[value].take();
        let Some((view, gy)) = normed else { return Ok(direct) };
        let Some(x) = x else { bail!("backward: value {value} is not kept") };
        let (Some(norm), Some(prepared)) = (&program.views[view].norm, &self.forward.norms[view]) else {
            bail!("backward: view {view} has no norm");
        };
        params.with_norm_grads(norm, |of_params| {
            // The gradient overwrites the value.
            prepared.backward(&x, &gy, direct.as_ref(), of_params, &x)
        })?;
        Ok(Some(x))
    }

    /// Adds a gradient to that of a view.
    fn hand_on(&self, view: ViewId, gy: Array, grads: &mut [Option<Array>]) -> Result<()> {
        if !self.network.schedule.views[view] {
            return Ok(());
        }
        let value = self.network.program.views[view].value;
        let gy = rows::in_type(&gy, self.forward.elements[value])?;
        grads[view] = Some(match grads[view].take() {
            None => gy,
            Some(old) => {
                let sum = self.network.device.array(gy.element(), gy.len())?;
                let seen = |x| Seen { x, norm: None };
                batch_norm::apply(seen(&old), Some(seen(&gy)), self.network.shapes[value][2], &sum)?;
                sum
            }
        });
        Ok(())
    }

    /// Writes the gradients of a fully connected layer; returns that of its input.
    fn linear(
        &mut self,
        i: usize,
        params: &DeviceParams<GpuBackend>,
        (path, has_bias): (&str, bool),
        gy: &Array,
    ) -> Result<Array> {
        let network = self.network;
        let Some((flat, mask)) = self.forward.flat[i].take() else { bail!("backward: step {i} was not recorded") };
        let n = self.forward.n;
        let (inputs, outputs) = (flat.len() / n, gy.len() / n);
        if has_bias {
            rows::sum(gy, &params.grad(path, "bias")?)?;
        }
        let gy = rows::in_type(gy, network.element)?;
        let (weight, of_weight) = (params.weight(path)?, params.grad(path, "weight")?);
        network.device.gpu().multiply(&Product {
            m: outputs,
            n: inputs,
            k: n,
            a: gy.matrix(outputs).transposed(),
            b: flat.matrix(inputs),
            c: of_weight.matrix(inputs),
            alpha: 1.0,
            beta: 0.0,
        })?;
        let gx = network.device.array(network.element, n * inputs)?;
        network.device.gpu().multiply(&Product {
            m: n,
            n: inputs,
            k: outputs,
            a: gy.matrix(outputs),
            b: weight.matrix(inputs),
            c: gx.matrix(inputs),
            alpha: 1.0,
            beta: 0.0,
        })?;
        if let Some(mask) = mask {
            rows::multiply(&gx, &mask, &gx)?;
        }
        Ok(gx)
    }
}
