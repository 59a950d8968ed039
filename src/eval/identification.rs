//! Open-set identification: searches a gallery of known people for a face whose person may not be in it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::bootstrap::{BootstrapConfig, Interval};
use super::class::{Ordered, Weighted};
use super::embed::Embeddings;
use super::metrics::lowest_threshold;
use super::similarity::for_each_row;
use crate::error::{Error, Result};

/// False positive identification rates at which systems are compared, as in IJB-B, IJB-C and NIST's reports.
pub const FPIR_TARGETS: [f64; 3] = [1e-1, 1e-2, 1e-3];
/// Reported ranks.
const RANKS: [usize; 3] = [1, 5, 10];
/// Highest rank of the cumulative match characteristic.
const MAX_RANK: usize = 50;

/// Result of the search for one probe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    /// Identity of the probe.
    pub person: u32,
    /// Gallery entry of the same person; `None` in a non-mated search, for a person who is not in the gallery.
    pub mate: Option<Mate>,
    /// Highest score of any other person.
    pub top_other: f64,
}

/// Score and rank of the probe's own person in the gallery.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mate {
    /// Score of the person.
    pub score: f64,
    /// One plus the number of other people with at least this score.
    pub rank: usize,
}

/// Searches for a set of probes in one gallery.
#[derive(Clone, Debug, PartialEq)]
pub struct Searches {
    /// One search per probe.
    pub searches: Vec<Search>,
    /// Number of people in the gallery.
    pub num_gallery: usize,
}

/// Metrics of the searches in one gallery.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Identification {
    /// Number of people in the gallery.
    pub num_gallery: usize,
    /// Number of mated searches, for people in the gallery.
    pub num_mated: usize,
    /// Number of non-mated searches, for people not in the gallery.
    pub num_nonmated: usize,
    /// Identification rates at ranks 1, 5 and 10.
    pub at_rank: Vec<AtRank>,
    /// Cumulative match characteristic: the identification rate at every rank from 1 to 50, or to the gallery's size if
    /// that is smaller.
    pub cmc: Vec<f64>,
    /// Identification rates at the thresholds for [`FPIR_TARGETS`].
    pub at_fpir: Vec<AtFpir>,
}

/// Identification rate at one rank, without a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AtRank {
    /// Number of candidates considered.
    pub rank: usize,
    /// Share of mated searches with the right person among the candidates.
    pub rate: f64,
    /// Interval of `rate`, from resampling the probes' people; `None` without a bootstrap.
    pub interval: Option<Interval>,
}

/// Identification at the threshold for a target false positive identification rate (FPIR).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AtFpir {
    /// Target FPIR.
    pub fpir_target: f64,
    /// Lowest threshold that keeps the target. With fewer than `1 / fpir_target` non-mated searches, this and all
    /// following fields are `None`.
    pub threshold: Option<f64>,
    /// Share of non-mated searches with any score at or above the threshold.
    pub fpir: Option<f64>,
    /// Share of mated searches with the right person at rank 1 and at or above the threshold.
    pub tpir: Option<f64>,
    /// Interval of `tpir`, with the threshold chosen anew in every replicate.
    pub tpir_interval: Option<Interval>,
}

impl Searches {
    /// Searches the gallery for every probe, block by block. `people` are the identities of the probes, `known` those
    /// of the gallery.
    ///
    /// # Errors
    /// [`Error::Evaluation`] when there is not one identity for each embedding, a person is in the gallery twice, the
    /// gallery has fewer than two people, or there are no probes.
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

    /// Returns the metrics of the searches.
    ///
    /// # Errors
    /// When no probe is in the gallery, or a setting of the bootstrap is out of range.
    pub fn figures(&self, config: &BootstrapConfig) -> Result<Identification> {
        config.validate()?;
        let nonmated: Vec<&Search> = self.searches.iter().filter(|search| search.mate.is_none()).collect();
        let (num_nonmated, num_mated) = (nonmated.len(), self.searches.len() - nonmated.len());
        if num_mated == 0 {
            return Err(Error::Evaluation("expected probes of people in the gallery, found none".to_owned()));
        }
        let is_measurable = |target: f64| num_nonmated as f64 * target >= 1.0;
        let mut people: Vec<u32> = self.searches.iter().map(|search| search.person).collect();
        people.sort_unstable();
        people.dedup();
        let number = |person: u32| people.binary_search(&person).expect("the person of every search is listed");
        let scored = nonmated.iter().map(|search| (search.top_other, [number(search.person) as u32; 2]));
        let scored = Ordered::new(scored.collect());
        let rates = |drawn: Vec<u32>| {
            let drawn = drawn.into();
            let weighted = Weighted::new(&scored, &drawn);
            let thresholds = FPIR_TARGETS.map(|target| {
                let weighted = weighted.as_ref().filter(|_| is_measurable(target))?;
                Some(lowest_threshold(weighted, target))
            });
            let weight = |person| u64::from(drawn[number(person)]);
            let share = |is_hit: &dyn Fn(Mate) -> bool| self.share(&weight, is_hit);
            let at_rank = RANKS.map(|rank| share(&|mate| mate.rank <= rank));
            let tpir = thresholds.map(|t| t.map(|t| share(&|mate| mate.rank == 1 && mate.score >= t)));
            (thresholds, at_rank, tpir)
        };
        let drawn = config.replicates_of(|k| Some(rates(config.draw(k, people.len()))));
        let (thresholds, at_rank, tpir) = rates(vec![1; people.len()]);
        let at_rank = RANKS.into_iter().enumerate().map(|(i, rank)| AtRank {
            rank,
            rate: at_rank[i],
            interval: config.interval(drawn.iter().map(|d| d.map(|(_, at_rank, _)| at_rank[i]))),
        });
        let at_fpir = FPIR_TARGETS.into_iter().enumerate().map(|(i, fpir_target)| AtFpir {
            fpir_target,
            threshold: thresholds[i],
            fpir: thresholds[i]
                .map(|t| nonmated.iter().filter(|search| search.top_other >= t).count() as f64 / num_nonmated as f64),
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

    /// Weighted share of mated searches that are hits; NaN if their weights sum to 0.
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

    /// Unit vectors in the plane at these angles.
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
        // An FPIR of a tenth cannot be measured on two searches.
        assert!(figures.at_fpir.iter().all(|at| at.threshold.is_none() && at.tpir.is_none()));
        let error = |known: &[u32]| Searches::run(&at(&[0.0]), &[1], &gallery, known).unwrap_err().to_string();
        assert!(error(&[1, 2]).contains("gallery: expected 3 people, found 2"));
        assert!(error(&[1, 2, 1]).contains("found 1 again"));
        let strangers = Searches::run(&at(&[0.0]), &[7], &gallery, &[1, 2, 3]).unwrap();
        assert!(strangers.figures(&none).unwrap_err().to_string().contains("expected probes of people in the gallery"));
    }

    /// On a tie the right person gets the worse rank.
    #[test]
    fn a_tie_is_no_identification() {
        let searches = Searches::run(&at(&[45.0]), &[1], &at(&[30.0, 30.0]), &[1, 2]).unwrap();
        assert_eq!(searches.searches[0].mate.unwrap().rank, 2);
    }
}
