//! 2-d convolution, channels-last, with both gradients.
//!
//! candle 0.11 runs the input gradient as a naive transposed convolution and a grouped convolution as one convolution
//! per group; neither can train a network at useful speed. Here f32 convolutions run by Winograd's minimal filtering,
//! as matrix products of gathered patches (im2col), or as direct depthwise loops. Channel counts that fill no vectors,
//! and f64, run as matrix products over tiles of patches with one group, and directly with several.

mod dense;
mod depthwise;
mod direct;
mod grouped;
pub mod int8;
mod kernel;
mod method;
mod patches;
mod report;
mod winograd;

#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

pub(crate) use self::kernel::{Epilogue, Prologue};
pub(crate) use self::method::{Conv, Filter};
pub use self::report::ConvolutionPass;
use super::slice::{self, for_float};

/// Stride, zero padding and number of groups of a convolution, the same for rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvConfig {
    /// Distance in pixels between the patches of neighbouring outputs.
    pub stride: usize,
    /// Pixels of zeros around the input.
    pub padding: usize,
    /// Number of groups; input and output channels are split evenly and a group sees only its own.
    pub groups: usize,
}

impl Default for ConvConfig {
    fn default() -> Self {
        Self { stride: 1, padding: 0, groups: 1 }
    }
}

/// Returns the cross-correlation of `x` with `w`: `(N, (H + 2 padding - KH) / stride + 1, likewise W, C_out)`.
///
/// - `x`: `(N, H, W, C_in)`, f32 or f64
/// - `w`: `(C_out, C_in / groups, KH, KW)` (PyTorch's layout), same dtype
///
/// Both arguments receive gradients.
///
/// # Errors
/// When shapes, groups or dtypes do not match.
pub fn conv2d(x: &Tensor, w: &Tensor, config: ConvConfig) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return conv2d_reference(x, w, config);
    }
    x.contiguous()?.apply_op2(&w.contiguous()?, Conv2d(config))
}

/// Returns the gradient of [`conv2d`] with respect to `x`, whose shape is `x_shape`, from the gradient of its result.
///
/// # Errors
/// When shapes, groups or dtypes do not match.
pub fn conv2d_grad_x(gy: &Tensor, w: &Tensor, x_shape: &Shape, config: ConvConfig) -> Result<Tensor> {
    let d = Dims::new(x_shape, w.shape(), config)?;
    d.check_output(gy)?;
    gy.contiguous()?.apply_op2_no_bwd(&w.contiguous()?, &GradX(d))
}

/// Returns the gradient of [`conv2d`] with respect to `w`, whose shape is `w_shape`, from the gradient of its result.
///
/// # Errors
/// When shapes, groups or dtypes do not match.
pub fn conv2d_grad_w(x: &Tensor, gy: &Tensor, w_shape: &Shape, config: ConvConfig) -> Result<Tensor> {
    let d = Dims::new(x.shape(), w_shape, config)?;
    d.check_output(gy)?;
    x.contiguous()?.apply_op2_no_bwd(&gy.contiguous()?, &GradW(d))
}

/// [`conv2d`] by candle's own convolution, for tests and other devices than the CPU.
///
/// # Errors
/// Same as [`conv2d`].
pub fn conv2d_reference(x: &Tensor, w: &Tensor, config: ConvConfig) -> Result<Tensor> {
    let ConvConfig { stride, padding, groups } = config;
    x.permute((0, 3, 1, 2))?.contiguous()?.conv2d(w, padding, stride, 1, groups)?.permute((0, 2, 3, 1))?.contiguous()
}

/// Sizes of one convolution; `(n, h, w, c)` of the input, `(ho, wo, co)` of the output.
#[derive(Clone, Copy, Debug)]
struct Dims {
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    ho: usize,
    wo: usize,
    co: usize,
    kh: usize,
    kw: usize,
    stride: usize,
    padding: usize,
    groups: usize,
}

/// Returns the shape `(n, ho, wo, co)` of the convolution of `x: (n, h, w, c)` with `w: (co, c / groups, kh, kw)`.
///
/// # Errors
/// When they do not match.
pub(crate) fn output_shape(x: [usize; 4], w: [usize; 4], config: ConvConfig) -> Result<[usize; 4]> {
    let d = Dims::new(&Shape::from(&x), &Shape::from(&w), config)?;
    Ok([d.n, d.ho, d.wo, d.co])
}

impl Dims {
    fn new(x: &Shape, w: &Shape, config: ConvConfig) -> Result<Self> {
        let ConvConfig { stride, padding, groups } = config;
        let (n, h, width, c) = x.dims4()?;
        let (co, cg, kh, kw) = w.dims4()?;
        if groups == 0 || stride == 0 || kh == 0 || kw == 0 {
            bail!("conv2d: stride, groups and kernel must be positive, found {config:?} and weight {w:?}");
        }
        if c != cg * groups || co % groups != 0 {
            bail!("conv2d: input {x:?} does not fit weight {w:?} in {groups} groups");
        }
        if h + 2 * padding < kh || width + 2 * padding < kw {
            bail!("conv2d: input {x:?} with padding {padding} is smaller than the kernel {w:?}");
        }
        let ho = (h + 2 * padding - kh) / stride + 1;
        let wo = (width + 2 * padding - kw) / stride + 1;
        Ok(Self { n, h, w: width, c, ho, wo, co, kh, kw, stride, padding, groups })
    }

