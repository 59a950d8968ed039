//! Optimiser updates of all parameters at once: `kernels/update.cu`.

use candle_core::{Result, bail};

use super::{Arg, Array, Device, Element, GpuBackend, Launch, fits};
use crate::ops::adamw::AdamWStep;
use crate::ops::backend::{GuardState, Update};
use crate::ops::sgd::SgdStep;

/// Threads per block.
const BLOCK: usize = 256;
/// Maximum number of blocks that share the elements of a sum; its rounding depends on it.
const MAX_BLOCKS: usize = 1024;
/// Elements per block of threads before the grid reaches [`MAX_BLOCKS`].
const PER_BLOCK: usize = 8 * BLOCK;

/// Gradient norm, clipping and the check for non-finite values of a step, all on the device.
#[derive(Debug)]
pub(crate) struct Guard {
    /// Norm and clipping factor, f32; whether the step is finite and the number of steps that were not, i32.
    state: Array,
    sums: Array,
}

impl Guard {
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { state: device.zeros(Element::I32, 4)?, sums: device.array(Element::F64, MAX_BLOCKS)? })
    }

    /// Measures the norm of the gradients and the factor that scales it down to `max_norm` if it is larger; 0 turns
    /// clipping off. `loss` is one f32.
    pub fn measure(&self, grad: &Array, max_norm: f32, loss: Option<&Array>) -> Result<()> {
        let device = grad.device();
        let blocks = blocks_of(grad.len())?;
        fits("update", Element::F32, &[(Some(grad), grad.len()), (loss, 1)])?;
        let shared_bytes = (BLOCK / 32 * 8) as u32;
        let launch = Launch { grid: [blocks, 1], block: BLOCK as u32, shared_bytes };
        let args = [grad.arg(), Arg::I64(grad.len() as i64), self.sums.arg()];
        // SAFETY: there is a sum for each of the blocks, of which there are at most MAX_BLOCKS.
        unsafe { device.launch("update_squares", launch, &args)? };
        let args = [self.sums.arg(), Arg::I32(blocks as i32), Arg::F32(max_norm), loss.into(), self.state.arg()];
        // SAFETY: as above; the state has four elements and the loss one.
        unsafe { device.launch("update_guard", Launch { grid: [1, 1], ..launch }, &args) }
    }

    /// Waits for all queued work and returns the state.
    pub fn read(&self) -> Result<GuardState> {
        let state = self.state.read::<i32>()?;
        let norm = f64::from(f32::from_bits(state[0] as u32));
        Ok(GuardState { norm, is_finite: state[2] != 0, num_skipped: state[3] as u64 })
    }
}

/// SGD with momentum, as in PyTorch.
pub(super) fn sgd(update: &Update<GpuBackend>, velocity: &Array, step: SgdStep) -> Result<()> {
    let (device, (suffix, launch)) = (update.values.device(), launch(update, &[velocity])?);
    let lr = device.upload(&[step.lr as f32])?;
    let args = [
        update.values.arg(),
        velocity.arg(),
        update.grads.arg(),
        Arg::I64(update.values.len() as i64),
        lr.arg(),
        Arg::F32(step.momentum as f32),
        Arg::F32(step.weight_decay as f32),
        update.guard.state.arg(),
        Arg::I32(update.is_clipped.into()),
        update.short.as_deref().into(),
    ];
    // SAFETY: all arrays have the length of the values.
    unsafe { device.launch(&format!("update_sgd_{suffix}"), launch, &args) }
}

/// AdamW, as in PyTorch.
pub(super) fn adamw(update: &Update<GpuBackend>, [mean, square]: [&Array; 2], step: AdamWStep) -> Result<()> {
    let (device, (suffix, launch)) = (update.values.device(), launch(update, &[mean, square])?);
    let (AdamWStep { lr, betas: [beta1, beta2], .. }, num_steps) = (step, step.num_steps as f64);
    let rates =
        [lr / (1.0 - beta1.powf(num_steps)), (1.0 - beta2.powf(num_steps)).sqrt(), 1.0 - lr * step.weight_decay];
    let rates = device.upload(&rates.map(|rate| rate as f32))?;
    let args = [
        update.values.arg(),
        mean.arg(),
        square.arg(),
        update.grads.arg(),
        Arg::I64(update.values.len() as i64),
        rates.arg(),
        Arg::F32(beta1 as f32),
        Arg::F32(beta2 as f32),
        update.guard.state.arg(),
        Arg::I32(update.is_clipped.into()),
        update.short.as_deref().into(),
    ];
    // SAFETY: all arrays have the length of the values; there are three rates.
    unsafe { device.launch(&format!("update_adamw_{suffix}"), launch, &args) }
}

