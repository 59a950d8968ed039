//! Gradients of all trained parameters, from candle's backward pass or the fused engine's.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, bail};

use super::params::Params;
use super::pool::Pool;
use crate::ops::slice::Values;
use crate::ops::update::each_pair;

/// Gradient of each trained parameter, in name order; f32.
#[derive(Debug)]
pub struct Gradients {
    parts: BTreeMap<String, Part>,
    /// Memory of the slices.
    flat: Vec<f32>,
    pool: Option<Arc<Pool>>,
}

#[derive(Clone, Debug)]
enum Part {
    Slice(Range<usize>),
    Tensor(Tensor),
}

impl Gradients {
    /// Returns the gradients that candle's backward pass computed for the trained parameters of `params`.
    ///
    /// # Errors
    /// When parameters received no gradient: one error that names the first 20 of them. A silently skipped parameter
    /// would never train.
    pub fn of(params: &Params, store: &GradStore) -> Result<Self> {
        let missing: Vec<_> = params.trainable().filter(|(_, var)| store.get(var).is_none()).map(|(n, _)| n).collect();
        if !missing.is_empty() {
            let shown = missing.iter().take(20).copied().collect::<Vec<_>>().join(", ");
            bail!("{} trainable parameters received no gradient: {shown}", missing.len());
        }
        let part = |(name, grad): (&str, &Tensor)| Ok((name.to_owned(), Part::Tensor(grad.contiguous()?)));
        let grads = params.trainable().filter_map(|(name, var)| Some((name, store.get(var)?)));
        Ok(Self { parts: grads.map(part).collect::<Result<_>>()?, flat: Vec::new(), pool: None })
    }

    /// Returns gradients of unspecified value for the trained parameters of `params`, in memory that `pool` gets back.
    pub(crate) fn flat(params: &Params, pool: &Arc<Pool>) -> Self {
        let (mut parts, mut len) = (BTreeMap::new(), 0);
        for (name, var) in params.trainable() {
            parts.insert(name.to_owned(), Part::Slice(len..len + var.elem_count()));
            len += var.elem_count();
        }
        Self { parts, flat: pool.take(len), pool: Some(pool.clone()) }
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.keys().map(String::as_str)
    }

    /// Calls `f` with the elements of a parameter's gradient, in the parameter's order.
    ///
    /// # Errors
    /// When there is no such gradient, or it is not f32 on the CPU.
    pub fn read<R>(&self, name: &str, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
        match self.parts.get(name) {
            Some(Part::Slice(place)) => Ok(f(&self.flat[place.clone()])),
            Some(Part::Tensor(grad)) => Ok(f(&Values::of(name, grad)?)),
            None => bail!("no gradient of {name}"),
        }
    }

    /// Adds `other`, gradients of the same parameters.
    ///
    /// # Errors
    /// When `other` has other parameters; then nothing is changed.
    pub fn add(&mut self, other: &Self) -> Result<()> {
        let len = |part: &Part| match part {
            Part::Slice(place) => place.len(),
            Part::Tensor(grad) => grad.elem_count(),
        };
        if !self.parts.iter().map(|(name, part)| (name, len(part))).eq(other.parts.iter().map(|(n, p)| (n, len(p)))) {
            bail!("gradients of different parameters: {} and {} of them", self.parts.len(), other.parts.len());
        }
        for (name, part) in &mut self.parts {
            match part {
                Part::Slice(place) => {
                    other.read(name, |from| each_pair(&mut self.flat[place.clone()], from, |to, from| *to += from))?
                }
                Part::Tensor(grad) => {
                    let from = other.read(name, |from| Tensor::from_slice(from, grad.shape(), grad.device()))??;
                    *grad = (&*grad + from)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the names of the parameters whose gradient is zero everywhere: they do not learn.
    ///
    /// # Errors
    /// When a gradient cannot be read.
    pub fn zeros(&self) -> Result<Vec<String>> {
        let mut zeros = Vec::new();
        for name in self.names() {
            if self.read(name, |grad| grad.iter().all(|g| *g == 0.0))? {
                zeros.push(name.to_owned());
            }
        }
        Ok(zeros)
    }

    /// Lets `f` write the gradient of a parameter and returns its result; `None` if the parameter is not trained.
    pub(crate) fn write<R>(&mut self, name: &str, f: impl FnOnce(&mut [f32]) -> R) -> Option<R> {
        match self.parts.get(name) {
            Some(Part::Slice(place)) => Some(f(&mut self.flat[place.clone()])),
            _ => None,
        }
    }
}

impl Drop for Gradients {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.give(std::mem::take(&mut self.flat));
        }
    }
}
