//! The backward pass of a network on a GPU.

use candle_core::{Result, bail};

use super::network::{Forward, Network, Value};
use crate::gpu::batch_norm::{self, Seen};
use crate::gpu::{Array, Element, Product, rows};
use crate::nn::engine::program::{Step, ViewId};

/// The activations of a forward pass.
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
    pub fn backward(mut self, grad: &Array) -> Result<()> {
        let network = self.network;
        let program = &network.program;
        let output = &self.forward.value(program, program.output)?.data;
        if grad.len() != output.len() || grad.element() != Element::F32 {
            bail!("backward: a gradient of {} {:?} for {} embeddings", grad.len(), grad.element(), output.len());
        }
        // By view. A sum hands the same array on to both sides: none is written to once it is here.
        let mut grads: Vec<Option<Array>> = vec![None; program.views.len()];
        grads[program.output] = Some(self.in_type_of(grad, output.element())?);
        for (i, step) in program.steps.iter().enumerate().rev() {
            let Some(gy) = self.through_norm(i + 1, &mut grads)? else {
                bail!("backward: no gradient reaches step {i}");
            };
            match step {
                Step::Conv { x, path, .. } => {
                    let n = self.forward.value(program, *x)?.shape[0];
                    let conv = network.conv(i, n)?;
                    let seen = network.materialise(&self.forward, *x)?;
                    conv.grad_w(&seen, &gy, &network.params.grad(path, "weight")?)?;
                    if program.views[*x].value > 0 {
                        let gx = network.device.array(network.element, seen.len())?;
                        conv.grad_x(&gy, &network.params.weight(path)?, &gx)?;
                        self.hand_on(*x, gx, &mut grads)?;
                    }
                }
                Step::Add { a, b } => {
                    self.hand_on(*a, gy.clone(), &mut grads)?;
                    self.hand_on(*b, gy, &mut grads)?;
                }
                Step::Write { x } => self.hand_on(*x, gy, &mut grads)?,
                Step::Linear { x, path, has_bias } => {
                    let gx = self.linear(i, (*x, path, *has_bias), &gy)?;
                    self.hand_on(*x, gx, &mut grads)?;
                }
            }
        }
        Ok(())
    }

    fn in_type_of(&self, x: &Array, element: Element) -> Result<Array> {
        if x.element() == element {
            return Ok(x.clone());
        }
        let y = self.network.device.array(element, x.len())?;
        rows::convert(x, &y)?;
        Ok(y)
    }

    /// The gradient of a value as it is: what reached it directly, and through its norm. The value is given up.
    fn through_norm(&mut self, value: usize, grads: &mut [Option<Array>]) -> Result<Option<Array>> {
        let program = &self.network.program;
        let direct = program.raw_of(value).and_then(|view| grads[view].take());
        let normed = program.norm_of(value).and_then(|view| Some((view, grads[view].take()?)));
        let Some(Value { data: x, .. }) = self.forward.values[value].take() else { return Ok(direct) };
        let Some((view, gy)) = normed else { return Ok(direct) };
        let (Some(norm), Some(prepared)) = (&program.views[view].norm, &self.forward.norms[view]) else {
            bail!("backward: view {view} has no norm");
        };
        self.network.params.with_norm_grads(norm, |of_params| {
            // Where the value was.
            prepared.backward(&x, &gy, direct.as_ref(), of_params, &x)
        })?;
        Ok(Some(x))
    }

    /// Adds a gradient to that of a view.
    fn hand_on(&self, view: ViewId, gy: Array, grads: &mut [Option<Array>]) -> Result<()> {
        if self.network.program.views[view].value == 0 {
            return Ok(());
        }
        let value = self.forward.value(&self.network.program, view)?;
        let gy = self.in_type_of(&gy, value.data.element())?;
        grads[view] = Some(match grads[view].take() {
            None => gy,
            Some(old) => {
                let sum = self.network.device.array(gy.element(), gy.len())?;
                let seen = |x| Seen { x, norm: None };
                batch_norm::apply(seen(&old), Some(seen(&gy)), value.shape[3], &sum)?;
                sum
            }
        });
        Ok(())
    }

    /// Writes the gradients of a fully connected layer; returns that of its input.
    fn linear(&mut self, i: usize, (x, path, has_bias): (ViewId, &str, bool), gy: &Array) -> Result<Array> {
        let network = self.network;
        let Some((flat, mask)) = self.forward.flat[i].take() else { bail!("backward: step {i} was not recorded") };
        let n = self.forward.value(&network.program, x)?.shape[0];
        let (inputs, outputs) = (flat.len() / n, gy.len() / n);
        if has_bias {
            rows::sum(gy, &network.params.grad(path, "bias")?)?;
        }
        let gy = self.in_type_of(gy, network.element)?;
        let (weight, of_weight) = (network.params.weight(path)?, network.params.grad(path, "weight")?);
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
