//! What a network expects of the pixels it is given: a part of every model.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// From 8-bit values to a network's input: `(x - mean) / std`, in the network's order of channels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Preprocessing {
    /// Order of the channels.
    pub channels: Channels,
    /// What is taken from each value, 0 to 255.
    pub mean: f64,
    /// What the difference is divided by.
    pub std: f64,
    /// How faces were aligned that the network was trained on.
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

/// Where the eyes, nose and corners of the mouth are in a crop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alignment {
    /// insightface's five points in 112x112 pixels, [`ALIGNED_LANDMARKS`](crate::data::ALIGNED_LANDMARKS).
    #[default]
    #[serde(rename = "arcface-112")]
    Arcface112,
}

impl Default for Preprocessing {
    /// insightface's and the paper's: RGB in `[-1, 1]`.
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
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting that is out of range.
    pub fn validate(&self) -> Result<()> {
        if !(-1e6..=1e6).contains(&self.mean) {
            return Err(Error::Config(format!("mean: expected a number from -1e6 to 1e6, found {}", self.mean)));
        }
        if !(1e-6..=1e6).contains(&self.std) {
            return Err(Error::Config(format!("std: expected a number from 1e-6 to 1e6, found {}", self.std)));
        }
        Ok(())
    }

    /// The network's input for each 8-bit value.
    pub(crate) fn table(&self) -> [f32; 256] {
        let (mean, std) = ((self.mean / 255.0) as f32, (self.std / 255.0) as f32);
        // In f32 and in units of 255, as torchvision normalises.
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
