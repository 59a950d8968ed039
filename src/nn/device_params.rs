//! Parameters of a network or another trained component in a device's memory: contiguous, so that an update is one
//! pass, and in the layouts that the device's kernels read.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::params::Parts;
use crate::ops::backend::{Backend, Update};
use crate::ops::cpu::Cpu;
use crate::ops::slice;

/// Alignment of each parameter, in elements: at least 16 bytes in every type.
const ALIGNMENT: usize = 16;

/// Layout of a parameter on the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Order {
    /// Same layout as in the checkpoint.
    #[default]
    Same,
    /// From `(co, c, pixels)` to `(co, pixels, padded)`: filters, and fully connected layers that read an image.
    /// Channels from `c` on are zeros, whose gradient is zero.
    ChannelsLast { c: usize, pixels: usize, padded: usize },
    /// From `(c, m, pixels)` to `(pixels, m, c)`: filters for groups of `m` channels.
    #[cfg_attr(not(any(test, feature = "cuda")), expect(dead_code, reason = "the GPU's"))]
    Grouped { c: usize, m: usize },
}

impl Order {
    /// From `(rows, columns)` to `(columns, rows)`.
    pub fn transposed(rows: usize, columns: usize) -> Self {
        Self::ChannelsLast { c: rows, pixels: columns, padded: rows }
    }

    /// Number of elements on the device of `len` in the checkpoint.
    fn len(&self, len: usize) -> usize {
        match *self {
            Self::ChannelsLast { c, padded, .. } => len / c * padded,
            Self::Same | Self::Grouped { .. } => len,
        }
    }

    /// Source index of each element of the device's layout; none for padding zeros.
    fn sources(&self, len: usize) -> Box<dyn Iterator<Item = Option<usize>>> {
        match *self {
            Self::Same => Box::new((0..len).map(Some)),
            Self::ChannelsLast { c, pixels, padded } => Box::new((0..self.len(len)).map(move |i| {
                let (o, pixel, channel) = (i / (pixels * padded), i / padded % pixels, i % padded);
                (channel < c).then_some((o * c + channel) * pixels + pixel)
            })),
            Self::Grouped { c, m } => {
                let pixels = len / c / m;
                Box::new((0..len).map(move |i| Some((i % c * m + i / c % m) * pixels + i / c / m)))
            }
        }
    }

    fn laid_out(&self, values: &[f32], to: &mut Vec<f32>) {
        match self {
            Self::Same => to.extend_from_slice(values),
            _ => to.extend(self.sources(values.len()).map(|from| from.map_or(0.0, |from| values[from]))),
        }
    }

    fn restored(&self, values: &[f32], len: usize) -> Vec<f32> {
        if *self == Self::Same {
            return values.to_vec();
        }
        let mut all = vec![0.0; len];
        for (value, to) in values.iter().zip(self.sources(len)) {
            if let Some(to) = to {
                all[to] = *value;
            }
        }
        all
    }
}

/// Place of a parameter in its group's arrays.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub group: Group,
    /// Without the padding before the next parameter.
    pub range: Range<usize>,
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
pub(crate) struct Values<B: Backend> {
    pub wide: B::Array,
    pub short: Option<B::Array>,
}

