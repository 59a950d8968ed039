//! Settings of an evaluation.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::bootstrap::BootstrapConfig;
use super::embed::EmbedConfig;
use crate::data::mask::{MaskConfig, MaskProtocol};
use crate::error::{Error, Result};

/// Evaluation settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Synthetic masks on test images.
    pub mask: MaskConfig,
    /// Seed of each image's mask.
    pub seed: u64,
    /// Number of images per batch.
    pub batch_size: usize,
    /// List ([`read_colours`](crate::data::mask::read_colours)) of the published mask colours of U-M, one for each
    /// masked image; only for the `reference` protocol.
    pub reference_colours_um: Option<PathBuf>,
    /// The same list for M-M.
    pub reference_colours_mm: Option<PathBuf>,
    /// Bootstrap of the confidence intervals.
    pub bootstrap: BootstrapConfig,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self {
            mask: MaskConfig::default(),
            seed: 0,
            batch_size: 32,
            reference_colours_um: None,
            reference_colours_mm: None,
            bootstrap: BootstrapConfig::default(),
        }
    }
}

impl EvalConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(1..=4096).contains(&self.batch_size) {
            return Err(Error::Config(format!("eval.batch_size: expected 1 to 4096, found {}", self.batch_size)));
        }
        let has_colours = self.reference_colours_um.is_some() || self.reference_colours_mm.is_some();
        if has_colours && self.mask.protocol != MaskProtocol::Reference {
            return Err(Error::Config("eval.reference_colours_um and _mm: expected mask.protocol reference".into()));
        }
        self.bootstrap.validate()?;
        self.mask.validate()
    }

    /// Returns the settings of [`embed`](super::embed()).
    pub(super) fn embedding(&self) -> EmbedConfig {
        EmbedConfig { batch_size: self.batch_size, ..EmbedConfig::default() }
    }
}

/// Which images of a pair are masked. The first image is the reference, the second the probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Setting {
    /// Neither image.
    #[serde(rename = "U-U")]
    UU,
    /// The probe.
    #[serde(rename = "U-M")]
    UM,
    /// The reference.
    #[serde(rename = "M-U")]
    MU,
    /// Both, each with a mask of its own.
    #[serde(rename = "M-M")]
    MM,
}

impl Setting {
    /// All settings.
    pub const ALL: [Self; 4] = [Self::UU, Self::UM, Self::MU, Self::MM];
    /// Settings of the papers' tables, in their order.
    pub const TABLE: [Self; 3] = [Self::UU, Self::UM, Self::MM];

    /// Returns the name that the papers use, such as `U-M`.
    pub fn name(self) -> &'static str {
        match self {
            Self::UU => "U-U",
            Self::UM => "U-M",
            Self::MU => "M-U",
            Self::MM => "M-M",
        }
    }

    /// Returns whether each of the two images of pair `index` of `num_pairs` is masked.
    ///
    /// For U-M the published code (reference protocol) masks the second half of the list of all images, so half of the
    /// pairs are U-U and half are M-M. It has no M-U; here M-U masks the first half.
    pub fn masked(self, protocol: MaskProtocol, index: usize, num_pairs: usize) -> [bool; 2] {
        match (self, protocol) {
            (Self::UU, _) => [false, false],
            (Self::MM, _) => [true, true],
            (Self::UM, MaskProtocol::Corrected) => [false, true],
            (Self::MU, MaskProtocol::Corrected) => [true, false],
            (Self::UM, MaskProtocol::Reference) => [2 * index >= num_pairs, 2 * index + 1 >= num_pairs],
            (Self::MU, MaskProtocol::Reference) => [2 * index < num_pairs, 2 * index + 1 < num_pairs],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_protocol_masks_whole_pairs_of_the_second_half() {
        let masked = |i| Setting::UM.masked(MaskProtocol::Reference, i, 4);
        assert_eq!([masked(0), masked(1), masked(2), masked(3)], [[false; 2], [false; 2], [true; 2], [true; 2]]);
        let masked = |i| Setting::UM.masked(MaskProtocol::Corrected, i, 4);
        assert_eq!([masked(0), masked(3)], [[false, true]; 2]);
    }
}
