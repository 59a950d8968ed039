//! Model files and data sets of the Hugging Face hub, downloaded once into the cache that all Hugging Face tools share.

#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod datasets;
#[cfg(feature = "hub")]
mod download;

use std::fmt;
use std::path::PathBuf;

use super::WeightsFile;
use super::hub_file::HubFile;
use super::reference::ModelRef;
use crate::error::Result;

/// Connection settings of the hub. The environment is read only to locate the cache, if `cache` is `None`.
#[derive(Clone, Default)]
pub struct HubConfig {
    /// Base URL of the hub or of a mirror; `https://huggingface.co` if `None`.
    pub endpoint: Option<String>,
    /// Access token, sent to the endpoint's host only; none is sent if `None`.
    pub token: Option<String>,
    /// Folder of the cache, in the layout of Python's `huggingface_hub`. `None` means hf-hub's default: `HF_HUB_CACHE`,
    /// else `HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache: Option<PathBuf>,
    /// Whether only the cache may be used.
    pub offline: bool,
}

impl fmt::Debug for HubConfig {
    /// Prints everything but the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubConfig")
            .field("endpoint", &self.endpoint)
            .field("has_token", &self.token.is_some())
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .finish()
    }
}

/// A client of the hub that downloads model files and data sets.
#[derive(Clone, Debug, Default)]
pub struct Hub {
    #[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "nothing to reach without a client"))]
    config: HubConfig,
}

impl Hub {
    /// Returns a client with these settings; nothing is sent yet.
    pub fn new(config: HubConfig) -> Self {
        Self { config }
    }

    /// Returns the weights that `reference` names, after downloading them if they are on the hub and not cached.
    ///
    /// `progress` receives the bytes done and the total bytes during a download.
    ///
    /// # Errors
    /// The errors of [`Self::fetch`].
    pub fn resolve(&self, reference: &ModelRef, progress: &mut dyn FnMut(u64, u64)) -> Result<WeightsFile> {
        let sha256 = reference.entry().and_then(|entry| entry.sha256.as_deref());
        match reference {
            ModelRef::Path(path) => Ok(WeightsFile::Path(path.clone())),
            ModelRef::Bundled(bundled) => Ok(WeightsFile::Bundled(bundled)),
            ModelRef::Hub(file) => self.fetch(file, sha256, progress).map(WeightsFile::Path),
            ModelRef::Detector(entry) => {
                self.fetch(&entry.hub_file()?, Some(&entry.sha256), progress).map(WeightsFile::Path)
            }
            ModelRef::Named(entry) => self.fetch(&entry.hub_file()?, sha256, progress).map(WeightsFile::Path),
        }
    }

    /// Returns the path of `file` in the cache, after downloading it if it is not cached.
    ///
    /// A cached file is used without asking the hub whether its branch has moved. An interrupted download resumes where
    /// it stopped, in this call or a later one. Downloads are checked against `expected_sha256` (64 lower-case
    /// hexadecimal digits) and the SHA-256 that the hub reports for large files; `expected_sha256` is checked for
    /// cached files too. `progress` receives the bytes done and the total bytes during a download.
    ///
    /// # Errors
    /// When the file is not cached and the client is offline, the hub cannot be reached, or it refuses the file; when
    /// the SHA-256 is wrong (a corrupt cached file is removed, unless offline); when the cache cannot be written;
    /// without the feature `hub`.
    #[cfg(feature = "hub")]
    pub fn fetch(
        &self,
        file: &HubFile,
        expected_sha256: Option<&str>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<PathBuf> {
        download::fetch(&self.config, file, expected_sha256, progress)
    }

    /// Returns the folder with the parquet files of one split of a data set, after downloading the data set if it is
    /// not cached.
    ///
    /// `reference` is `hf://datasets/owner/name` or, with a configuration and a split,
    /// `hf://datasets/owner/name/default/train`. Without them, `default/train` is used, or else the only `train` split.
    /// The files are those that the hub converts to parquet itself, on the branch `refs/convert/parquet`.
    ///
    /// Cached files are used without asking the hub. Files with a known SHA-256 are checked.
    ///
    /// # Errors
    /// When the reference is malformed; when the data set is not cached and the client is offline, the hub cannot be
    /// reached, or it refuses the data set; when there is no such split; when a file's SHA-256 is wrong; without the
    /// feature `hub`.
    #[cfg(feature = "hub")]
    pub fn fetch_dataset(&self, reference: &str) -> Result<PathBuf> {
        datasets::fetch(&self.config, reference)
    }

    /// Returns an error, because this build lacks the feature `hub`.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "hub"))]
    pub fn fetch_dataset(&self, reference: &str) -> Result<PathBuf> {
        Err(crate::Error::Hub { reference: reference.to_owned(), what: crate::error::missing_feature("hub") })
    }

    /// Returns an error, because this build lacks the feature `hub`.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "hub"))]
    pub fn fetch(
        &self,
        file: &HubFile,
        _expected_sha256: Option<&str>,
        _progress: &mut dyn FnMut(u64, u64),
    ) -> Result<PathBuf> {
        Err(crate::Error::Hub { reference: file.to_string(), what: crate::error::missing_feature("hub") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_never_printed() {
        let config = HubConfig { token: Some("hf_secret".into()), ..HubConfig::default() };
        let text = format!("{:?}", Hub::new(config));
        assert!(text.contains("has_token: true") && !text.contains("secret"), "{text}");
    }

    #[test]
    #[cfg(not(feature = "hub"))]
    fn without_the_feature_the_error_says_so() -> Result<()> {
        for reference in ["hf://owner/repo/model.onnx", "w600k-mbf"] {
            let result = Hub::default().resolve(&ModelRef::parse(reference)?, &mut |_, _| ());
            let text = result.map_err(|e| e.to_string()).expect_err("there is no client");
            assert!(text.contains("lacks the feature hub"), "{text}");
        }
        Ok(())
    }
}
