//! Batch normalisation over the last axis (Ioffe and Szegedy, 2015, algorithm 1), with its backward.

mod cpu;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};

pub(crate) use self::cpu::stats;
use super::slice::{self, for_float};
use crate::dist::Ranks;

/// Mean and biased variance of each channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// Mean per channel.
    pub mean: Vec<f64>,
    /// Mean squared deviation per channel.
    pub var: Vec<f64>,
}

/// Added to the variance; PyTorch's default.
pub const EPS: f64 = 1e-5;
/// Running variance, in f32, with which a batch norm of mean 0, weight 1 and bias 0 is the identity, bit for bit.
pub const IDENTITY_VAR: f32 = (1.0 - EPS) as f32;
/// Weight of the newest batch in the running statistics; PyTorch's default.
pub const MOMENTUM: f64 = 0.1;

impl Stats {
    /// Returns the unbiased variances of `count` values per channel, which running statistics keep.
    ///
    /// # Errors
    /// When there is only one value.
    pub fn unbiased_var(&self, count: usize) -> Result<Vec<f64>> {
        if count < 2 {
            bail!("batch_norm: training needs more than one value per channel");
        }
        let unbiased = count as f64 / (count - 1) as f64;
        Ok(self.var.iter().map(|var| var * unbiased).collect())
    }

    /// Returns the statistics of the values of all ranks, of which each has as many (Chan et al., 1979).
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    pub(crate) fn over_ranks(&self, ranks: &Ranks) -> crate::Result<Self> {
        let (c, share) = (self.mean.len(), 1.0 / ranks.size() as f64);
        let all = ranks.gather_f64(&[&self.mean[..], &self.var].concat())?;
        let mut joined = Self { mean: vec![0.0; c], var: vec![0.0; c] };
        for of_rank in &all {
            joined.mean.iter_mut().zip(of_rank).for_each(|(mean, of_rank)| *mean += share * of_rank);
        }
        for (mean, var) in all.iter().filter_map(|of_rank| of_rank.split_at_checked(c)) {
            for (i, joined_var) in joined.var.iter_mut().enumerate() {
                *joined_var += share * (var[i] + (mean[i] - joined.mean[i]).powi(2));
            }
        }
        Ok(joined)
    }
}

/// Whether the statistics depend on the input, as in training, or are constants, as in evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsOrigin {
    /// Statistics of this input; the gradient flows through them.
    Batch,
    /// Running averages, constant for the gradient.
    Running,
}

/// Returns the statistics of `x: (.., C)`, f32 or f64, over all axes but the last; blocks of rows are joined in f64.
///
/// # Errors
/// When `x` is empty or of another dtype.
pub fn batch_stats(x: &Tensor) -> Result<Stats> {
    let x = x.contiguous()?;
    let channels = channels(x.shape())?;
    if x.elem_count() == 0 {
        bail!("batch_norm: no values in {:?}", x.shape());
    }
    let (storage, layout) = x.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        let rows = x.reshape(((), channels))?;
        let mean = rows.mean(0)?;
        let var = rows.broadcast_sub(&mean)?.sqr()?.mean(0)?;
        return Ok(Stats { mean: to_f64(&mean)?, var: to_f64(&var)? });
    };
    Ok(for_float!("batch_norm", storage, T => cpu::stats(slice::cpu::<T>("batch_norm", storage, layout)?, channels)))
}