/// Sets `y` to `keep * y + share * x`, f32 of any length, unless the guard found the step not finite. With a `keep` of
/// 0, `y` may be uninitialised.
pub(crate) fn blend(y: &Array, x: &Array, [keep, share]: [f32; 2], guard: Option<&Guard>) -> Result<()> {
    fits("blend", Element::F32, &[(Some(y), y.len()), (Some(x), y.len())])?;
    if y.len() == 0 {
        return Ok(());
    }
    let grid = [y.len().div_ceil(PER_BLOCK).min(MAX_BLOCKS) as u32, 1];
    let guard = guard.map(|guard| &guard.state);
    let args = [y.arg(), x.arg(), Arg::I64(y.len() as i64), Arg::F32(keep), Arg::F32(share), guard.into()];
    // SAFETY: both arrays have this length.
    unsafe { y.device().launch("update_blend", Launch { grid, block: BLOCK as u32, shared_bytes: 0 }, &args) }
}

/// Checks the sizes; returns the kernel suffix for the type of the copy, and the launch.
fn launch(update: &Update<GpuBackend>, moments: &[&Array]) -> Result<(&'static str, Launch)> {
    let (len, short) = (update.values.len(), update.short.as_deref());
    for x in [&*update.values, update.grads].iter().chain(moments) {
        fits("update", Element::F32, &[(Some(x), len)])?;
    }
    if let Some(short) = short.filter(|short| short.len() != len) {
        bail!("update: a copy of {} elements for {len} parameters", short.len());
    }
    let launch = Launch { grid: [blocks_of(len)?, 1], block: BLOCK as u32, shared_bytes: 0 };
    Ok((short.map_or(Element::F32, Array::element).suffix(), launch))
}

