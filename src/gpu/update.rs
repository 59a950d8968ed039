//! Optimiser updates of all parameters at once: `kernels/update.cu`.

use candle_core::{Result, bail};

use super::{Arg, Array, Device, Element, Launch};

/// Threads per block.
const BLOCK: usize = 256;
/// Maximum number of blocks that share the elements of a sum; its rounding depends on it.
const MAX_BLOCKS: usize = 1024;
/// Elements per block of threads before the grid reaches [`MAX_BLOCKS`].
const PER_BLOCK: usize = 8 * BLOCK;

/// Gradient norm, clipping and the check for non-finite values of a step, all on the device.
pub(crate) struct Guard {
    /// Norm and clipping factor, f32; whether the step is finite and the number of steps that were not, i32.
    state: Array,
    sums: Array,
}

/// State of a [`Guard`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct GuardState {
    /// Norm of all gradients together.
    pub norm: f32,
    /// Whether loss and norm were finite; if not, the step changed nothing.
    pub is_finite: bool,
    /// Number of steps that were not finite since the guard was created.
    pub num_skipped: u32,
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
        let shared_bytes = (BLOCK / 32 * 8) as u32;
        let launch = Launch { grid: [blocks, 1], block: BLOCK as u32, shared_bytes };
        device.launch("update_squares", launch, &[grad.arg(), Arg::I64(grad.len() as i64), self.sums.arg()])?;
        let args = [self.sums.arg(), Arg::I32(blocks as i32), Arg::F32(max_norm), loss.into(), self.state.arg()];
        device.launch("update_guard", Launch { grid: [1, 1], ..launch }, &args)
    }

    /// Waits for all queued work and returns the state.
    pub fn read(&self) -> Result<GuardState> {
        let state = self.state.read::<i32>()?;
        Ok(GuardState { norm: f32::from_bits(state[0] as u32), is_finite: state[2] != 0, num_skipped: state[3] as u32 })
    }
}

/// Contiguous parameters and gradients, f32, for an update.
pub(crate) struct Flat<'a> {
    pub param: &'a Array,
    pub grad: &'a Array,
    /// Copy of the parameters in the type of the products, which the update also writes.
    pub copy: Option<&'a Array>,
}

/// SGD with momentum, as in PyTorch. `lr` is one f32; `is_clipped` says whether the guard's factor applies.
pub(crate) fn sgd(
    flat: &Flat,
    velocity: &Array,
    lr: &Array,
    [momentum, decay]: [f32; 2],
    (guard, is_clipped): (&Guard, bool),
) -> Result<()> {
    let (suffix, launch) = flat.launch(&[velocity])?;
    let args = [
        flat.param.arg(),
        velocity.arg(),
        flat.grad.arg(),
        Arg::I64(flat.param.len() as i64),
        lr.arg(),
        Arg::F32(momentum),
        Arg::F32(decay),
        guard.state.arg(),
        Arg::I32(is_clipped.into()),
        flat.copy.into(),
    ];
    flat.param.device().launch(&format!("update_sgd_{suffix}"), launch, &args)
}

/// AdamW, as in PyTorch. `rates` are `lr / (1 - beta1^t)`, `sqrt(1 - beta2^t)` and `1 - lr * decay`, f32.
pub(crate) fn adamw(
    flat: &Flat,
    [mean, square]: [&Array; 2],
    rates: &Array,
    [beta1, beta2]: [f32; 2],
    (guard, is_clipped): (&Guard, bool),
) -> Result<()> {
    let (suffix, launch) = flat.launch(&[mean, square])?;
    let args = [
        flat.param.arg(),
        mean.arg(),
        square.arg(),
        flat.grad.arg(),
        Arg::I64(flat.param.len() as i64),
        rates.arg(),
        Arg::F32(beta1),
        Arg::F32(beta2),
        guard.state.arg(),
        Arg::I32(is_clipped.into()),
        flat.copy.into(),
    ];
    flat.param.device().launch(&format!("update_adamw_{suffix}"), launch, &args)
}

/// Sets `y` to `keep * y + share * x`, f32 of any length, unless the guard found the step not finite. With a `keep` of
/// 0, `y` may be uninitialised.
pub(crate) fn blend(y: &Array, x: &Array, [keep, share]: [f32; 2], guard: Option<&Guard>) -> Result<()> {
    if y.len() != x.len() || [y, x].iter().any(|array| array.element() != Element::F32) {
        bail!("blend: {} {:?} and {} {:?}", y.len(), y.element(), x.len(), x.element());
    }
    if y.len() == 0 {
        return Ok(());
    }
    let grid = [y.len().div_ceil(PER_BLOCK).min(MAX_BLOCKS) as u32, 1];
    let guard = guard.map(|guard| &guard.state);
    let args = [y.arg(), x.arg(), Arg::I64(y.len() as i64), Arg::F32(keep), Arg::F32(share), guard.into()];
    y.device().launch("update_blend", Launch { grid, block: BLOCK as u32, shared_bytes: 0 }, &args)
}

