//! Parameters of a network or another trained component in a device's memory: contiguous, so that an update is one
//! pass, and in the layouts that the device's kernels read.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};

use super::params::{Parts, misfit, param_name, problem};
use crate::dist::{Collective, Ranks};
use crate::ops::backend::{Backend, Grads, NormParams, Order, Part, Place, Update};
use crate::ops::slice;

/// A parameter or buffer in its group's arrays.
#[derive(Clone, Debug)]
struct Named {
    /// Without the padding before the next one.
    place: Place,
    order: Order,
    /// Shape in the checkpoint.
    shape: Vec<usize>,
}

/// A group of contiguous parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// Trained parameters.
    Trained,
    /// Given and frozen parameters, then buffers such as running statistics.
    Fixed,
}

impl Group {
    pub const BOTH: [Self; 2] = [Self::Trained, Self::Fixed];
}

/// Values of a group, f32, and their copy in the type of the products, unless that is f32.
#[derive(Debug)]
pub(crate) struct GroupValues<B: Backend> {
    pub wide: B::Array,
    pub short: Option<B::Array>,
}

/// Parameters with their gradients, and buffers.
#[derive(Debug)]
pub(crate) struct DeviceParams<B: Backend> {
    backend: B,
    places: BTreeMap<String, Named>,
    trained: GroupValues<B>,
    fixed: GroupValues<B>,
    /// Gradients of [`Group::Trained`].
    grads: B::Array,
    /// Lengths of the groups' arrays.
    lens: [usize; 2],
    /// Buffers in [`Group::Fixed`].
    buffers: Range<usize>,
    /// Batches counted by each batch norm.
    counters: BTreeMap<String, i64>,
    /// Batch norms whose statistics are frozen.
    frozen_statistics: BTreeSet<String>,
}

/// Values that a step changes apart from parameters.
pub(crate) struct Buffers {
    /// Running statistics, in the device's layout.
    pub values: Vec<f32>,
    counters: BTreeMap<String, i64>,
}

