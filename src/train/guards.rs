//! Signs that a training learns nothing although all of its figures are finite.

use candle_core::Tensor;

use super::step::StepReport;
use crate::error::Result;

/// From this mean cosine on the embeddings of a batch are as good as one.
const COLLAPSED: f64 = 0.9;
/// Steps in a row with such a batch before it is said.
const NUM_COLLAPSED: usize = 20;
/// A centre whose length is below this share of the median has none.
const NO_LENGTH: f64 = 1e-6;
/// People who are named.
const NUM_NAMED: usize = 3;

/// What was seen of the classes in an epoch, and of the batches.
#[derive(Debug)]
pub(super) struct Guards {
    /// By class: the sum of the cosines of its images and its centre, and how many there were.
    cosines: Vec<(f64, u32)>,
    num_collapsed: usize,
}

impl Guards {
    pub fn new(num_classes: usize) -> Self {
        Self { cosines: vec![(0.0, 0); num_classes], num_collapsed: 0 }
    }

    /// Takes note of a step on images with these labels; returns what is to be said of it.
    pub fn step(&mut self, labels: &[i64], report: &StepReport) -> Option<String> {
        for (label, cosine) in labels.iter().zip(&report.target_cosines).filter(|(_, cosine)| cosine.is_finite()) {
            if let Some((sum, num)) = usize::try_from(*label).ok().and_then(|label| self.cosines.get_mut(label)) {
                *sum += cosine;
                *num += 1;
            }
        }
        let mean = report.mean_cosine?;
        self.num_collapsed = if mean >= COLLAPSED { self.num_collapsed + 1 } else { 0 };
        (self.num_collapsed == NUM_COLLAPSED).then(|| {
            format!(
                "the embeddings collapse: for {NUM_COLLAPSED} steps the mean cosine of a batch's pairs was {COLLAPSED} or more, now \
                 {mean:.3}. All faces look the same to the network: try a lower rate or a weaker loss"
            )
        })
    }

    /// Ends an epoch; returns what is to be said of the class centres `(d, K)`, whose people `name` knows. `is_first`: cosines are still
    /// those of a start, and say nothing.
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
            say(dead, "are dead, the embeddings of their images pointed away from them all epoch");
        }
        if let Some(centres) = centres {
            let lengths: Vec<f32> = centres.sqr()?.sum(0)?.sqrt()?.to_vec1()?;
            let mut sorted: Vec<f32> = lengths.iter().copied().filter(|length| length.is_finite()).collect();
            sorted.sort_by(f32::total_cmp);
            let median = f64::from(sorted.get(sorted.len() / 2).copied().unwrap_or_default());
            let is_dead =
                |(_, length): &(usize, &f32)| !length.is_finite() || f64::from(**length) <= NO_LENGTH * median;
            let dead = lengths.iter().enumerate().filter(is_dead).map(|(class, _)| class).collect();
            say(dead, "are dead, of no length or not finite");
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
            said.extend(guards.step(&[], &report(0.5)));
            said.extend((0..50).filter_map(|_| guards.step(&[], &report(0.95))));
        }
        assert_eq!(said.len(), 3, "once each time: {said:?}");
        assert!(said[0].contains("collapse"), "{said:?}");
    }

    #[test]
    fn dead_centres_are_counted_and_named() -> Result<()> {
        let mut guards = Guards::new(4);
        let report = |cosines: &[f64]| StepReport { target_cosines: cosines.to_vec(), ..StepReport::default() };
        let centres = Tensor::from_vec(vec![1f32, 1.0, 0.0, f32::NAN, 1.0, 2.0, 0.0, 1.0], (2, 4), &Device::Cpu)?;
        for is_first in [true, false] {
            guards.step(&[0, 1, 1, -1], &report(&[0.5, -0.5, 0.2, f64::NAN]));
            let said = guards.epoch(Some(&centres), is_first, name)?.join("\n");
            assert!(
                said.contains("2 of 4 class centres are dead, of no length or not finite: person 2, person 3"),
                "{said}"
            );
            let away = said.contains("1 of 4 class centres are dead, the embeddings");
            assert_eq!(away, !is_first, "{said}");
        }
        // Nothing is left of the epoch before.
        assert_eq!(guards.epoch(None, false, name)?, Vec::<String>::new());
        Ok(())
    }
}
