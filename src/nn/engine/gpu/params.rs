//! The parameters of a network in device memory, one behind the other, in the orders that the kernels read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device as Candle, Result, Tensor, bail};

use crate::gpu::batch_norm::{NormGrads, NormParams};
use crate::gpu::{Array, Device, Element, rows};
use crate::nn::engine::program::{Norm, Program, Step, ViewId};
use crate::nn::layers::BatchNorm;
use crate::nn::params::Params;

/// Elements that each parameter begins at a multiple of: 16 bytes in every type.
const ALIGNMENT: usize = 8;

/// How the elements of a parameter lie on the device.
#[derive(Clone, Debug, PartialEq)]
enum Order {
    /// As in the checkpoint.
    Same,
    /// From `(co, c, pixels)` to `(co, pixels, padded)`: filters, and fully connected layers behind an image. Behind the `c`-th
    /// channel are zeros, whose gradient is zero.
    ChannelsLast { c: usize, pixels: usize, padded: usize },
    /// From `(c, 1, pixels)` to `(pixels, c)`.
    Depthwise { c: usize },
}

impl Order {
    /// Where each element of the device's order comes from; none for zeros.
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
            Self::Depthwise { c } => {
                let pixels = len / c;
                Box::new((0..len).map(move |i| Some(i % c * pixels + i / c)))
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
    start: usize,
    /// On the device, without what fills it up to the next parameter.
    len: usize,
    order: Order,
}

/// Parameters with their gradients, and running statistics.
pub(crate) struct DeviceParams {
    /// Trained or given parameters, then the running statistics, which no update reaches.
    places: BTreeMap<String, Place>,
    /// f32.
    values: Array,
    /// f32; of the parameters.
    grads: Array,
    /// The parameters in the type of the products, unless that is f32.
    short: Option<Array>,
    running: Array,
    /// Batches that entered the running statistics since they were last downloaded.
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
                Step::Conv { x, path, config } if config.groups > 1 => (path, Order::Depthwise { c: shape(*x)[3] }),
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
        let names = program.param_names().into_iter().collect::<BTreeSet<_>>();
        let (mut places, mut flat) = (BTreeMap::new(), Vec::new());
        for name in &names {
            let order = orders.remove(name).unwrap_or(Order::Same);
            let values = order.laid_out(&read(params, name)?.flatten_all()?.to_vec1::<f32>()?);
            places.insert(name.clone(), Place { start: flat.len(), len: values.len(), order });
            flat.extend(values);
            flat.resize(flat.len().next_multiple_of(ALIGNMENT), 0.0);
        }
        let mut running = Vec::new();
        for Norm { bn, .. } in program.views.iter().filter_map(|view| view.norm.as_ref()) {
            for name in ["running_mean", "running_var"].map(|name| format!("{bn}.{name}")) {
                let values = read(params, &name)?.to_vec1::<f32>()?;
                places.insert(name, Place { start: running.len(), len: values.len(), order: Order::Same });
                running.extend(values);
                running.resize(running.len().next_multiple_of(ALIGNMENT), 0.0);
            }
        }
        let is_trained = params.trainable().next().is_some();
        let values = device.upload(&flat)?;
        let short = if element == Element::F32 { None } else { Some(device.array(element, flat.len())?) };
        let grads = device.zeros(Element::F32, if is_trained { flat.len() } else { 0 })?;
        let running = device.upload(&running)?;
        let uploaded = Self { places, values, grads, short, running, num_batches: AtomicU64::new(0), is_trained };
        uploaded.shorten()?;
        Ok(uploaded)
    }

    /// Renews the copy in the type of the products.
    fn shorten(&self) -> Result<()> {
        self.short.as_ref().map_or(Ok(()), |short| rows::convert(&self.values, short))
    }

