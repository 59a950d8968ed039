//! Match thresholds: the score from which two faces count as one person, calibrated on pairs and stored with the model.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

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
        let Self { fmr, threshold, fnmr, setting, num_impostor, measured_on, .. } = self;
        let fnmr = 100.0 * fnmr;
        write!(
            f,
            "{threshold:.4}, FMR {fmr} and FNMR {fnmr:.2} % on {setting} pairs of {measured_on}, {num_impostor} of them impostor"
        )
    }
}
