//! The margin softmax in one op: cosines, margin and cross-entropy, with one matrix of rows by classes in memory.
//!
//! The class centres are read once forward and once backward, in blocks that stay in the cache. With
//! `c_j = e_hat . w_j / ||w_j||` and `g_j` the gradient of `c_j`, the gradient of a centre is
//! `(sum_n g_nj e_hat_n - w_hat_j sum_n g_nj c_nj) / ||w_j||`: the part along the centre needs the saved cosines only.

mod cpu;
mod kernel;
mod margin;
mod matching;
mod softmax;

use std::any::Any;
use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Storage, Tensor, bail};

use super::slice::{self, for_float};
use crate::dist::{ELSEWHERE, Ranks};
use cpu::Dims;
use kernel::Real;
pub use margin::{MarginForm, MarginGradient};
pub use matching::{PlusMatching, match_margins};
use softmax::{Gradient, RowSum};

const NAME: &str = "margin_loss";

/// Settings of [`margin_loss`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MarginLossConfig {
    /// Quantity that the margin is applied to.
    pub form: MarginForm,
    /// Gradient of the margin.
    pub gradient: MarginGradient,
    /// Factor from cosines to the logits of the softmax.
    pub scale: f64,
    /// Rule that reorders the margins by the target cosines, in the "+" forms of ElasticFace.
    pub matching: Option<PlusMatching>,
}

/// Labels and margins of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// `N` targets below `K`, or -1 for a row to ignore.
    pub labels: &'a [i64],
    /// `N` margins, in radians for [`MarginForm::Angular`].
    pub margins: &'a [f64],
}

impl Rows<'_> {
    /// Checks the labels and margins of `n` rows and `k` classes.
    ///
    /// # Errors
    /// When there are not `n` labels or margins, or a label is below -1 or not below `k`.
    fn check(&self, n: usize, k: usize) -> Result<()> {
        self.check_labels(n, k, |label| (-1..k as i64).contains(&label))
    }

    /// Like [`Self::check`], but a row's class may be [`ELSEWHERE`].
    pub(crate) fn check_shared(&self, n: usize, k: usize, ranks: Option<&Ranks>) -> Result<()> {
        let shares = ranks.is_some();
        self.check_labels(n, k, |label| (-1..k as i64).contains(&label) || (shares && label == ELSEWHERE))
    }

    fn check_labels(&self, n: usize, k: usize, fits: impl Fn(i64) -> bool) -> Result<()> {
        let Self { labels, margins } = self;
        if labels.len() != n || margins.len() != n {
            bail!("{NAME}: {n} rows, but {} labels and {} margins", labels.len(), margins.len());
        }
        match labels.iter().position(|label| !fits(*label)) {
            Some(row) => bail!("{NAME}: row {row}: expected a label below {k} or -1, found {}", labels[row]),
            None => Ok(()),
        }
    }
}

/// Returns the scalar mean of `-log softmax(scale * cosines with margin)[label]` over the rows with a label (ArcFace,
/// Deng et al., CVPR 2019, eq. 3; CosFace, Wang et al., CVPR 2018, eq. 4); 0 if none has one.
///
/// - `embedding`: `(N, d)`, f32 or f64, normalised here
/// - `kernel`: `(d, K)`, class centres of the same dtype, normalised here
///
/// Both tensors receive a gradient that is finite everywhere and does not pass cosines that were clamped to `[-1, 1]`.
/// The op fuses [`super::normalize::l2_normalize`], a matrix product, the margin and the cross-entropy.
///
/// # Errors
/// When shapes or dtypes do not match, a shape is empty, there are not `N` labels or margins, or a label is below -1 or
/// not below `K`.
pub fn margin_loss(embedding: &Tensor, kernel: &Tensor, rows: Rows, config: MarginLossConfig) -> Result<Tensor> {
    let ((n, d), (inputs, k)) = (embedding.dims2()?, kernel.dims2()?);
    if d != inputs || d == 0 || k == 0 {
        bail!("{NAME}: embeddings {:?} do not fit class centres {:?}", embedding.shape(), kernel.shape());
    }
    rows.check(n, k)?;
    let op = MarginLoss::new(Dims { n, d, k }, rows, config);
    embedding.contiguous()?.apply_op2(&kernel.contiguous()?, op)
}

