//! Preprocessing of a network's input pixels; every model carries its own.

mod pixels;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use pixels::Pixels;

/// Conversion of 8-bit values to a network's input: `(x - mean) / std`, in the network's channel order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Preprocessing {
    /// Order of the channels.
    pub channels: Channels,
    /// Mean subtracted from each value, on the scale 0 to 255.
    pub mean: f64,
    /// Divisor of the difference, on the scale 0 to 255.
    pub std: f64,
    /// Alignment of the faces that the network was trained on.
    pub alignment: Alignment,
}

/// Order of the three colour channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channels {
    /// Red first: insightface, ElasticFace, CVLface.
    #[default]
    Rgb,
    /// Blue first, OpenCV's order: the original AdaFace.
    Bgr,
}

/// Positions of the eyes, nose and mouth corners in a crop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alignment {
    /// insightface's five points in 112x112 pixels, [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS).
    #[default]
    #[serde(rename = "arcface-112")]
    Arcface112,
}

impl Default for Preprocessing {
    /// Returns insightface's and the paper's preprocessing: RGB in `[-1, 1]`.
    fn default() -> Self {
        Self { channels: Channels::Rgb, mean: 127.5, std: 127.5, alignment: Alignment::Arcface112 }
    }
}

impl std::fmt::Display for Preprocessing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let channels = match self.channels {
            Channels::Rgb => "RGB",
            Channels::Bgr => "BGR",
        };
        let Alignment::Arcface112 = self.alignment;
        write!(f, "{channels}, (x - {}) / {}, aligned to the 112-pixel ArcFace template", self.mean, self.std)
    }
}

impl Preprocessing {
    /// Checks that the mean and the divisor are in range.
    ///
    /// # Errors
    /// When a setting is out of range; the message names it.
    pub fn validate(&self) -> Result<()> {
        if !(-1e6..=1e6).contains(&self.mean) {
            return Err(Error::Config(format!("mean: expected a number from -1e6 to 1e6, found {}", self.mean)));
        }
        if !(1e-6..=1e6).contains(&self.std) {
            return Err(Error::Config(format!("std: expected a number from 1e-6 to 1e6, found {}", self.std)));
        }
        Ok(())
    }

    /// Returns the network's input for each 8-bit value.
    pub(crate) fn table(&self) -> [f32; 256] {
        let (mean, std) = ((self.mean / 255.0) as f32, (self.std / 255.0) as f32);
        // In f32 and on the scale 0 to 1, as torchvision normalises.
        std::array::from_fn(|v| (v as f32 / 255.0 - mean) / std)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_the_papers_normalisation() {
        let table = Preprocessing::default().table();
        for (v, &x) in table.iter().enumerate() {
            assert_eq!(x, (v as f32 / 255.0 - 0.5) / 0.5);
        }
        let old = Preprocessing { mean: 127.5, std: 128.0, ..Default::default() };
        assert!((old.table()[255] - 127.5 / 128.0).abs() <= 1e-6);
    }
}