/// Parameters with their gradients, and buffers.
#[derive(Debug)]
pub(crate) struct DeviceParams<B: Backend> {
    backend: B,
    places: BTreeMap<String, Place>,
    trained: Values<B>,
    fixed: Values<B>,
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
    values: Vec<f32>,
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
            let num = sets.iter().flat_map(BTreeMap::values).map(|t| t.elem_count().next_multiple_of(ALIGNMENT)).sum();
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
                places.insert(name, Place { group, range: start..all.len(), order, shape });
                all.resize(all.len().next_multiple_of(ALIGNMENT), 0.0);
            }
            lens[group as usize] = all.len();
            Ok(all)
        };
        let of_trained = laid_out(Group::Trained, vec![trained])?;
        let names: BTreeSet<String> = buffers.keys().cloned().collect();
        let of_fixed = laid_out(Group::Fixed, vec![fixed, buffers])?;
        let in_fixed = places.iter().filter(|(name, _)| names.contains(*name)).map(|(_, place)| place.range.start);
        let buffers = in_fixed.min().unwrap_or(lens[1])..lens[1];
        let values = |all: Vec<f32>| -> Result<Values<B>> {
            let wide = backend.upload(all)?;
            Ok(Values { short: backend.short(&wide)?, wide })
        };
        let (trained, fixed) = (values(of_trained)?, values(of_fixed)?);
        let (backend, grads) = (backend.clone(), backend.zeros(lens[0])?);
        Ok(Self { backend, places, trained, fixed, grads, lens, buffers, counters, frozen_statistics })
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Whether anything is trained.
    #[cfg_attr(not(any(test, feature = "cuda")), expect(dead_code, reason = "the GPU's"))]
    pub fn is_trained(&self) -> bool {
        self.lens[Group::Trained as usize] > 0
    }

    /// Number of elements on the device.
    pub fn len(&self, group: Group) -> usize {
        self.lens[group as usize]
    }

    /// Values of a group in the device's layout.
    pub fn values(&self, group: Group) -> &Values<B> {
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

    /// The trained parameters, and their gradients to write.
    pub fn values_and_grads(&mut self) -> (&B::Array, &mut B::Array) {
        (&self.trained.wide, &mut self.grads)
    }

    /// What an update by `guard` changes.
    pub fn update<'a>(&'a mut self, guard: &'a B::Guard, is_clipped: bool) -> Update<'a, B> {
        let Values { wide, short } = &mut self.trained;
        Update { values: wide, short: short.as_mut(), grads: &self.grads, guard, is_clipped }
    }

    /// Measures the gradients for an update.
    pub fn measure(&self, guard: &mut B::Guard, max_norm: f64, losses: &[(f64, &B::Scalar)]) -> Result<()> {
        let places: Vec<_> = self.of_group(Group::Trained).map(|(_, place)| place.range.clone()).collect();
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
        let get = |name: &str| state.get(name).ok_or_else(|| candle_core::Error::msg(format!("no {name}")));
        let expected = self.places.len() + self.counters.len();
        if state.len() != expected {
            bail!("expected {expected} parameters and buffers, found {}", state.len());
        }
        let counters = self.counters.keys().map(|name| Ok((name.clone(), get(name)?.to_scalar::<i64>()?)));
        let counters = counters.collect::<Result<_>>()?;
        let [trained, fixed] = Group::BOTH.map(|group| self.laid_out(group, |name| get(name).cloned()));
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
        let restored = self.of_group(group).map(|(name, Place { range, order, shape, .. })| {
            let values = order.restored(&values[range.clone()], shape.iter().product());
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
        places.sort_by_key(|(_, place)| place.range.start);
        for (name, Place { order, shape, .. }) in places {
            let tensor = get(name)?;
            if tensor.elem_count() != shape.iter().product::<usize>() {
                bail!("{name}: expected {shape:?}, found {:?}", tensor.shape());
            }
            order.laid_out(&tensor.flatten_all()?.to_vec1::<f32>()?, &mut all);
            all.resize(all.len().next_multiple_of(ALIGNMENT), 0.0);
        }
        Ok(all)
    }

    /// Names of the trained parameters whose gradient is zero everywhere: they do not learn. Waits for the device.
    pub fn without_gradient(&self) -> Result<Vec<String>> {
        let grads = self.backend.read(&self.grads)?;
        let is_zero = |place: &Place| grads[place.range.clone()].iter().all(|g| *g == 0.0);
        let zeros = self.of_group(Group::Trained).filter(|(_, place)| is_zero(place));
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

    /// Counts a batch in every batch norm whose statistics are not frozen.
    pub fn count_batch(&mut self) {
        let is_frozen =
            |name: &str| name.rsplit_once('.').is_some_and(|(norm, _)| self.frozen_statistics.contains(norm));
        self.counters.iter_mut().filter(|(name, _)| !is_frozen(name)).for_each(|(_, num)| *num += 1);
    }

    /// Whether the batch norm under `path` has frozen running statistics.
    pub fn has_frozen_statistics(&self, path: &str) -> bool {
        self.frozen_statistics.contains(path)
    }

    /// Whether the parameter `name` is trained.
    #[cfg_attr(not(any(test, feature = "cuda")), expect(dead_code, reason = "the GPU's"))]
    pub fn trains(&self, name: &str) -> bool {
        self.places.get(name).is_some_and(|place| place.group == Group::Trained)
    }

    fn of_group(&self, group: Group) -> impl Iterator<Item = (&String, &Place)> {
        self.places.iter().filter(move |(_, place)| place.group == group)
    }

    /// Place of a parameter or buffer.
    pub fn place(&self, path: &str, name: &str) -> Result<&Place> {
        let name = format!("{path}.{name}");
        self.places.get(&name).ok_or_else(|| candle_core::Error::msg(format!("no parameter {name}")))
    }
}

impl DeviceParams<Cpu> {
    /// Elements of a parameter or buffer.
    pub fn value(&self, path: &str, name: &str) -> Result<&[f32]> {
        let place = self.place(path, name)?;
        Ok(&self.values(place.group).wide[place.range.clone()])
    }

    /// Elements of a buffer, to change.
    pub fn buffer_mut(&mut self, path: &str, name: &str) -> Result<&mut [f32]> {
        let Place { group, range, .. } = self.place(path, name)?.clone();
        match group {
            Group::Fixed => Ok(&mut self.fixed.wide[range]),
            Group::Trained => bail!("{path}.{name} is no buffer"),
        }
    }

    /// Lets `write` write the gradient of a parameter, if it is trained.
    pub fn write_grad(&mut self, path: &str, name: &str, write: impl FnOnce(&mut [f32])) -> Result<()> {
        let Place { group, range, .. } = self.place(path, name)?.clone();
        if group == Group::Trained {
            write(&mut self.grads[range]);
        }
        Ok(())
    }
}