/// The margin loss of a batch with its gradients.
#[derive(Clone, Debug)]
pub struct WithGradients<T = f32> {
    /// Mean cross-entropy of the rows with a label.
    pub loss: f64,
    /// Gradient with respect to the embeddings, `(N, d)`.
    pub of_embeddings: Vec<T>,
    /// Cosine between each row and its class centre, in `[-1, 1]`; `None` for a row without a label.
    pub target_cosines: Vec<Option<f64>>,
}

/// Returns the loss of [`margin_loss`] and `weight` times its gradient with respect to the embeddings; writes `weight`
/// times the gradient of the class centres to `of_kernel`. This avoids candle's graph, which adds every gradient to one
/// of zeros.
///
/// - `embeddings`: `(N, d)`, `kernel` and `of_kernel`: `(d, K)`, row-major
///
/// # Errors
/// Same as [`margin_loss`].
pub fn margin_loss_with_gradients(
    embeddings: &[f32],
    kernel: &[f32],
    rows: Rows,
    config: MarginLossConfig,
    weight: f64,
    of_kernel: &mut [f32],
) -> Result<WithGradients> {
    with_gradients(embeddings, kernel, MarginTask { rows, config, weight, ranks: None }, of_kernel)
}

/// What is asked of a margin loss.
#[derive(Clone, Copy, Debug)]
pub struct MarginTask<'a> {
    /// Labels and margins of the batch. If ranks share the classes, a row whose class is not among the given centres has
    /// the label `i64::MAX`.
    pub rows: Rows<'a>,
    /// Settings of the loss.
    pub config: MarginLossConfig,
    /// Factor of the gradients.
    pub weight: f64,
    /// Ranks that share the classes. All give the same rows with the centres of their own classes, and the labels among
    /// these.
    pub ranks: Option<&'a Ranks>,
}

/// [`margin_loss_with_gradients`] by the class centres of all ranks, of which each gives its own: the loss and the target
/// cosines are those of all classes, and the gradients of the embeddings on all ranks have to be added.
///
/// The softmax needs the largest logit of a row, its sum and the target's cosine over the classes of all ranks: they are
/// joined in the order of the ranks.
pub(crate) fn with_gradients<T: Real>(
    embeddings: &[T],
    kernel: &[T],
    task: MarginTask,
    of_kernel: &mut [T],
) -> Result<WithGradients<T>> {
    let MarginTask { rows, config, weight, ranks } = task;
    let n = rows.labels.len();
    let d = embeddings.len() / n.max(1);
    let k = kernel.len() / d.max(1);
    if n * d != embeddings.len() || d == 0 || k * d != kernel.len() || k == 0 || of_kernel.len() != kernel.len() {
        let (e, w, g) = (embeddings.len(), kernel.len(), of_kernel.len());
        bail!("{NAME}: {e} elements in {n} embeddings do not fit {w} of class centres and {g} of their gradient");
    }
    rows.check_shared(n, k, ranks)?;
    let op = MarginLoss::new(Dims { n, d, k }, rows, config);
    T::with_scratch(op.dims.saved(), |saved| {
        let sums = op.sums(embeddings, kernel, saved);
        let sums = match ranks {
            Some(ranks) => RowSum::over_ranks(&sums, ranks).map_err(candle_core::Error::wrap)?,
            None => sums,
        };
        let (loss, softmax) = op.softmax(sums);
        let of_embeddings = op.backward(embeddings, kernel, (saved, &softmax), weight, of_kernel);
        let target_cosines = softmax.iter().map(|row| row.as_ref().map(|row| row.cosine)).collect();
        Ok(WithGradients { loss, of_embeddings, target_cosines })
    })
}

struct MarginLoss {
    config: MarginLossConfig,
    labels: Vec<i64>,
    margins: Vec<f64>,
    dims: Dims,
    /// [`Saved`] of the tensors' element type, once the forward pass has run.
    saved: OnceLock<Box<dyn Any + Send + Sync>>,
}

/// Values of the forward pass that the backward pass needs.
struct Saved<T> {
    /// Written by [`cpu::forward`].
    cosines: Vec<T>,
    rows: Vec<Row>,
}

/// Softmax of a row and the gradient of its loss with respect to the target's cosine; `None` for a row without a label.
type Row = Option<RowSoftmax>;

struct RowSoftmax {
    cosine: f64,
    max: f64,
    sum: f64,
    loss: f64,
    target: f64,
}

