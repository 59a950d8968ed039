//! Bootstrap confidence intervals, resampling people where they are known.
//!
//! Pairs that share a person are not independent, so people are resampled instead of pairs. Each replicate draws as
//! many people as there are, with replacement. A pair of two people gets the product of their two counts as its weight,
//! a pair of one person that person's count. This is the bootstrap over people of Bolle, Ratha and Pankanti (CVIU 2004)
//! with both sides of an impostor pair drawn, the "vertex bootstrap" of Fogliato, Patil and Perona (IJCV 2024). Where
//! people are unknown, pairs are resampled, which makes the intervals too narrow.
//!
//! Replicate `k` draws the same people for every set of comparisons with the same people, so two systems, or two
//! settings of a protocol, can be compared replicate by replicate.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::class::{Ordered, Weighted};
use super::comparisons::Comparisons;
use super::metrics::{Metrics, lowest_threshold, metrics, share_below, share_from};
use super::units::{Units, weight};
use crate::error::{Error, Result};
use crate::parallel;

/// Bootstrap settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BootstrapConfig {
    /// Number of bootstrap replicates, 100 to 1,000,000; 0 for no intervals.
    pub replicates: usize,
    /// Confidence level: share of the replicates inside an interval, in `[0.5, 1)`.
    pub confidence: f64,
    /// Seed of the resampling.
    pub seed: u64,
}

impl Default for BootstrapConfig {
    fn default() -> Self {
        Self { replicates: 1000, confidence: 0.95, seed: 0 }
    }
}

impl BootstrapConfig {
    /// Settings without intervals.
    #[cfg(test)]
    pub(super) const NONE: Self = Self { replicates: 0, confidence: 0.95, seed: 0 };

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        if self.replicates > 0 && !(100..=1_000_000).contains(&self.replicates) {
            let what = format!("bootstrap.replicates: expected 0 or 100 to 1000000, found {}", self.replicates);
            return Err(Error::Config(what));
        }
        if !(0.5..1.0).contains(&self.confidence) {
            let what = format!("bootstrap.confidence: expected 0.5 to 1 (exclusive), found {}", self.confidence);
            return Err(Error::Config(what));
        }
        Ok(())
    }

    /// Returns how often each of `num` units is drawn in replicate `k`.
    pub(super) fn draw(&self, k: usize, num: usize) -> Vec<u32> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(k as u64);
        let mut drawn = vec![0; num];
        (0..num).for_each(|_| drawn[rng.random_range(0..num)] += 1);
        drawn
    }

    /// Calls `figure` with the index of every replicate and returns the results in order.
    pub(super) fn replicates_of<T: Send>(&self, figure: impl Fn(usize) -> Option<T> + Sync) -> Vec<Option<T>> {
        parallel::map(self.replicates, figure)
    }

    /// Returns the percentile interval of a metric from its replicates; `None` if more than one in twenty has no finite
    /// value.
    pub fn interval(&self, values: impl IntoIterator<Item = Option<f64>>) -> Option<Interval> {
        let mut values: Vec<f64> = values.into_iter().flatten().filter(|v| v.is_finite()).collect();
        if values.len() * 20 < self.replicates * 19 || values.is_empty() {
            return None;
        }
        values.sort_unstable_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        Some(Interval { low: quantile(&values, tail), high: quantile(&values, 1.0 - tail) })
    }
}

/// Bootstrap confidence interval of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end: as many replicates lie below it as above [`Interval::high`].
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Resamples one set of comparisons.
#[derive(Debug)]
pub struct Bootstrap {
    genuine: Ordered,
    impostor: Ordered,
    units: Units,
    num_pairs: usize,
    config: BootstrapConfig,
}

/// Weighted scores of one replicate.
#[derive(Debug)]
pub struct Replicate<'a> {
    genuine: Weighted<'a>,
    impostor: Weighted<'a>,
}

impl Bootstrap {
    /// Prepares the bootstrap of `comparisons`.
    ///
    /// # Errors
    /// When a setting is out of range, there are 2^32 or more pairs, or a class has no pairs.
    pub fn new(comparisons: &Comparisons, config: &BootstrapConfig) -> Result<Self> {
        config.validate()?;
        let units = Units::of(comparisons)?;
        let class = |is_same: bool, name: &str| {
            let of_class = (0..comparisons.len()).filter(|&i| comparisons.is_same()[i] == is_same);
            let scored: Vec<_> = of_class.map(|i| (comparisons.scores()[i], units.of_pair(i))).collect();
            match scored.is_empty() {
                true => Err(Error::Evaluation(format!("expected at least one {name} pair, found none"))),
                false => Ok(Ordered::new(scored)),
            }
        };
        Ok(Self {
            genuine: class(true, "genuine")?,
            impostor: class(false, "impostor")?,
            units,
            num_pairs: comparisons.len(),
            config: config.clone(),
        })
    }

