//! Warnings that a network is not learning although all figures are finite.

use candle_core::Tensor;

use crate::error::Result;
use crate::records::StepReport;

/// Mean cosine from which on the embeddings of a batch count as collapsed.
const COLLAPSED: f64 = 0.9;
/// Consecutive collapsed batches before the warning.
const NUM_COLLAPSED: usize = 20;
/// A class centre no longer than this fraction of the median length is dead.
const NO_LENGTH: f64 = 1e-6;
/// Identities named in a warning.
const NUM_NAMED: usize = 3;

/// Cosines of an epoch by class, and the current run of collapsed batches.
#[derive(Debug)]
pub(super) struct Guards {
    /// For each class, the sum of the cosines between its images and its centre, and their number.
    cosines: Vec<(f64, u32)>,
    num_collapsed: usize,
}

impl Guards {
    pub fn new(num_classes: usize) -> Self {
        Self { cosines: vec![(0.0, 0); num_classes], num_collapsed: 0 }
    }

    /// Records a step; returns a warning if one is due.
    pub fn step(&mut self, report: &StepReport) -> Option<String> {
        for (label, cosine) in report.labels.iter().zip(&report.target_cosines).filter(|(_, cosine)| cosine.is_finite())
        {
            if let Some((sum, num)) = usize::try_from(*label).ok().and_then(|label| self.cosines.get_mut(label)) {
                *sum += cosine;
                *num += 1;
            }
        }
        let mean = report.mean_cosine?;
        self.num_collapsed = if mean >= COLLAPSED { self.num_collapsed + 1 } else { 0 };
        (self.num_collapsed == NUM_COLLAPSED).then(|| {
            format!(
                "the embeddings have collapsed: in {NUM_COLLAPSED} recorded steps in a row the mean cosine of a \
                 batch's pairs was {COLLAPSED} or more, now {mean:.3}; try a lower learning rate or a weaker loss"
            )
        })
    }

    /// Ends an epoch; returns warnings about the class centres `(d, K)`. `name` returns the name of a class. In the
    /// first epoch (`is_first`) the cosines are still those of the initial weights and are ignored.
    pub fn epoch(
        &mut self,
        centres: Option<&Tensor>,
        is_first: bool,
        name: impl Fn(usize) -> String,
    ) -> Result<Vec<String>> {
        let seen: Vec<_> = self.cosines.iter_mut().map(std::mem::take).collect();
        let num = self.cosines.len();
        let mut said = Vec::new();
        let mut say = |dead: Vec<usize>, what: &str| {
            if !dead.is_empty() {
                let names: Vec<String> = dead.iter().take(NUM_NAMED).map(|class| name(*class)).collect();
                said.push(format!("{} of {num} class centres {what}: {} ...", dead.len(), names.join(", ")));
            }
        };
        if !is_first {
            let is_dead = |(_, (sum, num)): &(usize, &(f64, u32))| *num > 0 && *sum <= 0.0;
            let dead = seen.iter().enumerate().filter(is_dead).map(|(class, _)| class).collect();
            say(dead, "are dead, with a mean cosine to their own images of 0 or less over the epoch");
        }
        if let Some(centres) = centres {
            let lengths: Vec<f32> = centres.sqr()?.sum(0)?.sqrt()?.to_vec1()?;
            let mut sorted: Vec<f32> = lengths.iter().copied().filter(|length| length.is_finite()).collect();
            sorted.sort_by(f32::total_cmp);
            let median = f64::from(sorted.get(sorted.len() / 2).copied().unwrap_or_default());
            let is_dead =
                |(_, length): &(usize, &f32)| !length.is_finite() || f64::from(**length) <= NO_LENGTH * median;
            let dead = lengths.iter().enumerate().filter(is_dead).map(|(class, _)| class).collect();
            say(dead, "are dead, with a zero or non-finite length");
        }
        Ok(said)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn name(class: usize) -> String {
        format!("person {class}")
    }

    #[test]
    fn collapsed_embeddings_are_said_once() {
        let mut guards = Guards::new(2);
        let report = |mean_cosine| StepReport { mean_cosine: Some(mean_cosine), ..StepReport::default() };
        let mut said = Vec::new();
        for _ in 0..3 {
            said.extend(guards.step(&report(0.5)));
            said.extend((0..50).filter_map(|_| guards.step(&report(0.95))));
        }
        assert_eq!(said.len(), 3, "once each time: {said:?}");
        assert!(said[0].contains("collapse"), "{said:?}");
    }

    #[test]
    fn dead_centres_are_counted_and_named() -> Result<()> {
        let mut guards = Guards::new(4);
        let report = |labels: &[i64], cosines: &[f64]| StepReport {
            labels: labels.to_vec(),
            target_cosines: cosines.to_vec(),
            ..StepReport::default()
        };
        let centres = Tensor::from_vec(vec![1f32, 1.0, 0.0, f32::NAN, 1.0, 2.0, 0.0, 1.0], (2, 4), &Device::Cpu)?;
        for is_first in [true, false] {
            guards.step(&report(&[0, 1, 1, -1], &[0.5, -0.5, 0.2, f64::NAN]));
            let said = guards.epoch(Some(&centres), is_first, name)?.join("\n");
            assert!(
                said.contains("2 of 4 class centres are dead, with a zero or non-finite length: person 2, person 3"),
                "{said}"
            );
            let away = said.contains("1 of 4 class centres are dead, with a mean cosine to their own images");
            assert_eq!(away, !is_first, "{said}");
        }
        // The next epoch starts from empty sums.
        assert_eq!(guards.epoch(None, false, name)?, Vec::<String>::new());
        Ok(())
    }
}