impl<B: Backend> DeviceParams<B> {
    /// Copies a component's parameters to the device; parameters that are not in `orders` keep their layout. They are
    /// freed one by one if nothing else holds them.
    ///
    /// # Errors
    /// When a parameter is not f32, or the device has no memory for them.
    pub fn new(backend: &B, parts: Parts, mut orders: BTreeMap<String, Order>) -> Result<Self> {
        let Parts { trained, fixed, buffers, frozen_statistics } = parts;
        let (mut places, mut lens, mut counters) = (BTreeMap::new(), [0, 0], BTreeMap::new());
        let mut laid_out = |group: Group, sets: Vec<BTreeMap<String, Tensor>>| -> Result<Vec<f32>> {
            let num =
                sets.iter().flat_map(BTreeMap::values).map(|t| t.elem_count().next_multiple_of(B::ALIGNMENT)).sum();
            let mut all = Vec::with_capacity(num);
            for (name, tensor) in sets.into_iter().flatten() {
                if tensor.dtype() == DType::I64 {
                    counters.insert(name, tensor.to_scalar()?);
                    continue;
                }
                let order = orders.remove(&name).unwrap_or_default();
                let (start, contiguous) = (all.len(), tensor.contiguous()?);
                order.laid_out(&slice::Values::of(&name, &contiguous)?, &mut all);
                let shape = tensor.dims().to_vec();
                let place = Place { is_fixed: group == Group::Fixed, range: start..all.len() };
                places.insert(name, Named { place, order, shape });
                all.resize(all.len().next_multiple_of(B::ALIGNMENT), 0.0);
            }
            lens[group as usize] = all.len();
            Ok(all)
        };
        let of_trained = laid_out(Group::Trained, vec![trained])?;
        let names: BTreeSet<String> = buffers.keys().cloned().collect();
        let of_fixed = laid_out(Group::Fixed, vec![fixed, buffers])?;
        let in_fixed =
            places.iter().filter(|(name, _)| names.contains(*name)).map(|(_, named)| named.place.range.start);
        let buffers = in_fixed.min().unwrap_or(lens[1])..lens[1];
        let values = |all: Vec<f32>| -> Result<GroupValues<B>> {
            let wide = backend.upload(all)?;
            Ok(GroupValues { short: backend.short(&wide)?, wide })
        };
        let (trained, fixed) = (values(of_trained)?, values(of_fixed)?);
        let (backend, grads) = (backend.clone(), backend.zeros(lens[0])?);
        Ok(Self { backend, places, trained, fixed, grads, lens, buffers, counters, frozen_statistics })
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Number of elements on the device.
    pub fn len(&self, group: Group) -> usize {
        self.lens[group as usize]
    }

    /// Values of a group in the device's layout.
    pub fn values(&self, group: Group) -> &GroupValues<B> {
        match group {
            Group::Trained => &self.trained,
            Group::Fixed => &self.fixed,
        }
    }

    /// Gradients of the trained parameters in the device's layout.
    pub fn grads(&self) -> &B::Array {
        &self.grads
    }

    /// Gradients of the trained parameters, to change.
    pub fn grads_mut(&mut self) -> &mut B::Array {
        &mut self.grads
    }

    /// Frees the gradients of parameters that are updated otherwise.
    pub fn drop_grads(&mut self) -> Result<()> {
        self.grads = self.backend.zeros(0)?;
        Ok(())
    }

    /// The trained parameters, and their gradients to write.
    pub fn values_and_grads(&mut self) -> (&B::Array, &mut B::Array) {
        (&self.trained.wide, &mut self.grads)
    }

    /// The trained parameters, to change otherwise than by an update. Their copy in the type of the products is not
    /// renewed.
    pub fn values_mut(&mut self) -> &mut B::Array {
        &mut self.trained.wide
    }

    /// What an update by `guard` changes.
    pub fn update<'a>(&'a mut self, guard: &'a B::Guard, is_clipped: bool) -> Update<'a, B> {
        let GroupValues { wide, short } = &mut self.trained;
        Update { values: wide, short: short.as_mut(), grads: &self.grads, guard, is_clipped }
    }

    /// Measures the gradients for an update.
    pub fn measure(&self, guard: &mut B::Guard, max_norm: f64, losses: &[(f64, &B::Scalar)]) -> Result<()> {
        let places: Vec<_> = self.ranges_of_grads().collect();
        self.backend.measure(guard, &self.grads, &places, max_norm, losses)
    }

    /// Returns all parameters, buffers and counters by name, as in a checkpoint; waits for the device.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = self.named(&self.trained.wide, Group::Trained)?;
        state.extend(self.named(&self.fixed.wide, Group::Fixed)?);
        for (name, num) in &self.counters {
            state.insert(name.clone(), Tensor::new(*num, &Device::Cpu)?);
        }
        Ok(state)
    }

    /// Loads the [`Self::state`] of the same parameters on any device, all or nothing.
    ///
    /// # Errors
    /// When a tensor is missing, unexpected or of another shape.
    pub fn load(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut problems = Vec::new();
        for (name, Named { shape, .. }) in &self.places {
            problems.extend(problem(name, state.get(name), &Shape::from(shape.as_slice()), DType::F32));
        }
        for name in self.counters.keys() {
            problems.extend(problem(name, state.get(name), &Shape::from(()), DType::I64));
        }
        let is_known = |name: &&String| self.places.contains_key(*name) || self.counters.contains_key(*name);
        problems.extend(state.keys().filter(|name| !is_known(name)).map(|name| format!("unexpected {name}")));
        misfit(&problems)?;
        let get = |name: &str| state[name].to_dtype(DType::F32);
        let counters =
            self.counters.keys().map(|name| Ok((name.clone(), state[name].to_dtype(DType::I64)?.to_scalar::<i64>()?)));
        let counters = counters.collect::<Result<_>>()?;
        let [trained, fixed] = Group::BOTH.map(|group| self.laid_out(group, get));
        let (trained, fixed) = (trained?, fixed?);
        self.counters = counters;
        for (values, new) in [(&mut self.trained, trained), (&mut self.fixed, fixed)] {
            self.backend.write(&mut values.wide, &new)?;
            values.short = self.backend.short(&values.wide)?;
        }
        Ok(())
    }

