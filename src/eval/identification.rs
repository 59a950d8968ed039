//! Open-set identification: whose face is this, among people who are known, if anybody's?

use std::collections::BTreeMap;

use serde::Serialize;

use super::bootstrap::{BootstrapConfig, Interval};
use super::class::Weighted;
use super::embed::Embeddings;
use super::metrics::lowest_threshold;
use super::similarity::for_each_row;
use crate::error::{Error, Result};

/// False positive identification rates at which systems are compared: those of IJB-B and IJB-C, and NIST's.
pub const FPIR_TARGETS: [f64; 3] = [1e-1, 1e-2, 1e-3];
/// Ranks that are reported.
const RANKS: [usize; 3] = [1, 5, 10];
/// Highest rank of the cumulative match characteristic.
const MAX_RANK: usize = 50;

/// What came of the search for one probe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    /// The probe's person.
    pub person: u32,
    /// The person's own place in the gallery; none in a search for somebody who is not in it.
    pub mate: Option<Mate>,
    /// The highest score of another person.
    pub top_other: f64,
}

/// Where the right person was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mate {
    /// The score.
    pub score: f64,
    /// One more than there are other people with at least this score.
    pub rank: usize,
}

/// The searches for some probes in one gallery.
#[derive(Clone, Debug, PartialEq)]
pub struct Searches {
    /// One a probe.
    pub searches: Vec<Search>,
    /// Number of people in the gallery.
    pub num_gallery: usize,
}

/// The figures of searches in one gallery.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Identification {
    /// Number of people in the gallery.
    pub num_gallery: usize,
    /// Number of searches for people who are in it.
    pub num_mated: usize,
    /// Number of searches for people who are not.
    pub num_nonmated: usize,
    /// The share of mated searches with the right person among the first one, five and ten.
    pub at_rank: Vec<AtRank>,
    /// The cumulative match characteristic: that share for every rank from 1.
    pub cmc: Vec<f64>,
    /// With a threshold.
    pub at_fpir: Vec<AtFpir>,
}

/// Identification without a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AtRank {
    /// How many candidates are looked at.
    pub rank: usize,
    /// The share of mated searches with the right person among them.
    pub rate: f64,
    /// Of `rate`, over the probes' people; absent without a bootstrap.
    pub interval: Option<Interval>,
}

/// Identification at the threshold of a stated false positive identification rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AtFpir {
    /// The rate that the threshold was chosen for.
    pub fpir_target: f64,
    /// The lowest threshold that keeps it; `None`, as what follows, with fewer than `1 / fpir_target` non-mated searches.
    pub threshold: Option<f64>,
    /// The share of non-mated searches with any score from the threshold on.
    pub fpir: Option<f64>,
    /// The share of mated searches with the right person first, from the threshold on.
    pub tpir: Option<f64>,
    /// Of `tpir`, threshold and all.
    pub tpir_interval: Option<Interval>,
}

impl Searches {
    /// Searches for every probe among all of a gallery, in blocks.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when there is not a person for each embedding, a person is in the gallery twice, or the gallery has
    /// fewer than two people.
    pub fn run(probes: &Embeddings, people: &[u32], gallery: &Embeddings, known: &[u32]) -> Result<Self> {
        for (what, embeddings, people) in [("probes", probes, people), ("gallery", gallery, known)] {
            if embeddings.len() != people.len() {
                let (num, found) = (embeddings.len(), people.len());
                return Err(Error::Evaluation(format!("{what}: expected {num} people, found {found}")));
            }
        }
        let mut column_of = BTreeMap::new();
        for (column, person) in known.iter().enumerate() {
            if column_of.insert(person, column).is_some() {
                return Err(Error::Evaluation(format!("gallery: expected each person once, found {person} again")));
            }
        }
        if known.len() < 2 || people.is_empty() {
            let what =
                format!("expected a gallery of two people and a probe, found {} and {}", known.len(), people.len());
            return Err(Error::Evaluation(what));
        }
        let mut searches = Vec::with_capacity(people.len());
        for_each_row(probes, gallery, |i, scores| {
            let own = column_of.get(&people[i]).copied();
            let others = || scores.iter().enumerate().filter(move |(column, _)| Some(*column) != own).map(|(_, s)| *s);
            let mate = own.map(|own| {
                let score = scores[own];
                Mate { score: f64::from(score), rank: 1 + others().filter(|other| *other >= score).count() }
            });
            let top_other = f64::from(others().fold(f32::NEG_INFINITY, f32::max));
            searches.push(Search { person: people[i], mate, top_other });
            Ok(())
        })?;
        Ok(Self { searches, num_gallery: known.len() })
    }

