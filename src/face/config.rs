//! Settings of a detection.

use crate::error::{Error, Result};

/// Settings of a detection.
#[derive(Clone, Debug, PartialEq)]
pub struct DetectConfig {
    /// Least score of a face, 0 to 1.
    pub min_score: f32,
    /// Largest overlap of two faces, as a share of both together; of two with more the better one is kept.
    pub max_overlap: f32,
    /// Length in pixels to which the longer side of a larger photo is scaled before it is searched; none searches it as
    /// it is, in one piece.
    pub longer_side: Option<usize>,
    /// Whether the photo is searched a second time with its longer side at half that length, whatever its own, and, if
    /// nothing is found, a third time with a border, for faces that fill it. It costs a quarter more and finds many masked
    /// faces that the first search misses (docs/photos.md).
    pub looks_again: bool,
    /// Side in pixels of the smallest face to be found. If it is too small to be found at `longer_side`, the photo is
    /// searched at larger sizes too, up to its own, in tiles.
    pub min_face: Option<f32>,
}

impl DetectConfig {
    /// One search of the photo as it is: what published detectors do.
    pub const AS_IT_IS: Self =
        Self { min_score: 0.6, max_overlap: 0.3, longer_side: None, looks_again: false, min_face: None };

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Config(format!("detection: {what}")));
        for (name, share) in [("min_score", self.min_score), ("max_overlap", self.max_overlap)] {
            if !(0.0..=1.0).contains(&share) {
                return wrong(format!("{name}: expected 0 to 1, found {share}"));
            }
        }
        if let Some(side) = self.longer_side.filter(|side| !(32..=4096).contains(side)) {
            return wrong(format!("longer_side: expected 32 to 4096 pixels, found {side}"));
        }
        match self.min_face.filter(|side| !(4.0..=10_000.0).contains(side)) {
            Some(side) => wrong(format!("min_face: expected 4 to 10000 pixels, found {side}")),
            None => Ok(()),
        }
    }
}

impl Default for DetectConfig {
    fn default() -> Self {
        Self { longer_side: Some(640), looks_again: true, ..Self::AS_IT_IS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_named() {
        for (config, what) in [
            (DetectConfig { min_score: 1.5, ..DetectConfig::default() }, "min_score: expected 0 to 1, found 1.5"),
            (
                DetectConfig { max_overlap: f32::NAN, ..DetectConfig::default() },
                "max_overlap: expected 0 to 1, found NaN",
            ),
            (DetectConfig { longer_side: Some(0), ..DetectConfig::default() }, "longer_side: expected 32 to 4096"),
            (DetectConfig { min_face: Some(0.0), ..DetectConfig::default() }, "min_face: expected 4 to 10000"),
        ] {
            let error = config.validate().expect_err("out of range").to_string();
            assert!(error.contains(what), "{error}");
        }
        DetectConfig::default().validate().expect("the defaults are in range");
    }
}
