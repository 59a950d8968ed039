//! Error rates of groups of people at one threshold for all, as NIST reports demographic differences (Grother, Ngan, Hanaoka, NISTIR
//! 8280): a system that is good on average may fail some people more often.

use std::collections::BTreeMap;

use serde::Serialize;

use super::comparisons::Comparisons;
use crate::error::{Error, Result};

/// The error rates of one group.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupRates {
    /// Its name.
    pub group: String,
    /// The share of genuine comparisons below the threshold; none without any.
    pub fnmr: Option<f64>,
    /// The share of impostor comparisons of two people of the group from the threshold on; none without any.
    pub fmr: Option<f64>,
    /// Number of genuine comparisons.
    pub num_genuine: usize,
    /// Number of impostor comparisons of two people of the group.
    pub num_impostor: usize,
}

/// Returns the rates of every group at `threshold`, by name. Impostor comparisons across groups count for none.
///
/// # Errors
/// [`Error::Evaluation`] when there are not two groups for each comparison.
pub fn group_rates(comparisons: &Comparisons, groups: &[[String; 2]], threshold: f64) -> Result<Vec<GroupRates>> {
    if groups.len() != comparisons.len() {
        let (num, found) = (comparisons.len(), groups.len());
        return Err(Error::Evaluation(format!("expected two groups for each of {num} comparisons, found {found}")));
    }
    // Errors and comparisons, genuine and impostor.
    let mut counts: BTreeMap<&str, [[usize; 2]; 2]> = BTreeMap::new();
    for (([a, b], score), &is_same) in groups.iter().zip(comparisons.scores()).zip(comparisons.is_same()) {
        if a == b {
            let is_error = (*score >= threshold) != is_same;
            let count = &mut counts.entry(a).or_default()[usize::from(!is_same)];
            count[0] += usize::from(is_error);
            count[1] += 1;
        }
    }
    let rate = |[errors, num]: [usize; 2]| (num > 0).then(|| errors as f64 / num as f64);
    let rates = counts.into_iter().map(|(group, [genuine, impostor])| GroupRates {
        group: group.to_owned(),
        fnmr: rate(genuine),
        fmr: rate(impostor),
        num_genuine: genuine[1],
        num_impostor: impostor[1],
    });
    Ok(rates.collect())
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
        let found = group_rates(&comparisons, &groups, 0.5).unwrap();
        let rates: Vec<_> =
            found.iter().map(|g| (g.group.as_str(), g.fnmr, g.fmr, g.num_genuine, g.num_impostor)).collect();
        assert_eq!(rates, [("x", Some(0.5), Some(0.5), 2, 2), ("y", Some(0.0), None, 1, 0)]);
        assert!(group_rates(&comparisons, &groups[1..], 0.5).is_err());
    }
}
