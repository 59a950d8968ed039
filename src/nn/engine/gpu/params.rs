//! Parameters of a network in device memory: contiguous, in the layouts that the kernels read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device as Candle, Result, Tensor, bail};

use crate::gpu::batch_norm::{NormGrads, NormParams};
use crate::gpu::update::Flat;
use crate::gpu::{Array, Device, Element, rows};
use crate::nn::engine::program::{Norm, Program, Step, ViewId};
use crate::nn::layers::BatchNorm;
use crate::nn::params::Params;

/// Alignment of each parameter, in elements: at least 16 bytes in every type.
const ALIGNMENT: usize = 8;

/// Layout of a parameter on the device.
#[derive(Clone, Debug, PartialEq)]
enum Order {
    /// Same layout as in the checkpoint.
    Same,
    /// From `(co, c, pixels)` to `(co, pixels, padded)`: filters, and fully connected layers that read an image.
    /// Channels from `c` on are zeros, whose gradient is zero.
    ChannelsLast { c: usize, pixels: usize, padded: usize },
    /// From `(c, m, pixels)` to `(pixels, m, c)`: filters for groups of `m` channels.
    Grouped { c: usize, m: usize },
}

impl Order {
    /// Source index of each element of the device's layout; none for padding zeros.
    fn sources(&self, len: usize) -> Box<dyn Iterator<Item = Option<usize>>> {
        match *self {
            Self::Same => Box::new((0..len).map(Some)),
            Self::ChannelsLast { c, pixels, padded } => {
                let all = len / (c * pixels) * pixels * padded;
                Box::new((0..all).map(move |i| {
                    let (o, pixel, channel) = (i / (pixels * padded), i / padded % pixels, i % padded);
                    (channel < c).then_some((o * c + channel) * pixels + pixel)
                }))
            }
            Self::Grouped { c, m } => {
                let pixels = len / c / m;
                Box::new((0..len).map(move |i| Some((i % c * m + i / c % m) * pixels + i / c / m)))
            }
        }
    }

    fn laid_out(&self, values: &[f32]) -> Vec<f32> {
        self.sources(values.len()).map(|from| from.map_or(0.0, |from| values[from])).collect()
    }

    fn restored(&self, values: &[f32], len: usize) -> Vec<f32> {
        let mut all = vec![0.0; len];
        for (value, to) in values.iter().zip(self.sources(len)) {
            if let Some(to) = to {
                all[to] = *value;
            }
        }
        all
    }
}

#[derive(Clone, Debug)]
struct Place {
    /// Whether the parameter is in [`Group::Fixed`].
    is_fixed: bool,
    start: usize,
    /// Length on the device, without the padding before the next parameter.
    len: usize,
    order: Order,
    /// Shape in the checkpoint.
    shape: Vec<usize>,
}

/// A group of contiguous parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// Trained parameters, or all parameters of a network that is not trained.
    Updated,
    /// Frozen parameters of a network that is trained, and running statistics.
    Fixed,
}

/// Parameters with their gradients, and running statistics.
pub(crate) struct DeviceParams {
    places: BTreeMap<String, Place>,
    /// Parameters of [`Group::Updated`], f32.
    values: Array,
    /// Their gradients, f32; empty if the network is not trained.
    grads: Array,
    /// Copy of `values` in the type of the products, unless that is f32.
    short: Option<Array>,
    /// Parameters and running statistics of [`Group::Fixed`], f32.
    fixed: Array,
    /// Copy of `fixed` in the type of the products, unless that is f32.
    short_fixed: Option<Array>,
    /// Number of batches that entered the running statistics since the last download.
    num_batches: AtomicU64,
    is_trained: bool,
}

