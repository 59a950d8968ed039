//! Match thresholds: the score from which two faces count as one person, calibrated on pairs and stored with the model.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::preprocessing::Preprocessing;

/// A match threshold with the figures of its calibration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Threshold {
    /// False match rate that the threshold was calibrated for.
    pub fmr: f64,
    /// Lowest cosine that counts as a match. Embeddings are those of an image plus its mirror image.
    pub threshold: f64,
    /// False non-match rate at the threshold.
    pub fnmr: f64,
    /// Mask setting of the pairs, such as `U-M`.
    pub setting: String,
    /// Number of impostor pairs that the threshold was calibrated on.
    pub num_impostor: usize,
    /// Number of genuine pairs that `fnmr` was measured on.
    pub num_genuine: usize,
    /// Description of the pairs, for people.
    pub measured_on: String,
    /// How faces were found, for people; none if the images were aligned crops.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub photos: Option<String>,
    /// What the scores were computed with: for anything else the threshold means nothing. None in files of versions
    /// that did not record it.
    #[serde(default)]
    pub computed_with: Option<ComputedWith>,
}

/// What scores depend on besides the images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComputedWith {
    /// Preprocessing of the input.
    pub preprocessing: Preprocessing,
    /// SHA-256 of the weights in memory, as f32: [`Model::weights_digest`](super::Model::weights_digest).
    pub weights: String,
    /// Precision of the products: `f32`, or that of a GPU.
    pub precision: String,
}

impl ComputedWith {
    /// Says in what `now` differs; none if scores are comparable.
    fn difference(&self, now: &Self) -> Option<String> {
        if self.weights != now.weights {
            return Some("with other weights".to_owned());
        }
        if self.preprocessing != now.preprocessing {
            return Some(format!("with {}, now {}", self.preprocessing, now.preprocessing));
        }
        let precisions = (&self.precision, &now.precision);
        (precisions.0 != precisions.1).then(|| format!("in {}, now {}", precisions.0, precisions.1))
    }
}

/// Keeps the thresholds that were computed with what is there now. Returns them, and a note on those that are dropped.
pub(super) fn still_valid(thresholds: Vec<Threshold>, now: &ComputedWith) -> (Vec<Threshold>, Option<String>) {
    let unknown = || Some("by a version that did not record with what".to_owned());
    let changed = |t: &Threshold| t.computed_with.as_ref().map_or_else(unknown, |before| before.difference(now));
    let first = thresholds.iter().find_map(changed);
    let (dropped, kept): (Vec<_>, Vec<_>) = thresholds.into_iter().partition(|t| changed(t).is_some());
    let note = first.map(|what| {
        format!("{} thresholds are dropped, they were measured {what}: calibrate the model again", dropped.len())
    });
    (kept, note)
}

impl Threshold {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first value that is out of range.
    pub fn validate(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Config(format!("threshold: {what}")));
        if !(self.fmr > 0.0 && self.fmr < 1.0) {
            return wrong(format!("fmr: expected above 0 and below 1, found {}", self.fmr));
        }
        if !self.threshold.is_finite() || !(0.0..=1.0).contains(&self.fnmr) {
            let (threshold, fnmr) = (self.threshold, self.fnmr);
            return wrong(format!("expected a finite threshold and an fnmr of 0 to 1, found {threshold} and {fnmr}"));
        }
        Ok(())
    }
}

impl std::fmt::Display for Threshold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { fmr, threshold, fnmr, setting, num_impostor, measured_on, photos, .. } = self;
        let photos = photos.as_ref().map(|photos| format!("; photos with {photos}")).unwrap_or_default();
        let fnmr = 100.0 * fnmr;
        write!(
            f,
            "{threshold:.4}, FMR {fmr} and FNMR {fnmr:.2} % on {setting} pairs of {measured_on}, {num_impostor} of them \
             impostor{photos}"
        )
    }
}
