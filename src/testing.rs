//! Helpers for tests of numeric code: tolerances, comparison, gradient checks and reproducible fills.

use candle_core::{DType, Device, Result, Tensor, Var, bail};

/// Tolerance of a comparison: `|a - b| <= abs + rel * |b|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tol {
    /// Absolute part.
    pub abs: f64,
    /// Part relative to the expected value.
    pub rel: f64,
}

impl Tol {
    /// One operation in f32.
    pub const F32: Self = Self { abs: 1e-5, rel: 1e-5 };
    /// Anything in f64 against f64.
    pub const F64: Self = Self { abs: 1e-9, rel: 1e-9 };
    /// Central differences in f64 against an analytic gradient.
    pub const GRAD: Self = Self { abs: 1e-6, rel: 1e-5 };
}

/// Fails, naming the worst element, unless the shapes agree and all elements of `actual` lie within `tol` of
/// `expected`; NaN is never close.
///
/// # Errors
/// When the tensors differ, or one of them cannot be read.
pub fn assert_close(what: &str, actual: &Tensor, expected: &Tensor, tol: Tol) -> Result<()> {
    if actual.dims() != expected.dims() {
        bail!("{what}: expected shape {:?}, found {:?}", expected.shape(), actual.shape());
    }
    let read = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    let mut worst: Option<(usize, f64, f64, f64)> = None;
    for (i, (a, b)) in read(actual)?.into_iter().zip(read(expected)?).enumerate() {
        let (diff, bound) = ((a - b).abs(), tol.abs + tol.rel * b.abs());
        // An infinite expected value would allow any finite one.
        let is_close = a == b || (diff.is_finite() && diff <= bound);
        if !is_close && worst.is_none_or(|(_, _, _, most)| diff.is_nan() || diff > most) {
            worst = Some((i, a, b, diff));
        }
    }
    match worst {
        Some((i, a, b, _)) => {
            bail!("{what}: element {i} of {:?}: expected {b:e}, found {a:e} ({tol:?})", expected.shape())
        }
        None => Ok(()),
    }
}

/// Compares the gradients of `sum(f(args) * weights)`, with fixed weights, with central differences of step `eps` for
/// every element of every argument.
///
/// # Errors
/// When they differ by more than `tol`, an argument receives no gradient, or `f` fails.
pub fn gradcheck(f: impl Fn(&[Tensor]) -> Result<Tensor>, args: &[Tensor], eps: f64, tol: Tol) -> Result<()> {
    let vars = args.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors)?;
    let weights = fill("gradcheck", y.dims(), -1.0, 1.0)?.to_dtype(y.dtype())?;
    let objective = |args: &[Tensor]| (f(args)? * &weights)?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>();
    let grads = (y * &weights)?.sum_all()?.backward()?;
    for (i, var) in vars.iter().enumerate() {
        let Some(grad) = grads.get(var) else { bail!("argument {i} received no gradient") };
        let values = args[i].flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let shifted = |j: usize, by: f64| -> Result<f64> {
            let mut values = values.clone();
            values[j] += by;
            let mut args = args.to_vec();
            args[i] = Tensor::from_vec(values, args[i].shape(), &Device::Cpu)?.to_dtype(args[i].dtype())?;
            objective(&args)
        };
        let numeric = (0..values.len())
            .map(|j| Ok((shifted(j, eps)? - shifted(j, -eps)?) / (2.0 * eps)))
            .collect::<Result<Vec<_>>>()?;
        let numeric = Tensor::from_vec(numeric, args[i].shape(), &Device::Cpu)?;
        assert_close(&format!("gradient of argument {i}"), grad, &numeric, tol)?;
    }
    Ok(())
}

/// Returns f64 values in `[lo, hi)` that depend on `name` only, of shape `dims`: the FNV-1a hash of the name starts a
/// splitmix64 sequence. `tests/fixtures/fill.py` is the same function.
///
/// # Errors
/// When memory cannot be allocated.
pub fn fill(name: &str, dims: &[usize], lo: f64, hi: f64) -> Result<Tensor> {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let value = |i: u64| {
        let mut z = hash.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        lo + (hi - lo) * ((z >> 11) as f64 * 2f64.powi(-53))
    };
    let n: usize = dims.iter().product();
    Tensor::from_vec((0..n as u64).map(value).collect::<Vec<f64>>(), dims, &Device::Cpu)
}