/// Returns `(x - mean) / sqrt(var + eps) * weight + bias`, of the shape of `x`.
///
/// - `x`: `(.., C)`, f32 or f64
/// - `weight`, `bias`: `(C)`, same dtype
/// - `stats`: from [`batch_stats`] of the same `x` for [`StatsOrigin::Batch`]
///
/// `x`, `weight` and `bias` receive gradients.
///
/// # Errors
/// When shapes or dtypes do not match.
pub fn batch_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    stats: &Stats,
    origin: StatsOrigin,
    eps: f64,
) -> Result<Tensor> {
    let c = channels(x.shape())?;
    if weight.dims() != [c] || bias.dims() != [c] || stats.mean.len() != c || stats.var.len() != c {
        bail!(
            "batch_norm: input {:?} does not fit weight {:?}, bias {:?} and statistics of {} channels",
            x.shape(),
            weight.shape(),
            bias.shape(),
            stats.mean.len()
        );
    }
    if !x.device().is_cpu() {
        return batch_norm_reference(x, weight, bias, (stats, origin), eps);
    }
    let inv_std = stats.var.iter().map(|v| 1.0 / (v + eps).sqrt()).collect();
    let op = BatchNorm { mean: stats.mean.clone(), inv_std, origin };
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

/// [`batch_norm`] made of candle's tensor ops, for tests and other devices than the CPU.
///
/// # Errors
/// Same as [`batch_norm`].
pub fn batch_norm_reference(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    (stats, origin): (&Stats, StatsOrigin),
    eps: f64,
) -> Result<Tensor> {
    let c = channels(x.shape())?;
    let rows = x.reshape(((), c))?;
    let constant = |values: &[f64]| Tensor::new(values, x.device())?.to_dtype(x.dtype());
    let is_of_batch = origin == StatsOrigin::Batch;
    let mean = if is_of_batch { rows.mean(0)? } else { constant(&stats.mean)? };
    let centred = rows.broadcast_sub(&mean)?;
    let var = if is_of_batch { centred.sqr()?.mean(0)? } else { constant(&stats.var)? };
    let std = (var + eps)?.sqrt()?;
    centred.broadcast_div(&std)?.broadcast_mul(weight)?.broadcast_add(bias)?.reshape(x.shape())
}

fn channels(shape: &Shape) -> Result<usize> {
    match shape.dims().last() {
        Some(&c) if c > 0 => Ok(c),
        _ => bail!("batch_norm: expected at least one channel in the last axis, found {shape:?}"),
    }
}

struct BatchNorm {
    mean: Vec<f64>,
    inv_std: Vec<f64>,
    origin: StatsOrigin,
}

impl CustomOp3 for BatchNorm {
    fn name(&self) -> &'static str {
        "batch_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = for_float!("batch_norm", x, T => {
            let w = slice::cpu::<T>("batch_norm", w, wl)?;
            let b = slice::cpu::<T>("batch_norm", b, bl)?;
            let affine = cpu::Affine::new(&self.mean, &self.inv_std, w, b);
            <T as candle_core::WithDType>::to_cpu_storage_owned(affine.apply(slice::cpu("batch_norm", x, xl)?))
        });
        Ok((y, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _b: &Tensor,
        _y: &Tensor,
        gy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gy = gy.contiguous()?;
        // Row 0: the sum of gy, the bias's gradient; row 1: the sum of gy * x_hat, the weight's.
        let sums = Sums { mean: self.mean.clone(), inv_std: self.inv_std.clone() };
        let sums = x.apply_op2_no_bwd(&gy, &sums)?;
        let c = self.mean.len();
        let count = x.elem_count() / c;
        let mut terms = cpu::GradTerms::new(&self.mean, &self.inv_std, &to_f64(w)?);
        if self.origin == StatsOrigin::Batch {
            terms.through_stats(&to_f64(&sums)?, count);
        }
        let gx = x.apply_op2_no_bwd(&gy, &GradX(terms))?;
        Ok((Some(gx), Some(sums.get(1)?), Some(sums.get(0)?)))
    }
}

fn to_f64(x: &Tensor) -> Result<Vec<f64>> {
    x.flatten_all()?.to_dtype(candle_core::DType::F64)?.to_vec1()
}

struct Sums {
    mean: Vec<f64>,
    inv_std: Vec<f64>,
}

impl CustomOp2 for Sums {
    fn name(&self) -> &'static str {
        "batch_norm_sums"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, gy: &CpuStorage, gyl: &Layout) -> Result<(CpuStorage, Shape)> {
        let sums = for_float!("batch_norm_sums", x, T => {
            let (x, gy) = (slice::cpu::<T>("batch_norm_sums", x, xl)?, slice::cpu::<T>("batch_norm_sums", gy, gyl)?);
            let sums = cpu::grad_sums(x, gy, &self.mean, &self.inv_std);
            <T as candle_core::WithDType>::to_cpu_storage_owned(sums)
        });
        Ok((sums, Shape::from((2, self.mean.len()))))
    }
}

struct GradX(cpu::GradTerms);

impl CustomOp2 for GradX {
    fn name(&self) -> &'static str {
        "batch_norm_grad_x"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, gy: &CpuStorage, gyl: &Layout) -> Result<(CpuStorage, Shape)> {
        let gx = for_float!("batch_norm_grad_x", x, T => {
            let (x, gy) = (slice::cpu::<T>("batch_norm_grad_x", x, xl)?, slice::cpu::<T>("batch_norm_grad_x", gy, gyl)?);
            <T as candle_core::WithDType>::to_cpu_storage_owned(self.0.apply(x, gy))
        });
        Ok((gx, xl.shape().clone()))
    }
}