    /// Human-readable description, such as `1000 bootstrap resamples of 862 people`.
    pub fn describe(&self) -> String {
        format!("{} bootstrap resamples of {}", self.config.replicates, self.units)
    }

    /// Returns `figure` of every replicate, in order; `None` where a resample lacks genuine or impostor pairs. The
    /// result does not depend on the number of threads.
    pub fn replicates<T: Send>(&self, figure: impl Fn(usize, &Replicate) -> T + Sync) -> Vec<Option<T>> {
        self.config.replicates_of(|k| self.replicate(k).map(|replicate| figure(k, &replicate)))
    }

    /// Returns the weight of every pair in replicate `k`.
    pub(super) fn weights(&self, k: usize) -> Vec<u64> {
        let drawn = self.config.draw(k, self.units.num());
        (0..self.num_pairs).map(|pair| u64::from(weight(self.units.of_pair(pair), &drawn))).collect()
    }

    fn replicate(&self, k: usize) -> Option<Replicate<'_>> {
        let drawn = self.config.draw(k, self.units.num()).into();
        let (genuine, impostor) = (Weighted::new(&self.genuine, &drawn)?, Weighted::new(&self.impostor, &drawn)?);
        Some(Replicate { genuine, impostor })
    }

    /// Returns the intervals of all metrics from the metrics of every replicate.
    pub fn intervals(&self, all: &[Option<Metrics>]) -> MetricIntervals {
        let of =
            |figure: fn(&Metrics) -> Option<f64>| self.config.interval(all.iter().map(|m| m.as_ref().and_then(figure)));
        MetricIntervals {
            eer: of(|m| Some(m.eer)),
            fmr100: of(|m| Some(m.fmr100)),
            fmr1000: of(|m| Some(m.fmr1000)),
            fdr: of(|m| m.fdr),
            g_mean: of(|m| Some(m.g_mean)),
            i_mean: of(|m| Some(m.i_mean)),
            auc: of(|m| Some(m.auc)),
        }
    }

    /// Returns the difference of a metric between two systems, from its `values` and from pairs of replicates with the
    /// same people. `None` if more than one replicate in twenty lacks a value.
    pub fn difference(
        &self,
        values: [f64; 2],
        replicates: impl IntoIterator<Item = [Option<f64>; 2]>,
    ) -> Option<Difference> {
        let differences: Vec<Option<f64>> = replicates.into_iter().map(|[a, b]| Some(b? - a?)).collect();
        let interval = self.config.interval(differences.iter().copied())?;
        let share = |is_other_side: fn(f64) -> bool| {
            let num = differences.iter().flatten().filter(|&&d| is_other_side(d)).count();
            (num + 1) as f64 / (differences.iter().flatten().count() + 1) as f64
        };
        let p_value = (2.0 * share(|d| d <= 0.0).min(share(|d| d >= 0.0))).min(1.0);
        Some(Difference { difference: values[1] - values[0], interval, p_value })
    }
}

impl Replicate<'_> {
    /// All metrics, as those of [`Scores`](super::Scores).
    pub fn metrics(&self) -> Metrics {
        metrics(&self.genuine, &self.impostor)
    }

    /// Share of genuine scores below `threshold`.
    pub fn fnmr_at_threshold(&self, threshold: f64) -> f64 {
        share_below(&self.genuine, threshold)
    }

    /// Share of impostor scores at or above `threshold`.
    pub fn fmr_at_threshold(&self, threshold: f64) -> f64 {
        share_from(&self.impostor, threshold)
    }

    /// Lowest threshold with an FMR of at most `fmr`, which must be in (0, 1).
    pub fn threshold_at_fmr(&self, fmr: f64) -> f64 {
        lowest_threshold(&self.impostor, fmr)
    }
}