    /// Returns the figures of the searches.
    ///
    /// # Errors
    /// When no probe is in the gallery, or a setting of the bootstrap is out of range.
    pub fn figures(&self, config: &BootstrapConfig) -> Result<Identification> {
        config.validate()?;
        let mut sorted: Vec<&Search> = self.searches.iter().filter(|search| search.mate.is_none()).collect();
        sorted.sort_by(|a, b| a.top_other.total_cmp(&b.top_other));
        let (num_nonmated, num_mated) = (sorted.len(), self.searches.len() - sorted.len());
        if num_mated == 0 {
            return Err(Error::Evaluation("expected probes of people in the gallery, found none".to_owned()));
        }
        let is_measurable = |target: f64| num_nonmated as f64 * target >= 1.0;
        let top_others: Vec<f64> = sorted.iter().map(|search| search.top_other).collect();
        let rates = |weight: &dyn Fn(u32) -> u64| {
            let nonmated = Weighted::new(&top_others, sorted.iter().map(|search| weight(search.person)).collect());
            let thresholds = FPIR_TARGETS.map(|target| {
                let nonmated = nonmated.as_ref().filter(|_| is_measurable(target))?;
                Some(lowest_threshold(nonmated, target))
            });
            let share = |is_hit: &dyn Fn(Mate) -> bool| self.share(weight, is_hit);
            let at_rank = RANKS.map(|rank| share(&|mate| mate.rank <= rank));
            let tpir = thresholds.map(|t| t.map(|t| share(&|mate| mate.rank == 1 && mate.score >= t)));
            (thresholds, at_rank, tpir)
        };
        let mut people: Vec<u32> = self.searches.iter().map(|search| search.person).collect();
        people.sort_unstable();
        people.dedup();
        let number = |person: u32| people.binary_search(&person).expect("the person of every search was taken");
        let drawn = config.replicates_of(|k| {
            let drawn = config.draw(k, people.len());
            Some(rates(&|person| u64::from(drawn[number(person)])))
        });
        let (thresholds, at_rank, tpir) = rates(&|_| 1);
        let at_rank = RANKS.into_iter().enumerate().map(|(i, rank)| AtRank {
            rank,
            rate: at_rank[i],
            interval: config.interval(drawn.iter().map(|d| d.map(|(_, at_rank, _)| at_rank[i]))),
        });
        let at_fpir = FPIR_TARGETS.into_iter().enumerate().map(|(i, fpir_target)| AtFpir {
            fpir_target,
            threshold: thresholds[i],
            fpir: thresholds[i].map(|t| top_others.iter().filter(|s| **s >= t).count() as f64 / num_nonmated as f64),
            tpir: tpir[i],
            tpir_interval: config.interval(drawn.iter().map(|d| d.and_then(|(_, _, tpir)| tpir[i]))),
        });
        Ok(Identification {
            num_gallery: self.num_gallery,
            num_mated,
            num_nonmated,
            at_rank: at_rank.collect(),
            cmc: (1..=MAX_RANK.min(self.num_gallery))
                .map(|rank| self.share(&|_| 1, &|mate| mate.rank <= rank))
                .collect(),
            at_fpir: at_fpir.collect(),
        })
    }

    /// The share of mated searches that are hits; NaN where none counts.
    fn share(&self, weight: &dyn Fn(u32) -> u64, is_hit: &dyn Fn(Mate) -> bool) -> f64 {
        let (mut hits, mut num) = (0, 0);
        for search in &self.searches {
            if let Some(mate) = search.mate {
                let weight = weight(search.person);
                num += weight;
                hits += if is_hit(mate) { weight } else { 0 };
            }
        }
        hits as f64 / num as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Unit vectors in a plane, by their angle.
    fn at(degrees: &[f32]) -> Embeddings {
        let values = degrees.iter().flat_map(|d| [d.to_radians().cos(), d.to_radians().sin()]).collect();
        Embeddings::new(values, 2).unwrap()
    }

    #[test]
    fn ranks_and_rates_are_those_counted_by_hand() {
        let gallery = at(&[0.0, 90.0, 180.0]);
        // Person 1 found first, person 2 second, behind person 1; persons 8 and 9 are not in the gallery.
        let searches = Searches::run(&at(&[10.0, 40.0, 91.0, 135.0]), &[1, 2, 8, 9], &gallery, &[1, 2, 3]).unwrap();
        let mates: Vec<Option<usize>> = searches.searches.iter().map(|s| s.mate.map(|mate| mate.rank)).collect();
        assert_eq!(mates, [Some(1), Some(2), None, None]);
        let top = searches.searches[3].top_other;
        assert!((top - 45f64.to_radians().cos()).abs() < 1e-6, "{top}");
        let none = BootstrapConfig::NONE;
        let figures = searches.figures(&none).unwrap();
        assert_eq!((figures.num_mated, figures.num_nonmated, figures.num_gallery), (2, 2, 3));
        assert_eq!(figures.cmc, [0.5, 1.0, 1.0]);
        // A tenth of two searches cannot be measured.
        assert!(figures.at_fpir.iter().all(|at| at.threshold.is_none() && at.tpir.is_none()));
        let error = |known: &[u32]| Searches::run(&at(&[0.0]), &[1], &gallery, known).unwrap_err().to_string();
        assert!(error(&[1, 2]).contains("gallery: expected 3 people, found 2"));
        assert!(error(&[1, 2, 1]).contains("found 1 again"));
        let strangers = Searches::run(&at(&[0.0]), &[7], &gallery, &[1, 2, 3]).unwrap();
        assert!(strangers.figures(&none).unwrap_err().to_string().contains("expected probes of people in the gallery"));
    }

    /// Two that score the same are not told apart: the right one is counted as the later.
    #[test]
    fn a_tie_is_no_identification() {
        let searches = Searches::run(&at(&[45.0]), &[1], &at(&[30.0, 30.0]), &[1, 2]).unwrap();
        assert_eq!(searches.searches[0].mate.unwrap().rank, 2);
    }
}