    /// Splits an array in the device's layout of a group into tensors by name, in the checkpoint's layout and shapes;
    /// waits for the device.
    pub fn named(&self, from: &B::Array, group: Group) -> Result<BTreeMap<String, Tensor>> {
        let values = self.backend.read(from)?;
        let restored = self.of_group(group).map(|(name, Named { place, order, shape })| {
            let values = order.restored(&values[place.range.clone()], shape.iter().product());
            Ok((name.clone(), Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?))
        });
        restored.collect()
    }

    /// Inverse of [`Self::named`]: returns the tensors that `get` returns for each name, in the device's layout.
    ///
    /// # Errors
    /// When a tensor has another number of elements.
    pub fn laid_out(&self, group: Group, mut get: impl FnMut(&str) -> Result<Tensor>) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(self.len(group));
        let mut places: Vec<_> = self.of_group(group).collect();
        places.sort_by_key(|(_, named)| named.place.range.start);
        for (name, Named { order, shape, .. }) in places {
            let tensor = get(name)?;
            // Averages are saved flat.
            let is_flat = tensor.rank() == 1 && tensor.elem_count() == shape.iter().product::<usize>();
            if tensor.dims() != shape && !is_flat {
                bail!("{name}: expected {shape:?}, found {:?}", tensor.dims());
            }
            order.laid_out(&tensor.flatten_all()?.to_vec1::<f32>()?, &mut all);
            all.resize(all.len().next_multiple_of(B::ALIGNMENT), 0.0);
        }
        Ok(all)
    }

    /// Names of the trained parameters whose gradient is zero everywhere: they do not learn. Waits for the device.
    pub fn without_gradient(&self) -> Result<Vec<String>> {
        let grads = self.backend.read(&self.grads)?;
        let is_zero = |named: &Named| grads[named.place.range.clone()].iter().all(|g| *g == 0.0);
        let zeros = self.of_group(Group::Trained).filter(|(_, named)| is_zero(named));
        Ok(zeros.map(|(name, _)| name.clone()).collect())
    }

    /// Returns the buffers as they are, for [`Self::restore_buffers`].
    pub fn buffers(&self) -> Result<Buffers> {
        let values = self.backend.read(&self.fixed.wide)?[self.buffers.clone()].to_vec();
        Ok(Buffers { values, counters: self.counters.clone() })
    }

    /// Undoes a step's changes to the buffers.
    pub fn restore_buffers(&mut self, buffers: Buffers) -> Result<()> {
        let mut all = self.backend.read(&self.fixed.wide)?.into_owned();
        all[self.buffers.clone()].copy_from_slice(&buffers.values);
        self.counters = buffers.counters;
        self.backend.write(&mut self.fixed.wide, &all)
    }

    /// Replaces the buffers by those of the first rank, unless all statistics are frozen.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub fn take_buffers_of_first(&mut self, ranks: &Ranks) -> crate::Result<()> {
        if self.counters.keys().all(|name| is_among(&self.frozen_statistics, name)) {
            return Ok(());
        }
        let own = self.backend.part(&self.fixed.wide, self.buffers.clone())?;
        let of_first = self.backend.collect(&own, Collective::OfFirst, ranks)?;
        Ok(self.backend.set_part(&mut self.fixed.wide, self.buffers.clone(), &of_first)?)
    }

    /// Counts a batch in every batch norm whose statistics are not frozen.
    pub fn count_batch(&mut self) {
        let Self { counters, frozen_statistics, .. } = self;
        counters.iter_mut().filter(|(name, _)| !is_among(frozen_statistics, name)).for_each(|(_, num)| *num += 1);
    }

    /// Whether the batch norm under `path` has frozen running statistics.
    pub fn has_frozen_statistics(&self, path: &str) -> bool {
        self.frozen_statistics.contains(path)
    }

    fn of_group(&self, group: Group) -> impl Iterator<Item = (&String, &Named)> {
        self.places.iter().filter(move |(_, named)| named.place.is_fixed == (group == Group::Fixed))
    }

    /// Place of a parameter or buffer.
    fn place(&self, path: &str, name: &str) -> Result<&Place> {
        let name = param_name(path, name);
        match self.places.get(&name) {
            Some(named) => Ok(&named.place),
            None => bail!("no parameter {name}"),
        }
    }

    fn group_of(&self, place: &Place) -> &GroupValues<B> {
        if place.is_fixed { &self.fixed } else { &self.trained }
    }

    /// A parameter or buffer, f32.
    pub fn part(&self, path: &str, name: &str) -> Result<Part<'_, B>> {
        let place = self.place(path, name)?;
        Ok(Part { array: &self.group_of(place).wide, range: place.range.clone() })
    }

    /// Weight of a layer in the type of the products.
    pub fn weight(&self, path: &str) -> Result<Part<'_, B>> {
        let place = self.place(path, "weight")?;
        let GroupValues { wide, short } = self.group_of(place);
        Ok(Part { array: short.as_ref().unwrap_or(wide), range: place.range.clone() })
    }

    /// Place of the gradient of a parameter, by its name; none if it is not trained.
    pub fn range_of_grad(&self, name: &str) -> Result<Option<Range<usize>>> {
        match self.places.get(name) {
            Some(Named { place, .. }) => Ok((!place.is_fixed).then(|| place.range.clone())),
            None => bail!("no parameter {name}"),
        }
    }

    /// Places of all gradients.
    pub fn ranges_of_grads(&self) -> impl Iterator<Item = Range<usize>> {
        self.of_group(Group::Trained).map(|(_, named)| named.place.range.clone())
    }

    /// Place of the gradient of a parameter; none if it is not trained.
    fn grad(&self, path: &str, name: &str) -> Result<Option<Range<usize>>> {
        self.range_of_grad(&param_name(path, name))
    }

    /// Weight of a layer, and the gradients of weight and bias to write.
    pub fn weight_and_grads(&mut self, path: &str, has_bias: bool) -> Result<(Part<'_, B>, Grads<'_, B>)> {
        let weight = self.grad(path, "weight")?;
        let bias = if has_bias { self.grad(path, "bias")? } else { None };
        let place = self.place(path, "weight")?.clone();
        let GroupValues { wide, short } = if place.is_fixed { &self.fixed } else { &self.trained };
        let part = Part { array: short.as_ref().unwrap_or(wide), range: place.range };
        Ok((part, Grads { array: &mut self.grads, weight, bias, slope: None }))
    }

    /// Parameters and running statistics of batch norm and PReLU.
    pub fn norm(&mut self, bn: &str, prelu: Option<&str>) -> Result<NormParams<'_, B>> {
        let place = |path: &str, name: &str| self.place(path, name).cloned();
        let (weight, bias) = (place(bn, "weight")?, place(bn, "bias")?);
        let slope = prelu.map(|prelu| place(prelu, "weight")).transpose()?;
        let (mean, var) = (place(bn, "running_mean")?.range, place(bn, "running_var")?.range);
        Ok(NormParams { trained: &self.trained.wide, fixed: &mut self.fixed.wide, weight, bias, slope, mean, var })
    }

    /// Gradients of batch norm and PReLU to write.
    pub fn norm_grads(&mut self, bn: &str, prelu: Option<&str>) -> Result<Grads<'_, B>> {
        let (weight, bias) = (self.grad(bn, "weight")?, self.grad(bn, "bias")?);
        let slope = prelu.map(|prelu| self.grad(prelu, "weight")).transpose()?.flatten();
        Ok(Grads { array: &mut self.grads, weight, bias, slope })
    }
}

/// Whether a buffer is of one of these batch norms.
fn is_among(norms: &BTreeSet<String>, buffer: &str) -> bool {
    buffer.rsplit_once('.').is_some_and(|(norm, _)| norms.contains(norm))
}