    fn check_output(&self, gy: &Tensor) -> Result<()> {
        if gy.shape() != &self.y_shape() {
            bail!("conv2d: expected a gradient of shape {:?}, found {:?}", self.y_shape(), gy.shape());
        }
        Ok(())
    }

    fn x_shape(&self) -> Shape {
        Shape::from((self.n, self.h, self.w, self.c))
    }

    fn y_shape(&self) -> Shape {
        Shape::from((self.n, self.ho, self.wo, self.co))
    }

    fn w_shape(&self) -> Shape {
        Shape::from((self.co, self.c / self.groups, self.kh, self.kw))
    }

    /// Number of elements of a patch, which is the number of rows of the unfolded weight.
    fn patch(&self) -> usize {
        self.kh * self.kw * self.c
    }

    /// Output pixels of the whole batch.
    fn pixels(&self) -> usize {
        self.n * self.ho * self.wo
    }
}

struct Conv2d(ConvConfig);

impl CustomOp2 for Conv2d {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let d = Dims::new(xl.shape(), wl.shape(), self.0)?;
        if let CpuStorage::F32(_) = x {
            let (x, w) = (slice::cpu("conv2d", x, xl)?, slice::cpu("conv2d", w, wl)?);
            let mut y = vec![0.0; d.pixels() * d.co];
            Conv::of(d).forward(x, Prologue::default(), w, Epilogue::default(), &mut y);
            return Ok((CpuStorage::F32(y), d.y_shape()));
        }
        let y = for_float!("conv2d", x, T => {
            let (x, w) = (slice::cpu::<T>("conv2d", x, xl)?, slice::cpu::<T>("conv2d", w, wl)?);
            let mut y = vec![T::default(); d.y_shape().elem_count()];
            if d.groups == 1 { dense::forward(x, w, d, &mut y) } else { grouped::forward(x, w, d, &mut y) }
            <T as candle_core::WithDType>::to_cpu_storage_owned(y)
        });
        Ok((y, d.y_shape()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, gy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // The input image needs no gradient, and its convolution has the largest images of the network.
        let gx = if x.track_op() { Some(conv2d_grad_x(gy, w, x.shape(), self.0)?) } else { None };
        Ok((gx, Some(conv2d_grad_w(x, gy, w.shape(), self.0)?)))
    }
}

/// Gradient with respect to the input, from the gradient of the output and the weight.
struct GradX(Dims);

impl CustomOp2 for GradX {
    fn name(&self) -> &'static str {
        "conv2d_grad_x"
    }

    fn cpu_fwd(&self, gy: &CpuStorage, gyl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let d = self.0;
        if let CpuStorage::F32(_) = gy {
            let (gy, w) = (slice::cpu("conv2d_grad_x", gy, gyl)?, slice::cpu("conv2d_grad_x", w, wl)?);
            let mut gx = vec![0.0; d.x_shape().elem_count()];
            Conv::of(d).grad_x(gy, w, Epilogue::default(), &mut gx);
            return Ok((CpuStorage::F32(gx), d.x_shape()));
        }
        let gx = for_float!("conv2d_grad_x", gy, T => {
            let (gy, w) = (slice::cpu::<T>("conv2d_grad_x", gy, gyl)?, slice::cpu::<T>("conv2d_grad_x", w, wl)?);
            let mut gx = vec![T::default(); d.x_shape().elem_count()];
            if d.groups == 1 { dense::grad_x(gy, w, d, &mut gx) } else { grouped::grad_x(gy, w, d, &mut gx) }
            <T as candle_core::WithDType>::to_cpu_storage_owned(gx)
        });
        Ok((gx, d.x_shape()))
    }
}

/// Gradient with respect to the weight, from the input and the gradient of the output.
struct GradW(Dims);

impl CustomOp2 for GradW {
    fn name(&self) -> &'static str {
        "conv2d_grad_w"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, gy: &CpuStorage, gyl: &Layout) -> Result<(CpuStorage, Shape)> {
        let d = self.0;
        if let CpuStorage::F32(_) = x {
            let (x, gy) = (slice::cpu("conv2d_grad_w", x, xl)?, slice::cpu("conv2d_grad_w", gy, gyl)?);
            let mut gw = vec![0.0; d.w_shape().elem_count()];
            Conv::of(d).grad_w(x, Prologue::default(), gy, &mut gw);
            return Ok((CpuStorage::F32(gw), d.w_shape()));
        }
        let gw = for_float!("conv2d_grad_w", x, T => {
            let (x, gy) = (slice::cpu::<T>("conv2d_grad_w", x, xl)?, slice::cpu::<T>("conv2d_grad_w", gy, gyl)?);
            let mut gw = vec![T::default(); d.w_shape().elem_count()];
            if d.groups == 1 { dense::grad_w(x, gy, d, &mut gw) } else { grouped::grad_w(x, gy, d, &mut gw) }
            <T as candle_core::WithDType>::to_cpu_storage_owned(gw)
        });
        Ok((gw, d.w_shape()))
    }
}