/// Intervals of the metrics in [`Metrics`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MetricIntervals {
    /// Interval of [`Metrics::eer`].
    pub eer: Option<Interval>,
    /// Interval of [`Metrics::fmr100`].
    pub fmr100: Option<Interval>,
    /// Interval of [`Metrics::fmr1000`].
    pub fmr1000: Option<Interval>,
    /// Interval of [`Metrics::fdr`].
    pub fdr: Option<Interval>,
    /// Interval of [`Metrics::g_mean`].
    pub g_mean: Option<Interval>,
    /// Interval of [`Metrics::i_mean`].
    pub i_mean: Option<Interval>,
    /// Interval of [`Metrics::auc`].
    pub auc: Option<Interval>,
}

/// Difference of a metric between two systems on the same pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Value of the second system minus that of the first.
    pub difference: f64,
    /// Confidence interval of the difference.
    pub interval: Interval,
    /// Two-sided bootstrap p-value: twice the smaller of the shares of replicates `<= 0` and `>= 0`, at most 1. Each
    /// share is `(count + 1) / (replicates + 1)`.
    pub p_value: f64,
}

/// Quantile `q` of ascending values, interpolated linearly (Hyndman and Fan's type 7).
fn quantile(ascending: &[f64], q: f64) -> f64 {
    let place = q * (ascending.len() - 1) as f64;
    let low = (place as usize).min(ascending.len() - 1);
    let high = (low + 1).min(ascending.len() - 1);
    ascending[low] + (place - low as f64) * (ascending[high] - ascending[low])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Scores;

    /// 60 people with four images each, all pairs within people and some across.
    fn comparisons(seed: u64) -> Comparisons {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let shifts: Vec<f64> = (0..60).map(|_| rng.random_range(-0.2..0.2)).collect();
        let (mut scores, mut is_same, mut people) = (vec![], vec![], vec![]);
        for a in 0..60u32 {
            for b in (a..60).step_by(1 + a as usize % 7) {
                for _ in 0..if a == b { 6 } else { 1 } {
                    let middle = if a == b { 0.6 } else { 0.1 };
                    scores.push(middle + shifts[a as usize] + shifts[b as usize] + rng.random_range(-0.3..0.3));
                    is_same.push(a == b);
                    people.push([10 * a, 10 * b]);
                }
            }
        }
        Comparisons::new(scores, is_same, Some(people)).unwrap()
    }

    fn intervals(bootstrap: &Bootstrap) -> MetricIntervals {
        bootstrap.intervals(&bootstrap.replicates(|_, replicate| replicate.metrics()))
    }

    /// A replicate has the metrics of the same scores repeated.
    #[test]
    fn weights_count_as_repeated_scores_do() {
        let comparisons = comparisons(1);
        let config = BootstrapConfig { replicates: 100, ..BootstrapConfig::default() };
        let bootstrap = Bootstrap::new(&comparisons, &config).unwrap();
        for k in [0, 1, 99] {
            let replicate = bootstrap.replicate(k).unwrap();
            let repeated = |class: &Weighted| {
                use super::super::class::Class;
                let num = |place| (class.num_before(place + 1) - class.num_before(place)) as usize;
                let scores = class.scores().iter().enumerate();
                scores.flat_map(|(place, score)| std::iter::repeat_n(*score, num(place))).collect::<Vec<_>>()
            };
            let scores = Scores::new(repeated(&replicate.genuine), repeated(&replicate.impostor)).unwrap();
            let (found, expected) = (replicate.metrics(), scores.metrics());
            assert_eq!(
                (found.eer, found.eer_threshold, found.auc),
                (expected.eer, expected.eer_threshold, expected.auc)
            );
            assert_eq!((found.fmr100, found.fmr1000), (expected.fmr100, expected.fmr1000));
            assert_eq!((found.num_genuine, found.num_impostor), (expected.num_genuine, expected.num_impostor));
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-12;
            assert!(close(found.g_mean, expected.g_mean) && close(found.i_mean, expected.i_mean));
            assert!((found.fdr.unwrap() - expected.fdr.unwrap()).abs() <= 1e-9);
            let threshold = replicate.threshold_at_fmr(0.05);
            assert_eq!(threshold, scores.threshold_at_fmr(0.05).unwrap());
            assert_eq!(replicate.fnmr_at_threshold(threshold), scores.fnmr_at_threshold(threshold));
            assert_eq!(replicate.fmr_at_threshold(threshold), scores.fmr_at_threshold(threshold));
        }
    }

    #[test]
    fn people_count_as_often_as_they_are_drawn() {
        let comparisons = comparisons(2);
        let config = BootstrapConfig { replicates: 400, ..BootstrapConfig::default() };
        let bootstrap = Bootstrap::new(&comparisons, &config).unwrap();
        assert_eq!(bootstrap.describe(), "400 bootstrap resamples of 60 people");
        let sizes = bootstrap.replicates(|_, r| (r.metrics().num_genuine, r.metrics().num_impostor));
        // Six genuine pairs per person, and 60 people drawn every time.
        assert!(sizes.iter().all(|size| size.unwrap().0 == 360));
        let num_impostor = comparisons.is_same().iter().filter(|s| !**s).count() as f64;
        let mean = sizes.iter().map(|size| size.unwrap().1 as f64).sum::<f64>() / 400.0;
        // Two different people are drawn together (1 - 1/n) times on average.
        assert!((mean / num_impostor - 59.0 / 60.0).abs() < 0.02, "{mean} of {num_impostor}");
    }

    /// Over many sets from one distribution, the interval covers the true value about as often as its confidence level.
    #[test]
    fn intervals_hold_the_true_figure_about_as_often_as_they_say() {
        let config = BootstrapConfig { replicates: 200, confidence: 0.9, seed: 5 };
        let mut inside = 0;
        for seed in 0..100 {
            let bootstrap = Bootstrap::new(&comparisons(100 + seed), &config).unwrap();
            let interval = intervals(&bootstrap).g_mean.unwrap();
            assert!(interval.low < interval.high);
            inside += u32::from((interval.low..=interval.high).contains(&0.6));
        }
        assert!((80..=98).contains(&inside), "{inside} of 100");
        // Pairs that share a person are correlated: without people the interval is too narrow.
        let with = comparisons(1);
        let without = Comparisons::new(with.scores().to_vec(), with.is_same().to_vec(), None).unwrap();
        let width = |c: &Comparisons| {
            let interval = intervals(&Bootstrap::new(c, &config).unwrap()).g_mean.unwrap();
            interval.high - interval.low
        };
        assert!(width(&without) < 0.7 * width(&with));
    }

    #[test]
    fn a_better_system_on_the_same_pairs_is_told_apart_and_an_equal_one_is_not() {
        let first = comparisons(3);
        let changed = |by: f64| {
            let mut rng = ChaCha8Rng::seed_from_u64(9);
            let pairs = first.scores().iter().zip(first.is_same());
            let scores =
                pairs.map(|(s, &same)| s + if same { by } else { 0.0 } + rng.random_range(-0.02..0.02)).collect();
            Comparisons::new(scores, first.is_same().to_vec(), first.people().map(<[_]>::to_vec)).unwrap()
        };
        let config = BootstrapConfig { replicates: 500, ..BootstrapConfig::default() };
        let auc = |c: &Comparisons| {
            let bootstrap = Bootstrap::new(c, &config).unwrap();
            let value = Scores::from_labelled(c.scores(), c.is_same()).unwrap().metrics().auc;
            (value, bootstrap.replicates(|_, r| r.metrics().auc), bootstrap)
        };
        let (value, replicates, bootstrap) = auc(&first);
        for (by, is_better) in [(0.1, true), (0.0, false)] {
            let (other, others, _) = auc(&changed(by));
            let both = replicates.iter().zip(&others).map(|(a, b)| [*a, *b]);
            let found = bootstrap.difference([value, other], both).unwrap();
            assert_eq!(found.p_value < 0.05, is_better, "{found:?}");
            assert_eq!(found.interval.low > 0.0, is_better, "{found:?}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_replicates_and_wrong_settings_are_named() {
        let comparisons = comparisons(4);
        let of = |seed| {
            let config = BootstrapConfig { replicates: 100, seed, ..BootstrapConfig::default() };
            intervals(&Bootstrap::new(&comparisons, &config).unwrap())
        };
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        let wrong = |config: BootstrapConfig| Bootstrap::new(&comparisons, &config).unwrap_err().to_string();
        let base = BootstrapConfig::default;
        assert!(wrong(BootstrapConfig { replicates: 7, ..base() }).contains("replicates"));
        assert!(wrong(BootstrapConfig { confidence: 1.0, ..base() }).contains("confidence"));
        let only = Comparisons::new(vec![0.5], vec![true], None).unwrap();
        assert!(Bootstrap::new(&only, &base()).unwrap_err().to_string().contains("impostor"));
    }
}
