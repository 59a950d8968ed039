//! The objective on a GPU: a classification head with its class centres, the distance from a teacher, and the
//! projection to the teacher's embeddings.

use std::collections::BTreeMap;

use candle_core::{Device as Candle, Result, Tensor, bail};
use rand_chacha::ChaCha8Rng;

use super::distill::{DistillConfig, DistillKind};
use super::elastic::PlusMatching;
use super::margin::{KERNEL, MarginConfig, MarginHead};
use super::projection::{Projection, WEIGHT};
use crate::gpu::distill::{Distance, Squares};
use crate::gpu::margin::{Centres, MAX_COSINES, MarginLoss, Matching, OfBatch, Rows};
use crate::gpu::update::Flat;
use crate::gpu::{Array, Device, Element, Product};

/// Class centres `(classes, embedding_size)`, f32, with their gradient.
pub(crate) struct GpuHead {
    centres: Array,
    grads: Array,
    config: MarginConfig,
    loss: MarginLoss,
    num_classes: usize,
}

impl GpuHead {
    /// Copies a head to the device; its matrix products run in `element`.
    ///
    /// # Errors
    /// When the device has no memory for it, or the embedding size is not a multiple of 8.
    pub fn upload(head: &MarginHead, device: &Device, element: Element) -> Result<Self> {
        let kernel = head.kernel();
        let (size, num_classes) = kernel.dims2()?;
        if !size.is_multiple_of(8) {
            bail!("the GPU engine needs an embedding size that is a multiple of 8, found {size}");
        }
        let centres = device.upload(&kernel.t()?.flatten_all()?.to_vec1::<f32>()?)?;
        let grads = device.array(Element::F32, centres.len())?;
        let config = head.config().clone();
        let matching = match (config.kind.is_plus(), config.plus_matching) {
            (false, _) => Matching::Own,
            (true, PlusMatching::Ranked) => Matching::Ranked,
            (true, PlusMatching::Reference) => Matching::Reference,
        };
        let (form, gradient, scale) = (config.kind.form(), config.gradient, config.scale as f32);
        let loss = MarginLoss { form, gradient, matching, scale, element, max_cosines: MAX_COSINES };
        Ok(Self { centres, grads, config, loss, num_classes })
    }

    /// Returns the loss and `weight` times its gradient with respect to the embeddings `(N, embedding_size)`, f32;
    /// writes the gradient of the centres.
    ///
    /// # Errors
    /// When the number of labels is not `N` or a label is out of range.
    pub fn step(&self, embeddings: &Array, labels: &[i64], weight: f64, rng: &mut ChaCha8Rng) -> Result<OfBatch> {
        crate::ops::margin::check_labels("margin", labels, self.num_classes)?;
        let margins = self.config.draw(labels.len(), rng);
        let rows = Rows::new(embeddings.device(), labels, &margins, self.loss.matching)?;
        let centres = Centres { all: &self.centres, sample: None };
        self.loss.with_gradients(embeddings, &centres, &rows, weight as f32, &self.grads)
    }

    /// Class centres and their gradient, for an update.
    pub fn flat(&self) -> Flat<'_> {
        Flat { param: &self.centres, grad: &self.grads, copy: None }
    }

    /// Reads an array in the device's layout of the class centres; returns it under the name of the head's parameter.
    /// Waits for the device.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn restored(&self, from: &Array) -> Result<BTreeMap<String, Tensor>> {
        let size = self.centres.len() / self.num_classes;
        let rows = Tensor::from_vec(from.read::<f32>()?, (self.num_classes, size), &Candle::Cpu)?;
        Ok([(KERNEL.to_owned(), rows.t()?.contiguous()?)].into())
    }

    /// Inverse of [`Self::restored`]: arranges the values that `get` returns for the head's parameter in the device's
    /// layout.
    ///
    /// # Errors
    /// When `get` returns another number of values.
    pub fn laid_out(&self, get: &mut dyn FnMut(&str) -> Result<Vec<f32>>) -> Result<Vec<f32>> {
        let (values, size) = (get(KERNEL)?, self.centres.len() / self.num_classes);
        Tensor::from_vec(values, (size, self.num_classes), &Candle::Cpu)?.t()?.flatten_all()?.to_vec1()
    }

    /// Copies the class centres back to `head`; waits for the device.
    ///
    /// # Errors
    /// When `head` has other sizes.
    pub fn download(&self, head: &MarginHead) -> Result<()> {
        head.params().load(&self.restored(&self.centres)?)
    }
}