impl MarginLoss {
    fn new(dims: Dims, rows: Rows, config: MarginLossConfig) -> Self {
        let (labels, margins) = (rows.labels.to_vec(), rows.margins.to_vec());
        Self { config, labels, margins, dims, saved: OnceLock::new() }
    }

    /// Returns each row's sum over all classes but the target; writes `cosines` for the backward pass.
    fn sums<T: Real>(&self, e: &[T], w: &[T], cosines: &mut [T]) -> Vec<RowSum<T>> {
        cpu::forward(e, w, self.dims, &self.labels, self.config.scale, cosines)
    }

    /// Returns the loss, rounded to `T`, and each row's softmax for the backward pass.
    fn softmax<T: Real>(&self, sums: Vec<RowSum<T>>) -> (f64, Vec<Row>) {
        let targets: Vec<Option<f64>> = sums.iter().map(RowSum::target_cosine).collect();
        let matched = self.config.matching.map(|matching| match_margins(&targets, &self.margins, matching));
        let margins = matched.as_ref().unwrap_or(&self.margins);
        let rows: Vec<Row> = sums.into_iter().zip(margins).map(|(sum, margin)| self.row(sum, *margin)).collect();
        let counted = rows.iter().flatten().count();
        let loss = rows.iter().flatten().map(|row| row.loss).sum::<f64>() / counted.max(1) as f64;
        (T::from_f64(loss).to_f64(), rows)
    }

    /// Returns a row's softmax from its sum without the target.
    fn row<T: Real>(&self, mut sum: RowSum<T>, margin: f64) -> Row {
        let MarginLossConfig { form, gradient, scale, .. } = self.config;
        let cosine = sum.target_cosine()?;
        // Rounded like the other logits.
        let logit = T::from_f64(form.value(cosine, margin) * scale).to_f64();
        sum.add_logit(logit);
        let slope = if sum.is_target_inside() { form.slope(gradient, cosine, margin) } else { 0.0 };
        let p = (logit - sum.max).exp() / sum.sum;
        let loss = sum.max + sum.sum.ln() - logit;
        Some(RowSoftmax { cosine, max: sum.max, sum: sum.sum, loss, target: (p - 1.0) * slope })
    }

    /// Writes `gy` times the gradient of the kernel to `gw` and returns `gy` times that of the embeddings.
    fn backward<T: Real>(&self, e: &[T], w: &[T], (cosines, rows): (&[T], &[Row]), gy: f64, gw: &mut [T]) -> Vec<T> {
        let scale = self.config.scale;
        let factor = gy * scale / rows.iter().flatten().count().max(1) as f64;
        let gradient = |(row, &label): (&Row, &i64)| match row {
            Some(row) => Gradient {
                is_known: true,
                label: usize::try_from(label).ok(),
                target: T::from_f64(row.target * factor),
                max: T::from_f64(row.max),
                factor: T::from_f64(factor / row.sum),
                scale: T::from_f64(scale),
            },
            None => Gradient {
                is_known: false,
                label: None,
                target: T::zero(),
                max: T::zero(),
                factor: T::zero(),
                scale: T::zero(),
            },
        };
        let rows: Vec<Gradient<T>> = rows.iter().zip(&self.labels).map(gradient).collect();
        cpu::backward(e, w, self.dims, cosines, &rows, gw)
    }
}

