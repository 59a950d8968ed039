//! Internals that `benches/peers/gpu_worker.rs` times. Not part of the public API.

use std::time::Instant;

use candle_core::{Result, bail};

use super::Machine;
use crate::gpu::batch_norm::{Norm, NormArrays, NormGrads, Seen, apply};
use crate::gpu::margin::{Centres, DeviceMarginLoss, DeviceRows, MAX_COSINES};
use crate::gpu::{Array, Device, Element, rows};
use crate::ops::margin_loss::{self, MarginForm, MarginGradient, MarginLossConfig};

/// Number of passes in a timing.
const PASSES: u32 = 20;

fn device(machine: &Machine) -> Result<&Device> {
    match machine.gpu() {
        Some(gpu) => Ok(&gpu.device),
        None => bail!("no GPU"),
    }
}

/// Values that vary without being random; a kernel's work does not depend on them.
fn values(device: &Device, element: Element, len: usize) -> Result<Array> {
    let wide: Vec<f32> = (0..len).map(|i| (i * 7919 % 2003) as f32 / 1000.0 - 1.0).collect();
    let (wide, array) = (device.upload(&wide)?, device.array(element, len)?);
    if element == Element::F32 {
        return Ok(wide);
    }
    rows::convert(&wide, &array)?;
    Ok(array)
}

/// Mean seconds per pass over [`PASSES`] passes.
fn time(device: &Device, mut pass: impl FnMut() -> Result<()>) -> Result<f64> {
    let wait = device.zeros(Element::F32, 1)?;
    for _ in 0..3 {
        pass()?;
    }
    wait.read::<f32>()?;
    let began = Instant::now();
    for _ in 0..PASSES {
        pass()?;
    }
    wait.read::<f32>()?;
    Ok(began.elapsed().as_secs_f64() / f64::from(PASSES))
}

/// Runs `work` once and returns a line for each kernel and library call of it: its number and time, the longest first.
///
/// # Errors
/// When the machine has no GPU, or the work fails.
pub fn profile(machine: &Machine, work: impl FnOnce() -> crate::Result<()>) -> crate::Result<Vec<String>> {
    let gpu = device(machine)?.gpu();
    gpu.start_profile()?;
    work()?;
    let mut times: Vec<(String, (usize, f64))> = gpu.end_profile()?.into_iter().collect();
    times.sort_by(|(_, (_, a)), (_, (_, b))| b.total_cmp(a));
    let sum: f64 = times.iter().map(|(_, (_, ms))| ms).sum();
    let line = |(name, (calls, ms)): &(String, (usize, f64))| {
        format!("{name:40}  {calls:>6} calls  {ms:>9.3} ms  {:>5.1} %", 100.0 * ms / sum)
    };
    let all = ("all".to_owned(), (times.iter().map(|(_, (calls, _))| calls).sum(), sum));
    Ok(times.iter().chain([&all]).map(line).collect())
}

/// Times batch norm with PReLU, forward and backward, on arrays of at least `bytes`, which should be more than the GPU
/// caches. Returns one line per shape, with the bandwidth as a share of that of a copy of the same bytes.
///
/// # Errors
/// When the machine has no GPU, or the GPU runs out of memory.
pub fn kernels(machine: &Machine, bytes: usize) -> Result<Vec<String>> {
    let device = device(machine)?;
    let mut lines = Vec::new();
    for [side, c] in [[112, 64], [56, 64], [28, 128], [14, 256], [7, 512]] {
        let n = bytes.div_ceil(2 * side * side * c);
        let len = n * side * side * c;
        let [x, gy, y] = [(); 3].map(|()| values(device, Element::Bf16, len));
        let (x, gy, y) = (x?, gy?, y?);
        let bytes = (2 * len) as f64;
        let copy = 2.0 * bytes / time(device, || device.copy(&x, &y))?;
        let parameter = || values(device, Element::F32, c);
        let params = NormArrays {
            weight: parameter()?,
            bias: parameter()?,
            slopes: Some(parameter()?),
            running_mean: parameter()?,
            running_var: parameter()?,
            eps: 1e-5,
            momentum: 0.1,
        };
        let forward = time(device, || {
            let norm = Norm::of_batch(&x, &params, None)?;
            apply(Seen { x: &x, norm: Some(&norm) }, None, c, &y)
        })?;
        let norm = Norm::of_batch(&x, &params, None)?;
        let [weight, bias, slopes] = [(); 3].map(|()| device.array(Element::F32, c));
        let (weight, bias, slopes) = (weight?, bias?, slopes?);
        let grads = NormGrads { weight: &weight, bias: &bias, slopes: Some(&slopes) };
        let backward = time(device, || norm.backward(&x, &gy, None, &grads, &y))?;
        let share = |passes: f64, seconds: f64| 100.0 * passes * bytes / seconds / copy;
        lines.push(format!(
            "batch norm and PReLU {n}x{side}x{side}x{c} bf16: copy {:.0} GB/s; forward {:.3} ms, {:.0} % of that; backward {:.3} ms, {:.0} %",
            copy / 1e9,
            1e3 * forward,
            share(3.0, forward),
            1e3 * backward,
            share(5.0, backward)
        ));
    }
    Ok(lines)
}

/// Margin loss of synthetic embeddings, forward and backward.
pub struct Margin {
    loss: DeviceMarginLoss,
    embeddings: Array,
    centres: Array,
    grads: Array,
    rows: DeviceRows,
}

impl Margin {
    /// Creates the loss for `n` embeddings of length `d`, with products in bf16.
    ///
    /// # Errors
    /// When the machine has no GPU, or the GPU runs out of memory.
    pub fn new(machine: &Machine, n: usize, classes: usize, d: usize) -> Result<Self> {
        let device = device(machine)?;
        let config =
            MarginLossConfig { form: MarginForm::Angular, gradient: MarginGradient::True, scale: 64.0, matching: None };
        let loss = DeviceMarginLoss { config, element: Element::Bf16, max_cosines: MAX_COSINES };
        let labels: Vec<i64> = (0..n as i64).map(|i| i * 37 % classes as i64).collect();
        Ok(Self {
            loss,
            embeddings: values(device, Element::F32, n * d)?,
            centres: values(device, Element::F32, classes * d)?,
            grads: device.array(Element::F32, classes * d)?,
            rows: DeviceRows::new(device, margin_loss::Rows { labels: &labels, margins: &vec![0.5; n] }, None)?,
        })
    }

    /// Runs one pass, and waits for it if `waits`.
    ///
    /// # Errors
    /// When the GPU fails.
    pub fn step(&self, waits: bool) -> Result<()> {
        let centres = Centres { values: &self.centres, ranks: None };
        let loss = self.loss.with_gradients(&self.embeddings, &centres, &self.rows, 1.0, &self.grads)?.loss;
        if waits {
            loss.read::<f32>()?;
        }
        Ok(())
    }
}
