//! Small models that are part of the program, listed in `weights/manifest.toml`.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::files;

/// A model whose weights are compiled into the program.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundled {
    /// Short name, accepted wherever a path to a model is.
    pub name: String,
    /// File name in `weights/`, a safetensors file with its architecture and preprocessing in the metadata.
    pub file: String,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// Command that trained the model.
    pub command: String,
    /// Training data.
    pub data: String,
    /// Terms of use of the weights.
    pub licence: String,
}

/// File contents by file name.
const FILES: [(&str, &[u8]); 1] =
    [("procedural-teacher.safetensors", include_bytes!("../../weights/procedural-teacher.safetensors"))];

impl Bundled {
    /// Returns the contents of the safetensors file.
    pub fn bytes(&self) -> &'static [u8] {
        let known = FILES.iter().find(|(file, _)| *file == self.file);
        known.expect("every bundled file of the manifest is compiled in: a test reads them").1
    }
}

/// Location of a model's weights.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightsFile {
    /// A file on this machine.
    Path(PathBuf),
    /// Part of this program.
    Bundled(&'static Bundled),
}

impl WeightsFile {
    /// Returns the path; `None` for a bundled model.
    pub fn path(&self) -> Option<&PathBuf> {
        match self {
            Self::Path(path) => Some(path),
            Self::Bundled(_) => None,
        }
    }

    /// Returns the length in bytes.
    ///
    /// # Errors
    /// When the file is gone.
    pub fn num_bytes(&self) -> Result<u64> {
        match self {
            Self::Path(path) => Ok(std::fs::metadata(path).map_err(Error::io(path))?.len()),
            Self::Bundled(bundled) => Ok(bundled.bytes().len() as u64),
        }
    }

    /// Returns the SHA-256 as lower-case hexadecimal digits.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn sha256(&self) -> Result<String> {
        match self {
            Self::Path(path) => files::sha256(path),
            Self::Bundled(bundled) => Ok(bundled.sha256.clone()),
        }
    }
}

impl fmt::Display for WeightsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Bundled(bundled) => write!(f, "{} (bundled)", bundled.name),
        }
    }
}