fn blocks_of(len: usize) -> Result<u32> {
    if !len.is_multiple_of(8) {
        bail!("update: expected a multiple of 8 elements, found {len}");
    }
    Ok(len.div_ceil(PER_BLOCK).min(MAX_BLOCKS) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tests::{close, device, numbers, read, rounded};
    use crate::ops::adamw::adamw_step;
    use crate::ops::sgd::sgd_step;

    const LENS: [usize; 3] = [8, 2048 + 8, 100_000];

    #[test]
    fn sgd_is_that_of_the_cpu() -> Result<()> {
        let device = device();
        for (len, max_norm) in LENS.into_iter().flat_map(|len| [(len, 0.0), (len, 1.0), (len, 1e6)]) {
            let [p, v, g] = ["p", "v", "g"].map(|name| numbers(name, len, [-1.0, 1.0]));
            let norm = g.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let grad_scale = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
            let (mut expected, mut velocity) = (p.clone(), v.clone());
            let step = SgdStep { lr: 0.1, momentum: 0.9, weight_decay: 5e-4, grad_scale };
            sgd_step(&mut expected, &mut velocity, &g, step)?;
            for element in [None, Some(Element::Bf16), Some(Element::F16)] {
                let (mut param, on_v, grad) = (device.upload(&p)?, device.upload(&v)?, device.upload(&g)?);
                let mut copy = element.map(|element| device.array(element, len)).transpose()?;
                let guard = Guard::new(&device)?;
                guard.measure(&grad, max_norm as f32, None)?;
                let (values, short) = (&mut param, copy.as_mut());
                sgd(&Update { values, short, grads: &grad, guard: &guard, is_clipped: true }, &on_v, step)?;
                close("velocity", &on_v, &velocity, 1e-6)?;
                close("param", &param, &expected, 1e-6)?;
                if let Some(copy) = copy {
                    assert_eq!(read(&copy)?, rounded(&read(&param)?, copy.element()));
                }
                let state = guard.read()?;
                assert!((state.norm / norm - 1.0).abs() < 1e-6, "{state:?}, expected {norm}");
                assert!(state.is_finite && state.num_skipped == 0);
            }
        }
        Ok(())
    }

    #[test]
    fn adamw_is_that_of_the_cpu() -> Result<()> {
        let device = device();
        for len in LENS {
            let [p, m, g] = ["p", "m", "g"].map(|name| numbers(name, len, [-1.0, 1.0]));
            let s = numbers("s", len, [0.0, 1.0]);
            let (mut expected, mut mean, mut square) = (p.clone(), m.clone(), s.clone());
            let (lr, betas, weight_decay) = (1e-2, [0.9, 0.999], 0.05);
            let step = AdamWStep { lr, betas, weight_decay, grad_scale: 1.0, num_steps: 7 };
            adamw_step(&mut expected, [&mut mean, &mut square], &g, step)?;
            let [param, on_m, on_s, grad] = [&p, &m, &s, &g].map(|values| device.upload::<f32>(values));
            let (mut param, on_m, on_s, grad) = (param?, on_m?, on_s?, grad?);
            let (guard, mut copy) = (Guard::new(&device)?, device.array(Element::Bf16, len)?);
            guard.measure(&grad, 1.0, None)?;
            // Not clipped, although the guard has a clipping factor.
            let (values, short) = (&mut param, Some(&mut copy));
            let update = Update { values, short, grads: &grad, guard: &guard, is_clipped: false };
            adamw(&update, [&on_m, &on_s], step)?;
            close("mean", &on_m, &mean, 1e-6)?;
            close("square", &on_s, &square, 1e-6)?;
            close("param", &param, &expected, 1e-6)?;
        }
        Ok(())
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing_and_is_counted() -> Result<()> {
        let device = device();
        let p = numbers("p", 64, [-1.0, 1.0]);
        let guard = Guard::new(&device)?;
        let mut bad = p.clone();
        bad[63] = f32::INFINITY;
        for (grad, loss) in [(&bad, 1.0), (&p, f32::NAN)] {
            let (mut param, velocity) = (device.upload(&p)?, device.upload(&p)?);
            let (grad, loss) = (device.upload(grad)?, device.upload(&[loss])?);
            guard.measure(&grad, 5.0, Some(&loss))?;
            let update = Update { values: &mut param, short: None, grads: &grad, guard: &guard, is_clipped: true };
            let step = SgdStep { lr: 1.0, momentum: 0.9, weight_decay: 0.0, grad_scale: 1.0 };
            sgd(&update, &velocity, step)?;
            assert!(read(&param)? == p && read(&velocity)? == p && !guard.read()?.is_finite);
        }
        assert_eq!(guard.read()?.num_skipped, 2);
        Ok(())
    }

    #[test]
    fn a_blend_is_that_of_the_formula_and_heeds_the_guard() -> Result<()> {
        let device = device();
        for len in [0, 1, 7, 2048, 300_001] {
            let [x, y] = ["x", "y"].map(|name| numbers(name, len, [-1.0, 1.0]));
            for [keep, share] in [[0.75, 0.25], [1.0, 1.0]] {
                let (on_y, on_x) = (device.upload(&y)?, device.upload(&x)?);
                blend(&on_y, &on_x, [keep, share], None)?;
                let expected: Vec<f32> = y.iter().zip(&x).map(|(y, x)| keep * y + share * x).collect();
                close("blend", &on_y, &expected, 1e-6)?;
            }
            let any = device.upload(&vec![f32::NAN; len])?;
            blend(&any, &device.upload(&x)?, [0.0, 1.0], None)?;
            assert_eq!(read(&any)?, x);
        }
        let (y, one, guard) = (device.upload(&[1f32; 8])?, device.upload(&[2f32; 8])?, Guard::new(&device)?);
        for (loss, expected) in [(f32::INFINITY, 1.0), (1.0, 2.0)] {
            guard.measure(&one, 0.0, Some(&device.upload(&[loss])?))?;
            blend(&y, &one, [0.0, 1.0], Some(&guard))?;
            assert_eq!(read(&y)?, [expected; 8]);
        }
        assert!(blend(&y, &device.upload(&[1f32; 7])?, [0.0, 1.0], None).is_err());
        Ok(())
    }

    #[test]
    fn parameters_that_are_no_whole_accesses_are_an_error() -> Result<()> {
        let device = device();
        let x = device.zeros(Element::F32, 12)?;
        let error = Guard::new(&device)?.measure(&x, 0.0, None).unwrap_err().to_string();
        assert!(error.contains("expected a multiple of 8 elements, found 12"), "{error}");
        Ok(())
    }
}