impl Flat<'_> {
    /// Checks the sizes; returns the kernel suffix for the type of the copy, and the launch.
    fn launch(&self, moments: &[&Array]) -> Result<(&'static str, Launch)> {
        let len = self.param.len();
        if [self.grad].iter().chain(moments).chain(&self.copy).any(|x| x.len() != len) {
            bail!("update: {len} parameters, but gradients, moments or a copy of another length");
        }
        let launch = Launch { grid: [blocks_of(len)?, 1], block: BLOCK as u32, shared_bytes: 0 };
        Ok((self.copy.map_or(Element::F32, Array::element).suffix(), launch))
    }
}

fn blocks_of(len: usize) -> Result<u32> {
    if !len.is_multiple_of(8) {
        bail!("update: expected a multiple of 8 elements, found {len}");
    }
    Ok(len.div_ceil(PER_BLOCK).min(MAX_BLOCKS) as u32)
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::gpu::tests::{close, device, numbers, read, rounded};
    use crate::ops::adamw::{AdamWStep, adamw_step};
    use crate::ops::sgd::{SgdStep, sgd_step};

    const LENS: [usize; 3] = [8, 2048 + 8, 100_000];

    #[test]
    fn sgd_is_that_of_the_cpu() -> Result<()> {
        let device = device();
        for (len, max_norm) in LENS.into_iter().flat_map(|len| [(len, 0.0), (len, 1.0), (len, 1e6)]) {
            let [p, v, g] = ["p", "v", "g"].map(|name| numbers(name, len, [-1.0, 1.0]));
            let norm = g.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let grad_scale = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
            let expected = Tensor::from_slice(&p, len, &candle_core::Device::Cpu)?;
            let mut velocity = v.clone();
            let step = SgdStep { lr: 0.1, momentum: 0.9, weight_decay: 5e-4, grad_scale };
            sgd_step(&expected, &mut velocity, &g, step)?;
            for element in [None, Some(Element::Bf16), Some(Element::F16)] {
                let (param, on_v, grad) = (device.upload(&p)?, device.upload(&v)?, device.upload(&g)?);
                let copy = element.map(|element| device.array(element, len)).transpose()?;
                let guard = Guard::new(&device)?;
                guard.measure(&grad, max_norm as f32, None)?;
                let flat = Flat { param: &param, grad: &grad, copy: copy.as_ref() };
                sgd(&flat, &on_v, &device.upload(&[0.1f32])?, [0.9, 5e-4], (&guard, true))?;
                close("velocity", &on_v, &velocity, 1e-6)?;
                close("param", &param, &expected.to_vec1::<f32>()?, 1e-6)?;
                if let Some(copy) = copy {
                    assert_eq!(read(&copy)?, rounded(&read(&param)?, copy.element()));
                }
                let state = guard.read()?;
                assert!((f64::from(state.norm) / norm - 1.0).abs() < 1e-6, "{state:?}, expected {norm}");
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
            let expected = Tensor::from_slice(&p, len, &candle_core::Device::Cpu)?;
            let (mut mean, mut square) = (m.clone(), s.clone());
            let (lr, betas, weight_decay) = (1e-2, [0.9, 0.999], 0.05);
            let step = AdamWStep { lr, betas, weight_decay, grad_scale: 1.0, num_steps: 7 };
            adamw_step(&expected, [&mut mean, &mut square], &g, step)?;
            let [param, on_m, on_s, grad] = [&p, &m, &s, &g].map(|values| device.upload::<f32>(values));
            let (param, on_m, on_s, grad) = (param?, on_m?, on_s?, grad?);
            let (guard, copy) = (Guard::new(&device)?, device.array(Element::Bf16, len)?);
            guard.measure(&grad, 1.0, None)?;
            let rates = [lr / (1.0 - 0.9f64.powi(7)), (1.0 - 0.999f64.powi(7)).sqrt(), 1.0 - lr * weight_decay];
            let rates = device.upload(&rates.map(|rate| rate as f32))?;
            let flat = Flat { param: &param, grad: &grad, copy: Some(&copy) };
            // Not clipped, although the guard has a clipping factor.
            adamw(&flat, [&on_m, &on_s], &rates, [0.9, 0.999], (&guard, false))?;
            close("mean", &on_m, &mean, 1e-6)?;
            close("square", &on_s, &square, 1e-6)?;
            close("param", &param, &expected.to_vec1::<f32>()?, 1e-6)?;
        }
        Ok(())
    }

    #[test]
    fn a_step_that_is_not_finite_changes_nothing_and_is_counted() -> Result<()> {
        let device = device();
        let p = numbers("p", 64, [-1.0, 1.0]);
        let (guard, one) = (Guard::new(&device)?, device.upload(&[1f32])?);
        let mut bad = p.clone();
        bad[63] = f32::INFINITY;
        for (grad, loss) in [(&bad, 1.0), (&p, f32::NAN)] {
            let (param, velocity) = (device.upload(&p)?, device.upload(&p)?);
            let (grad, loss) = (device.upload(grad)?, device.upload(&[loss])?);
            guard.measure(&grad, 5.0, Some(&loss))?;
            let flat = Flat { param: &param, grad: &grad, copy: None };
            sgd(&flat, &velocity, &one, [0.9, 0.0], (&guard, true))?;
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