    /// Copies parameters and running statistics back; waits for the device.
    pub fn download(&self, params: &Params) -> Result<()> {
        let (values, running) = (self.values.read::<f32>()?, self.running.read::<f32>()?);
        let mut state = BTreeMap::new();
        for (name, shape) in params.shapes() {
            let tensor = match self.places.get(&name) {
                Some(Place { start, len, order }) => {
                    let from = if is_running(&name) { &running } else { &values };
                    let values = order.restored(&from[*start..][..*len], shape.iter().product());
                    Tensor::from_vec(values, shape, &Candle::Cpu)?
                }
                // Nothing but the counters of batches.
                None => (read(params, &name)?.copy()? + self.num_batches.load(Ordering::Relaxed) as f64)?,
            };
            state.insert(name, tensor);
        }
        params.load(&state)?;
        self.num_batches.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// A parameter, f32.
    pub fn value(&self, path: &str, name: &str) -> Result<Array> {
        self.part(&self.values, path, name)
    }

    /// A parameter in the type of the products.
    pub fn weight(&self, path: &str) -> Result<Array> {
        self.part(self.short.as_ref().unwrap_or(&self.values), path, "weight")
    }

    /// Where the gradient of a parameter goes, f32.
    pub fn grad(&self, path: &str, name: &str) -> Result<Array> {
        if !self.is_trained {
            bail!("{path}.{name} is not trained");
        }
        self.part(&self.grads, path, name)
    }

    pub(super) fn norm(&self, Norm { bn, prelu }: &Norm) -> Result<NormParams> {
        Ok(NormParams {
            weight: self.value(bn, "weight")?,
            bias: self.value(bn, "bias")?,
            slopes: prelu.as_ref().map(|prelu| self.value(prelu, "weight")).transpose()?,
            running_mean: self.part(&self.running, bn, "running_mean")?,
            running_var: self.part(&self.running, bn, "running_var")?,
            eps: BatchNorm::EPS as f32,
            momentum: BatchNorm::MOMENTUM as f32,
        })
    }

    /// Calls `f` with where the gradients of a norm's parameters go.
    pub(super) fn with_norm_grads<R>(
        &self,
        Norm { bn, prelu }: &Norm,
        f: impl FnOnce(&NormGrads) -> Result<R>,
    ) -> Result<R> {
        let (weight, bias) = (self.grad(bn, "weight")?, self.grad(bn, "bias")?);
        let slopes = prelu.as_ref().map(|prelu| self.grad(prelu, "weight")).transpose()?;
        f(&NormGrads { weight: &weight, bias: &bias, slopes: slopes.as_ref() })
    }

    /// Whether an update may change them.
    pub(super) fn is_trained(&self) -> bool {
        self.is_trained
    }

    /// Counts a batch whose statistics entered the running ones.
    pub fn count_batch(&self) {
        self.num_batches.fetch_add(1, Ordering::Relaxed);
    }

    /// All parameters, their gradients and their copy, for an update.
    pub fn flat(&self) -> (&Array, &Array, Option<&Array>) {
        (&self.values, &self.grads, self.short.as_ref())
    }

    /// The gradient of a parameter in the checkpoint's order; waits for the device.
    #[cfg(test)]
    pub fn read_grad(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let Some(place) = self.places.get(name) else { bail!("no parameter {name}") };
        Ok(place.order.restored(&self.grads.part(place.start, place.len).read()?, len))
    }

    fn part(&self, of: &Array, path: &str, name: &str) -> Result<Array> {
        match self.places.get(&format!("{path}.{name}")) {
            Some(place) => Ok(of.part(place.start, place.len)),
            None => bail!("no parameter {path}.{name}"),
        }
    }
}

fn is_running(name: &str) -> bool {
    name.ends_with(".running_mean") || name.ends_with(".running_var")
}

fn read(params: &Params, name: &str) -> Result<Tensor> {
    match params.get(name) {
        Some(tensor) => Ok(tensor),
        None => bail!("no parameter {name}"),
    }
}