impl DeviceParams {
    /// Uploads all parameters of a program, whose values have `shapes`.
    pub(super) fn upload(
        program: &Program,
        shapes: &[[usize; 4]],
        params: &Params,
        device: &Device,
        element: Element,
    ) -> Result<Self> {
        let mut orders: BTreeMap<String, Order> = BTreeMap::new();
        for step in &program.steps {
            let shape = |view: ViewId| shapes[program.views[view].value];
            let (path, order) = match step {
                Step::Conv { x, path, config } if config.groups > 1 => {
                    let c = shape(*x)[3];
                    (path, Order::Grouped { c, m: c / config.groups })
                }
                Step::Conv { x, path, .. } => {
                    let c = shape(*x)[3];
                    let pixels = read(params, &format!("{path}.weight"))?.dims()[2..].iter().product();
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
        let trained: BTreeSet<&str> = params.trainable().map(|(name, _)| name).collect();
        let is_trained = !trained.is_empty();
        let norms = program.views.iter().filter_map(|view| view.norm.as_ref());
        let running = norms.flat_map(|norm| ["running_mean", "running_var"].map(|name| format!("{}.{name}", norm.bn)));
        let (mut places, mut flat, mut fixed) = (BTreeMap::new(), Vec::new(), Vec::new());
        let names: BTreeSet<String> = program.param_names().into_iter().collect();
        for (name, is_running) in names.into_iter().map(|name| (name, false)).chain(running.map(|name| (name, true))) {
            let order = orders.remove(&name).unwrap_or(Order::Same);
            let tensor = read(params, &name)?;
            let values = order.laid_out(&tensor.flatten_all()?.to_vec1::<f32>()?);
            let is_fixed = is_running || (is_trained && !trained.contains(name.as_str()));
            let all = if is_fixed { &mut fixed } else { &mut flat };
            places.insert(
                name,
                Place { is_fixed, start: all.len(), len: values.len(), order, shape: tensor.dims().to_vec() },
            );
            all.extend(values);
            all.resize(all.len().next_multiple_of(ALIGNMENT), 0.0);
        }
        let values = device.upload(&flat)?;
        let shortened = |len| (element != Element::F32).then(|| device.array(element, len)).transpose();
        let (short, short_fixed) = (shortened(flat.len())?, shortened(fixed.len())?);
        let grads = device.zeros(Element::F32, if is_trained { flat.len() } else { 0 })?;
        let fixed = device.upload(&fixed)?;
        for (wide, short) in [(&values, &short), (&fixed, &short_fixed)] {
            if let Some(short) = short {
                rows::convert(wide, short)?;
            }
        }
        Ok(Self { places, values, grads, short, fixed, short_fixed, num_batches: AtomicU64::new(0), is_trained })
    }

    /// Copies parameters, running statistics and batch counts back; waits for the device.
    pub fn download(&self, params: &Params) -> Result<()> {
        let mut state = self.restored(&self.values, Group::Updated)?;
        state.extend(self.restored(&self.fixed, Group::Fixed)?);
        // Only the batch counters are left.
        let others: Vec<String> = params.shapes().into_keys().filter(|name| !state.contains_key(name)).collect();
        for name in others {
            let norm = name.rsplit_once('.').map_or("", |(norm, _)| norm);
            let num = if params.has_frozen_statistics(norm) { 0 } else { self.num_batches.load(Ordering::Relaxed) };
            let counter = (read(params, &name)?.copy()? + num as f64)?;
            state.insert(name, counter);
        }
        params.load(&state)?;
        self.num_batches.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Values of a group in the device's layout.
    pub fn array(&self, group: Group) -> &Array {
        match group {
            Group::Updated => &self.values,
            Group::Fixed => &self.fixed,
        }
    }

    /// Splits `from`, an array in the device's layout of a group, into tensors by name, in the checkpoint's layout and
    /// shapes; waits for the device.
    pub fn restored(&self, from: &Array, group: Group) -> Result<BTreeMap<String, Tensor>> {
        let values = from.read::<f32>()?;
        let restored = self.of_group(group).map(|(name, Place { start, len, order, shape, .. })| {
            let values = order.restored(&values[*start..][..*len], shape.iter().product());
            Ok((name.clone(), Tensor::from_vec(values, shape.as_slice(), &Candle::Cpu)?))
        });
        restored.collect()
    }

    /// Inverse of [`Self::restored`]: returns the values that `get` returns for each name, in the device's layout.
    pub fn laid_out(&self, group: Group, mut get: impl FnMut(&str) -> Result<Vec<f32>>) -> Result<Vec<f32>> {
        let mut all = vec![0.0; self.array(group).len()];
        for (name, Place { start, len, order, shape, .. }) in self.of_group(group) {
            let (values, expected) = (get(name)?, shape.iter().product::<usize>());
            if values.len() != expected {
                bail!("{name}: expected {expected} elements, found {}", values.len());
            }
            all[*start..][..*len].copy_from_slice(&order.laid_out(&values));
        }
        Ok(all)
    }

    fn of_group(&self, group: Group) -> impl Iterator<Item = (&String, &Place)> {
        self.places.iter().filter(move |(_, place)| place.is_fixed == (group == Group::Fixed))
    }

    /// A parameter or running statistic, f32.
    pub fn value(&self, path: &str, name: &str) -> Result<Array> {
        let place = self.place(path, name)?;
        Ok(if place.is_fixed { &self.fixed } else { &self.values }.part(place.start, place.len))
    }

    /// Weight of a layer in the type of the products.
    pub fn weight(&self, path: &str) -> Result<Array> {
        let place = self.place(path, "weight")?;
        let (wide, short) = if place.is_fixed { (&self.fixed, &self.short_fixed) } else { (&self.values, &self.short) };
        Ok(short.as_ref().unwrap_or(wide).part(place.start, place.len))
    }

    /// Whether updates reach the weight of a layer.
    pub fn is_updated(&self, path: &str) -> bool {
        self.is_trained && self.place(path, "weight").is_ok_and(|place| !place.is_fixed)
    }

    /// Output array for the gradient of a parameter, f32.
    pub fn grad(&self, path: &str, name: &str) -> Result<Array> {
        let place = self.place(path, name)?;
        match (self.is_trained, place.is_fixed) {
            (false, _) => bail!("{path}.{name} is not trained"),
            // A scratch buffer: nothing reads it.
            (true, true) => self.values.device().array(Element::F32, place.len),
            (true, false) => Ok(self.grads.part(place.start, place.len)),
        }
    }

    pub(super) fn norm(&self, Norm { bn, prelu }: &Norm) -> Result<NormParams> {
        Ok(NormParams {
            weight: self.value(bn, "weight")?,
            bias: self.value(bn, "bias")?,
            slopes: prelu.as_ref().map(|prelu| self.value(prelu, "weight")).transpose()?,
            running_mean: self.value(bn, "running_mean")?,
            running_var: self.value(bn, "running_var")?,
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

    /// Whether updates may change parameters.
    pub(super) fn is_trained(&self) -> bool {
        self.is_trained
    }

    /// Counts a batch whose statistics entered the running ones of norms that are not frozen.
    pub fn count_batch(&self) {
        self.num_batches.fetch_add(1, Ordering::Relaxed);
    }

    /// Parameters of [`Group::Updated`] with their gradients and their copy, for an update.
    pub fn flat(&self) -> Flat<'_> {
        Flat { param: &self.values, grad: &self.grads, copy: self.short.as_ref() }
    }

    /// Gradient of a parameter in the checkpoint's layout; waits for the device.
    #[cfg(test)]
    pub fn read_grad(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let Some(place) = self.places.get(name) else { bail!("no parameter {name}") };
        Ok(place.order.restored(&self.grads.part(place.start, place.len).read()?, len))
    }

    fn place(&self, path: &str, name: &str) -> Result<&Place> {
        match self.places.get(&format!("{path}.{name}")) {
            Some(place) => Ok(place),
            None => bail!("no parameter {path}.{name}"),
        }
    }
}

fn read(params: &Params, name: &str) -> Result<Tensor> {
    match params.get(name) {
        Some(tensor) => Ok(tensor),
        None => bail!("no parameter {name}"),
    }
}