/// A [`Projection`] on a GPU.
pub(crate) struct GpuProjection {
    /// f32, `(to, from)`.
    weight: Array,
    grads: Array,
    from: usize,
    to: usize,
}

impl GpuProjection {
    /// Copies a projection to the device.
    ///
    /// # Errors
    /// When the device has no memory for it, or an embedding size is not a multiple of 8.
    pub fn upload(projection: &Projection, device: &Device) -> Result<Self> {
        let weight = projection.weight();
        let (to, from) = weight.dims2()?;
        if !to.is_multiple_of(8) || !from.is_multiple_of(8) {
            bail!("the GPU engine needs embedding sizes that are multiples of 8, found {from} and the teacher's {to}");
        }
        let weight = device.upload(&weight.flatten_all()?.to_vec1::<f32>()?)?;
        let grads = device.array(Element::F32, weight.len())?;
        Ok(Self { weight, grads, from, to })
    }

    /// Returns the projected embeddings `(n, to)` of `(n, from)`, f32.
    ///
    /// # Errors
    /// When the device has no memory for the result, or a product fails.
    pub fn forward(&self, embeddings: &Array) -> Result<Array> {
        let (device, n) = (embeddings.device(), embeddings.len() / self.from);
        let y = device.array(Element::F32, n * self.to)?;
        let (a, b, c) = (embeddings.matrix(self.from), self.weight.matrix(self.from).transposed(), y.matrix(self.to));
        device.gpu().multiply(&Product { m: n, n: self.to, k: self.from, a, b, c, alpha: 1.0, beta: 0.0 })?;
        Ok(y)
    }

    /// Returns the gradient of the embeddings `(n, from)` from that of the projected ones, `(n, to)`; writes the
    /// gradient of the matrix.
    ///
    /// # Errors
    /// When the device has no memory for the result, or a product fails.
    pub fn backward(&self, embeddings: &Array, gy: &Array) -> Result<Array> {
        let (device, n) = (embeddings.device(), embeddings.len() / self.from);
        let gx = device.array(Element::F32, n * self.from)?;
        let (a, b, c) = (gy.matrix(self.to), self.weight.matrix(self.from), gx.matrix(self.from));
        device.gpu().multiply(&Product { m: n, n: self.from, k: self.to, a, b, c, alpha: 1.0, beta: 0.0 })?;
        let (a, b) = (gy.matrix(self.to).transposed(), embeddings.matrix(self.from));
        let c = self.grads.matrix(self.from);
        device.gpu().multiply(&Product { m: self.to, n: self.from, k: n, a, b, c, alpha: 1.0, beta: 0.0 })?;
        Ok(gx)
    }

    /// The matrix and its gradient, for an update.
    pub fn flat(&self) -> Flat<'_> {
        Flat { param: &self.weight, grad: &self.grads, copy: None }
    }

    /// Reads an array in the device's layout of the matrix; returns it under the name of the projection's parameter.
    /// Waits for the device.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn restored(&self, from: &Array) -> Result<BTreeMap<String, Tensor>> {
        let weight = Tensor::from_vec(from.read::<f32>()?, (self.to, self.from), &Candle::Cpu)?;
        Ok([(WEIGHT.to_owned(), weight)].into())
    }

    /// Loads the projection's parameter.
    ///
    /// # Errors
    /// When it is missing or of another size.
    pub fn load(&self, params: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut get = |name: &str| match params.get(name) {
            Some(tensor) => tensor.flatten_all()?.to_vec1(),
            None => bail!("projection: no {name}"),
        };
        self.weight.write(&self.laid_out(&mut get)?)
    }

    /// Inverse of [`Self::restored`].
    ///
    /// # Errors
    /// When `get` returns another number of values.
    pub fn laid_out(&self, get: &mut dyn FnMut(&str) -> Result<Vec<f32>>) -> Result<Vec<f32>> {
        let values = get(WEIGHT)?;
        if values.len() != self.weight.len() {
            bail!("{WEIGHT}: expected {} elements, found {}", self.weight.len(), values.len());
        }
        Ok(values)
    }
}

