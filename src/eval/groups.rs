//! Error rates of groups of people at one common threshold, as NIST reports demographic effects (Grother, Ngan,
//! Hanaoka, NISTIR 8280): a system that is good on average may fail some people more often.

use std::collections::BTreeSet;

use serde::Serialize;

use super::bootstrap::{Bootstrap, BootstrapConfig, Interval};
use super::comparisons::Comparisons;
use super::metrics::Scores;
use crate::error::{Error, Result};

/// Error rates of all groups at one threshold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Groups {
    /// Target false match rate over all impostor comparisons.
    pub fmr_target: f64,
    /// Lowest threshold that keeps the target.
    pub threshold: f64,
    /// Rates of every group, sorted by name.
    pub rates: Vec<GroupRates>,
}

/// Error rates of one group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupRates {
    /// Name of the group.
    pub group: String,
    /// Share of genuine comparisons below the threshold; `None` if there are no such comparisons.
    pub fnmr: Option<f64>,
    /// Share of impostor comparisons within the group at or above the threshold; `None` if there are no such
    /// comparisons.
    pub fmr: Option<f64>,
    /// Interval of `fnmr`, with the threshold chosen anew in every replicate; `None` without a bootstrap.
    pub fnmr_interval: Option<Interval>,
    /// Interval of `fmr`, likewise.
    pub fmr_interval: Option<Interval>,
    /// Number of genuine comparisons.
    pub num_genuine: usize,
    /// Number of impostor comparisons within the group.
    pub num_impostor: usize,
}

/// `[errors, comparisons]` of a group, genuine and impostor.
type Counts = [[u64; 2]; 2];

/// Returns the rates of every group at the threshold for `fmr_target` over all comparisons. Impostor comparisons across
/// groups help to choose the threshold but count for no group.
///
/// # Errors
/// [`Error::Evaluation`] when there are not two groups for each comparison, or the FMR cannot be measured.
pub fn group_rates(
    comparisons: &Comparisons,
    groups: &[[String; 2]],
    fmr_target: f64,
    config: &BootstrapConfig,
) -> Result<Groups> {
    if groups.len() != comparisons.len() {
        let (num, found) = (comparisons.len(), groups.len());
        return Err(Error::Evaluation(format!("expected two groups for each of {num} comparisons, found {found}")));
    }
    let threshold = Scores::from_labelled(comparisons.scores(), comparisons.is_same())?.threshold_at_fmr(fmr_target)?;
    let names: BTreeSet<&str> = groups.iter().filter(|[a, b]| a == b).map(|[a, _]| a.as_str()).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let number = |name: &str| names.binary_search(&name).expect("every group with pairs within it is listed");
    let group_of: Vec<Option<usize>> = groups.iter().map(|[a, b]| (a == b).then(|| number(a))).collect();
    let count = |threshold: f64, weight: &dyn Fn(usize) -> u64| {
        let mut counts: Vec<Counts> = vec![Counts::default(); names.len()];
        for (i, group) in group_of.iter().enumerate() {
            let Some(group) = *group else { continue };
            let is_same = comparisons.is_same()[i];
            let is_error = (comparisons.scores()[i] >= threshold) != is_same;
            let [errors, num] = &mut counts[group][usize::from(!is_same)];
            *errors += if is_error { weight(i) } else { 0 };
            *num += weight(i);
        }
        counts
    };
    let drawn = match config.replicates {
        0 => Vec::new(),
        _ => {
            let bootstrap = Bootstrap::new(comparisons, config)?;
            bootstrap.replicates(|k, replicate| {
                let weights = bootstrap.weights(k);
                count(replicate.threshold_at_fmr(fmr_target), &|i| weights[i])
            })
        }
    };
    let interval =
        |group: usize, class: usize| config.interval(drawn.iter().map(|counts| rate(counts.as_ref()?[group][class])));
    let rates = count(threshold, &|_| 1).into_iter().enumerate().map(|(group, [genuine, impostor])| GroupRates {
        group: names[group].to_owned(),
        fnmr: rate(genuine),
        fmr: rate(impostor),
        fnmr_interval: interval(group, 0),
        fmr_interval: interval(group, 1),
        num_genuine: genuine[1] as usize,
        num_impostor: impostor[1] as usize,
    });
    Ok(Groups { fmr_target, threshold, rates: rates.collect() })
}

fn rate([errors, num]: [u64; 2]) -> Option<f64> {
    (num > 0).then(|| errors as f64 / num as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_counted_apart_and_pairs_across_them_not_at_all() {
        let scores = vec![0.9, 0.2, 0.8, 0.7, 0.1, 0.95];
        let is_same = vec![true, true, true, false, false, false];
        let groups = [("x", "x"), ("x", "x"), ("y", "y"), ("x", "x"), ("x", "x"), ("x", "y")];
        let groups: Vec<[String; 2]> = groups.iter().map(|(a, b)| [a.to_string(), b.to_string()]).collect();
        let comparisons = Comparisons::new(scores, is_same, None).unwrap();
        let none = BootstrapConfig::NONE;
        // One impostor of three is accepted, the one across groups.
        let found = group_rates(&comparisons, &groups, 0.4, &none).unwrap();
        assert!((0.7..0.700001).contains(&found.threshold), "{}", found.threshold);
        let rates: Vec<_> =
            found.rates.iter().map(|g| (g.group.as_str(), g.fnmr, g.fmr, g.num_genuine, g.num_impostor)).collect();
        assert_eq!(rates, [("x", Some(0.5), Some(0.0), 2, 2), ("y", Some(0.0), None, 1, 0)]);
        assert!(found.rates.iter().all(|g| g.fnmr_interval.is_none()));
        let at_two = group_rates(&comparisons, &groups, 0.7, &none).unwrap();
        assert_eq!(at_two.rates[0].fmr, Some(0.5));
        assert!(group_rates(&comparisons, &groups[1..], 0.4, &none).is_err());
        assert!(
            group_rates(&comparisons, &groups, 0.01, &none).unwrap_err().to_string().contains("cannot be measured")
        );
    }
}
