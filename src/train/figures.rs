//! Figures of a batch, summed over its mini-batches.

use super::step::StepReport;

/// Sums over the mini-batches so far.
#[derive(Default)]
pub(super) struct Figures {
    /// Margin loss, weighted.
    pub margin_loss: f64,
    /// Distillation loss, unweighted.
    pub distill_loss: f64,
    /// Cosine of each image's embedding and its class centre; NaN without a label.
    pub target_cosines: Vec<f64>,
    /// Sum of the normalised embeddings.
    direction: Vec<f64>,
}

impl Figures {
    /// Adds the directions of embeddings `(N, d)`, given row by row.
    pub fn add_directions(&mut self, embeddings: &[f32], d: usize) {
        self.direction.resize(d, 0.0);
        for row in embeddings.chunks_exact(d.max(1)) {
            let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            self.direction.iter_mut().zip(row).for_each(|(sum, v)| *sum += f64::from(*v) / norm);
        }
    }

    /// Returns the report of a complete batch of `n` images; `lambda` is the weight of the distillation loss.
    pub fn report(self, n: usize, lambda: f64) -> StepReport {
        let n = n as f64;
        let known: Vec<f64> = self.target_cosines.iter().copied().filter(|cosine| !cosine.is_nan()).collect();
        let squares: f64 = self.direction.iter().map(|v| v * v).sum();
        StepReport {
            loss: self.margin_loss + lambda * self.distill_loss,
            margin_loss: self.margin_loss,
            distill_loss: self.distill_loss,
            mean_cosine: (n > 1.0).then(|| (squares - n) / (n * (n - 1.0))),
            target_cosine: (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64),
            target_cosines: self.target_cosines,
            ..StepReport::default()
        }
    }
}
