//! Matching of drawn margins to samples in the "+" forms of ElasticFace (Boutros et al., CVPRW 2022, section 3.3).

use serde::{Deserialize, Serialize};

/// Rule that assigns the drawn margins to samples in a "+" form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlusMatching {
    /// The smaller a sample's target cosine, the larger its margin, as the paper says.
    #[default]
    Ranked,
    /// The published code's rule: the sorted margins are indexed with the sorting permutation itself, not with its
    /// inverse, so ranks do not match.
    Reference,
}

/// Returns the margins reordered over the rows.
///
/// - `cosines`: each row's target cosine; `None` for a row without a label, which takes no part and gets margin 0
/// - `margins`: one drawn margin per row, in any order; those of rows without a label are dropped
pub fn match_margins(cosines: &[Option<f64>], margins: &[f64], matching: PlusMatching) -> Vec<f64> {
    let rows: Vec<usize> = (0..cosines.len()).filter(|&i| cosines[i].is_some()).collect();
    let mut sorted: Vec<f64> = rows.iter().map(|&i| margins[i]).collect();
    sorted.sort_by(f64::total_cmp);
    // Positions in `rows`, from the largest cosine to the smallest.
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by(|&a, &b| cosines[rows[b]].unwrap_or(0.0).total_cmp(&cosines[rows[a]].unwrap_or(0.0)));
    let mut matched = vec![0.0; cosines.len()];
    for rank in 0..rows.len() {
        match matching {
            PlusMatching::Ranked => matched[rows[order[rank]]] = sorted[rank],
            PlusMatching::Reference => matched[rows[rank]] = sorted[order[rank]],
        }
    }
    matched
}
