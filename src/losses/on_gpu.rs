//! The objective on a GPU: a classification head whose class centres are there, and the distance from a teacher.

use candle_core::{Device as Candle, Result, Tensor, bail};
use rand_chacha::ChaCha8Rng;

use super::distill::{DistillConfig, DistillKind};
use super::elastic::PlusMatching;
use super::margin::{MarginConfig, MarginHead};
use crate::gpu::distill::{Distance, Squares};
use crate::gpu::margin::{Centres, MAX_COSINES, MarginLoss, Matching, Rows};
use crate::gpu::{Array, Device, Element};

/// Class centres `(classes, embedding_size)`, f32, with their gradient.
pub(crate) struct GpuHead {
    centres: Array,
    grads: Array,
    config: MarginConfig,
    loss: MarginLoss,
    num_classes: usize,
}

impl GpuHead {
    /// Copies a head to the device; its products are of `element`.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn upload(head: &MarginHead, device: &Device, element: Element) -> Result<Self> {
        let kernel = head.kernel();
        let (size, num_classes) = kernel.dims2()?;
        if !size.is_multiple_of(8) {
            bail!("the GPU engine wants embeddings of a multiple of 8 elements, found {size}");
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

    /// Returns the loss, one f32, and `weight` times its gradient by the embeddings `(N, embedding_size)`, f32; that of the centres
    /// is written.
    ///
    /// # Errors
    /// When the number of labels is not `N` or a label is out of range.
    pub fn step(
        &self,
        embeddings: &Array,
        labels: &[i64],
        weight: f64,
        rng: &mut ChaCha8Rng,
    ) -> Result<(Array, Array)> {
        crate::ops::margin::check_labels("margin", labels, self.num_classes)?;
        let margins = self.config.draw(labels.len(), rng);
        let rows = Rows::new(embeddings.device(), labels, &margins, self.loss.matching)?;
        let centres = Centres { all: &self.centres, sample: None };
        self.loss.with_gradients(embeddings, &centres, &rows, weight as f32, &self.grads)
    }

    /// Centres and their gradient, for an update.
    pub fn flat(&self) -> (&Array, &Array) {
        (&self.centres, &self.grads)
    }

    /// Copies the centres back; waits for the device.
    ///
    /// # Errors
    /// When `head` is another one.
    pub fn download(&self, head: &MarginHead) -> Result<()> {
        let size = self.centres.len() / self.num_classes;
        let kernel = Tensor::from_vec(self.centres.read::<f32>()?, (self.num_classes, size), &Candle::Cpu)?;
        head.params().load(&[("kernel".to_owned(), kernel.t()?.contiguous()?)].into())
    }
}

impl DistillConfig {
    /// The distance of batches of `n` embeddings of `d` elements.
    pub(crate) fn on_gpu(&self, n: usize, d: usize) -> Distance {
        let (n, d) = (n as f64, d as f64);
        let (squares, scale) = match self.kind {
            DistillKind::Mse => (Squares::OfEmbeddings, 1.0 / (n * d)),
            // |s - t|^2 = 2 - 2 cos; what lies along s does not pass the normalisation.
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
            let (loss, of_e) = on_gpu.step(&device.upload(&e)?, &labels, 0.7, &mut rng())?;
            close("loss", &loss, &[expected.loss as f32], 1e-5)?;
            close("embeddings", &of_e, &expected.of_embedding.flatten_all()?.to_vec1::<f32>()?, 1e-4)?;
            let found = Tensor::from_vec(read(on_gpu.flat().1)?, (classes, d), &Candle::Cpu)?;
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
