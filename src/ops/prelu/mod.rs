//! PReLU with one slope per channel of the last axis (He et al., 2015, eq. 1), with its backward.

mod cpu;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::slice::{self, for_float};

/// Returns `x` where positive, `slope * x` elsewhere, of the shape of `x`.
///
/// - `x`: `(.., C)`, f32 or f64
/// - `slope`: `(C)`, same dtype
///
/// Both receive gradients; at 0 the derivative is the slope, as in PyTorch.
///
/// # Errors
/// When shapes or dtypes do not match.
pub fn prelu(x: &Tensor, slope: &Tensor) -> Result<Tensor> {
    if slope.rank() != 1 || x.dims().last() != slope.dims().last() || slope.elem_count() == 0 {
        bail!("prelu: input {:?} does not fit slopes {:?}", x.shape(), slope.shape());
    }
    if !x.device().is_cpu() {
        return prelu_reference(x, slope);
    }
    x.contiguous()?.apply_op2(&slope.contiguous()?, PRelu)
}

/// [`prelu`] made of candle's tensor ops, for tests and other devices than the CPU.
///
/// # Errors
/// Same as [`prelu`].
pub fn prelu_reference(x: &Tensor, slope: &Tensor) -> Result<Tensor> {
    x.relu()? - x.neg()?.relu()?.broadcast_mul(slope)?
}

struct PRelu;

impl CustomOp2 for PRelu {
    fn name(&self) -> &'static str {
        "prelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, a: &CpuStorage, al: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = for_float!("prelu", x, T => {
            let y = cpu::forward(slice::cpu::<T>("prelu", x, xl)?, slice::cpu("prelu", a, al)?);
            <T as candle_core::WithDType>::to_cpu_storage_owned(y)
        });
        Ok((y, xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, a: &Tensor, _y: &Tensor, gy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gy = gy.contiguous()?;
        let gx = x.apply_op3_no_bwd(a, &gy, &GradX)?;
        let ga = x.apply_op3_no_bwd(a, &gy, &GradSlope)?;
        Ok((Some(gx), Some(ga)))
    }
}

struct GradX;

impl CustomOp3 for GradX {
    fn name(&self) -> &'static str {
        "prelu_grad_x"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        a: &CpuStorage,
        al: &Layout,
        gy: &CpuStorage,
        gyl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gx = for_float!("prelu_grad_x", x, T => {
            let (x, a) = (slice::cpu::<T>("prelu_grad_x", x, xl)?, slice::cpu::<T>("prelu_grad_x", a, al)?);
            let gx = cpu::grad_x(x, a, slice::cpu("prelu_grad_x", gy, gyl)?);
            <T as candle_core::WithDType>::to_cpu_storage_owned(gx)
        });
        Ok((gx, xl.shape().clone()))
    }
}

struct GradSlope;

impl CustomOp3 for GradSlope {
    fn name(&self) -> &'static str {
        "prelu_grad_slope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        _: &CpuStorage,
        al: &Layout,
        gy: &CpuStorage,
        gyl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ga = for_float!("prelu_grad_slope", x, T => {
            let x = slice::cpu::<T>("prelu_grad_slope", x, xl)?;
            let ga = cpu::grad_slope(x, slice::cpu("prelu_grad_slope", gy, gyl)?, al.shape().elem_count());
            <T as candle_core::WithDType>::to_cpu_storage_owned(ga)
        });
        Ok((ga, al.shape().clone()))
    }
}