impl CustomOp2 for MarginLoss {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, e: &CpuStorage, el: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let loss = for_float!(NAME, e, T => {
            let mut cosines = vec![<T as candle_core::WithDType>::from_f64(0.0); self.dims.saved()];
            let (e, w) = (slice::cpu::<T>(NAME, e, el)?, slice::cpu::<T>(NAME, w, wl)?);
            let (loss, rows) = self.softmax(self.sums(e, w, &mut cosines));
            if self.saved.set(Box::new(Saved { cosines, rows })).is_err() {
                bail!("{NAME}: one forward pass per op");
            }
            <T as candle_core::WithDType>::to_cpu_storage_owned(vec![<T as candle_core::WithDType>::from_f64(loss)])
        });
        Ok((loss, Shape::from(())))
    }

    fn bwd(&self, e: &Tensor, w: &Tensor, _y: &Tensor, gy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gy = gy.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let ((e_storage, el), (w_storage, wl)) = (e.storage_and_layout(), w.storage_and_layout());
        let (Storage::Cpu(e_storage), Storage::Cpu(w_storage)) = (&*e_storage, &*w_storage) else {
            bail!("{NAME}: expected tensors on the CPU");
        };
        for_float!(NAME, e_storage, T => {
            let Some(saved) = self.saved.get().and_then(|saved| saved.downcast_ref::<Saved<T>>()) else {
                bail!("{NAME}: backward without the forward pass");
            };
            let (e_slice, w_slice) = (slice::cpu::<T>(NAME, e_storage, el)?, slice::cpu::<T>(NAME, w_storage, wl)?);
            let mut gw = vec![<T as candle_core::WithDType>::from_f64(0.0); w_slice.len()];
            let ge = self.backward(e_slice, w_slice, (&saved.cosines, &saved.rows), gy, &mut gw);
            Ok((Some(Tensor::from_vec(ge, el.shape(), e.device())?), Some(Tensor::from_vec(gw, wl.shape(), w.device())?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dist::ClassShard;
    use crate::dist::threads::on_ranks;
    use crate::testing::fill;

    fn numbers(name: &str, shape: [usize; 2]) -> Result<Vec<f64>> {
        fill(name, &shape, -1.0, 1.0)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
    }

    /// Loss, gradients and target cosines of a shard of the classes, whose centres are `(d, K)`.
    fn of_shard(
        e: &[f64],
        w: &[f64],
        rows: Rows,
        config: MarginLossConfig,
        shard: &ClassShard,
    ) -> crate::Result<(WithGradients<f64>, Vec<f64>)> {
        let columns = |row: &[f64]| row[shard.classes.clone()].to_vec();
        let own: Vec<f64> = w.chunks_exact(shard.total).flat_map(columns).collect();
        let mut of_own = vec![0.0; own.len()];
        let labels = shard.own(rows.labels)?;
        let rows = Rows { labels: &labels, ..rows };
        let task = MarginTask { rows, config, weight: 0.7, ranks: Some(&shard.ranks) };
        Ok((with_gradients(e, &own, task, &mut of_own)?, of_own))
    }

    #[test]
    fn shards_of_the_classes_give_the_loss_of_all() -> crate::Result<()> {
        let (n, d, k) = (9, 12, 301);
        let (e, w) = (numbers("e", [n, d])?, numbers("w", [d, k])?);
        // Targets in the first and in the last shard, one image without a label, one cosine that is clamped.
        let labels: Vec<i64> = vec![0, 300, 7, -1, 150, 151, 299, 100, 7];
        let margins: Vec<f64> = (0..n).map(|i| 0.3 + 0.05 * i as f64).collect();
        let rows = Rows { labels: &labels, margins: &margins };
        for (form, matching) in [
            (MarginForm::Angular, None),
            (MarginForm::Cosine, Some(PlusMatching::Ranked)),
            (MarginForm::Angular, Some(PlusMatching::Reference)),
        ] {
            let config = MarginLossConfig { form, gradient: MarginGradient::True, scale: 64.0, matching };
            let mut of_w = vec![0.0; d * k];
            let expected = with_gradients(&e, &w, MarginTask { rows, config, weight: 0.7, ranks: None }, &mut of_w)?;
            for size in [1, 2, 3, 4] {
                let found = on_ranks(size, |ranks| {
                    let shard = ClassShard::new(&ranks, k)?;
                    Ok((of_shard(&e, &w, rows, config, &shard)?, shard.classes))
                });
                let found = found.into_iter().collect::<crate::Result<Vec<_>>>()?;
                let mut of_e = vec![0.0; n * d];
                for ((found, of_own), classes) in &found {
                    assert!((found.loss - expected.loss).abs() < 1e-10, "{} of {}", found.loss, expected.loss);
                    assert_eq!(found.target_cosines, expected.target_cosines);
                    of_e.iter_mut().zip(&found.of_embeddings).for_each(|(sum, own)| *sum += own);
                    let columns = of_w.chunks_exact(k).flat_map(|row| &row[classes.clone()]);
                    assert!(columns.zip(of_own).all(|(expected, found)| (expected - found).abs() < 1e-10));
                }
                let off = of_e.iter().zip(&expected.of_embeddings).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(off < 1e-10, "{size} ranks: {off}");
            }
        }
        Ok(())
    }
}