impl DistillConfig {
    /// Returns the distance for batches of `n` embeddings of `d` elements.
    pub(crate) fn on_gpu(&self, n: usize, d: usize) -> Distance {
        let (n, d) = (n as f64, d as f64);
        let (squares, scale) = match self.kind {
            DistillKind::Mse => (Squares::OfEmbeddings, 1.0 / (n * d)),
            // |s - t|^2 = 2 - 2 cos for unit vectors; the part of the gradient along s does not pass the normalisation.
            DistillKind::Cosine => (Squares::OfEmbeddings, 0.5 / n),
            DistillKind::Relational => (Squares::OfCosines, 1.0 / (n * n)),
        };
        Distance { squares, scale: scale as f32, lambda: self.lambda as f32 }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;
    use rand::SeedableRng;

    use super::*;
    use crate::gpu::tests::{close, device, numbers, read};
    use crate::losses::{MarginKind, distillation_loss};

    #[test]
    fn distances_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        for (n, d) in [(1, 8), (5, 24), (40, 136)] {
            let [s, t] = ["s", "t"].map(|name| numbers(name, n * d, [-2.0, 2.0]));
            let [on_s, on_t] = [&s, &t].map(|values| device.upload::<f32>(values));
            let (on_s, on_t) = (on_s?, on_t?);
            for kind in [DistillKind::Mse, DistillKind::Cosine, DistillKind::Relational] {
                let config = DistillConfig { kind, lambda: 30.0, margin_weight: 0.5 };
                let student = Var::from_slice(&s, (n, d), &Candle::Cpu)?;
                let expected = distillation_loss(&student, &Tensor::from_slice(&t, (n, d), &Candle::Cpu)?, kind)?;
                let grads = (&expected * config.lambda)?.backward()?;
                let expected_grad = grads.get(&student).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
                let margin = device.upload(&[3f32])?;
                let found = config.on_gpu(n, d).with_gradient(&on_s, &on_t, n, Some((&margin, 0.5)))?;
                let expected = expected.to_scalar::<f32>()?;
                // The one pair of one image has a cosine of 1 in both batches.
                if (n, kind) != (1, DistillKind::Relational) {
                    close("distance", &found.distance, &[expected], 1e-5)?;
                    close("gradient", &found.gradient, &expected_grad, 1e-4)?;
                }
                close("total", &found.total, &[30.0 * expected + 1.5], 1e-5)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_heads_step_is_that_of_the_cpu() -> Result<()> {
        let device = device();
        let (n, d, classes) = (12, 16, 45);
        let e = numbers("e", n * d, [-2.0, 2.0]);
        let labels: Vec<i64> = (0..n as i64).map(|i| if i == 3 { -1 } else { i * 5 % 45 }).collect();
        for (kind, plus_matching) in [
            (MarginKind::ArcFace, PlusMatching::Ranked),
            (MarginKind::ElasticArc, PlusMatching::Ranked),
            (MarginKind::ElasticArcPlus, PlusMatching::Ranked),
            (MarginKind::ElasticCosPlus, PlusMatching::Reference),
        ] {
            let config = MarginConfig { kind, plus_matching, ..MarginConfig::default() };
            let head = MarginHead::new(&config, d, classes, &Candle::Cpu, 4)?;
            let on_gpu = GpuHead::upload(&head, &device, Element::F32)?;
            let rng = || ChaCha8Rng::seed_from_u64(9);
            let expected = head.step(&Tensor::from_slice(&e, (n, d), &Candle::Cpu)?, &labels, 0.7, &mut rng())?;
            let found = on_gpu.step(&device.upload(&e)?, &labels, 0.7, &mut rng())?;
            close("loss", &found.loss, &[expected.loss as f32], 1e-5)?;
            let targets = read(&found.targets)?;
            assert_eq!((targets.len(), expected.target_cosines.iter().flatten().count()), (n, n - 1));
            for (found, expected) in targets.into_iter().zip(&expected.target_cosines) {
                assert!(expected.is_none_or(|expected| (f64::from(found) - expected).abs() < 1e-5));
            }
            close("embeddings", &found.gradient, &expected.of_embedding.flatten_all()?.to_vec1::<f32>()?, 1e-4)?;
            let found = Tensor::from_vec(read(on_gpu.flat().grad)?, (classes, d), &Candle::Cpu)?;
            let found = device.upload(&found.t()?.flatten_all()?.to_vec1::<f32>()?)?;
            close("centres", &found, &expected.of_head.read("kernel", <[f32]>::to_vec)?, 1e-4)?;
            let other = MarginHead::new(&config, d, classes, &Candle::Cpu, 5)?;
            on_gpu.download(&other)?;
            let kernel = |head: &MarginHead| head.kernel().flatten_all()?.to_vec1::<f32>();
            assert_eq!(kernel(&other)?, kernel(&head)?);
            let error = on_gpu.step(&device.upload(&e)?, &vec![45; n], 1.0, &mut rng()).err().map(|e| e.to_string());
            assert!(error.is_some_and(|e| e.contains("45")));
        }
        Ok(())
    }
}
