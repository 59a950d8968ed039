//! Files of models on the Hugging Face hub, fetched once into the cache that all Hugging Face tools share.

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

use super::reference::{HubFile, ModelRef};
use crate::error::Result;

/// How to reach the hub. Only a cache that is not named is looked for in the environment.
#[derive(Clone, Default)]
pub struct HubConfig {
    /// Base URL of the hub or of a mirror; `https://huggingface.co` if `None`.
    pub endpoint: Option<String>,
    /// Access token, sent to the endpoint's host only; none is sent if `None`.
    pub token: Option<String>,
    /// Folder of the cache, in the layout of Python's `huggingface_hub`. If `None`, hf-hub's choice: `HF_HUB_CACHE`, else
    /// `HF_HOME/hub`, else `~/.cache/huggingface/hub`.
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

/// Fetches files of models.
#[derive(Clone, Debug, Default)]
pub struct Hub {
    #[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "nothing to reach without a client"))]
    config: HubConfig,
}

impl Hub {
    /// Returns a hub that is reached as `config` says; nothing is sent yet.
    pub fn new(config: HubConfig) -> Self {
        Self { config }
    }

    /// Returns the path of what `reference` means on this machine, after fetching it if it is on the hub.
    ///
    /// `progress` receives bytes done and bytes in all while a file is fetched.
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub fn resolve(&self, reference: &ModelRef, progress: &mut dyn FnMut(u64, u64)) -> Result<PathBuf> {
        let sha256 = reference.entry().and_then(|entry| entry.sha256.as_deref());
        match reference {
            ModelRef::Path(path) => Ok(path.clone()),
            ModelRef::Hub(file) => self.fetch(file, sha256, progress),
            ModelRef::Named(entry) => self.fetch(&entry.hub_file()?, sha256, progress),
        }
    }

    /// Returns the path of `file` in the cache, after fetching it if it is not there.
    ///
    /// A file in the cache is used without asking the network whether its branch has moved. A transfer that broke off goes
    /// on where it stopped, in this call or a later one. What arrives is checked against `expected_sha256` (64 lower-case
    /// hexadecimal digits) and against the SHA-256 that the hub gives for large files; `expected_sha256` is checked for
    /// files from the cache too. `progress` receives bytes done and bytes in all while a file is fetched.
    ///
    /// # Errors
    /// When the file is not in the cache and the hub must not be asked, cannot be reached, or does not give it; when its
    /// SHA-256 is wrong, and then the file is no longer in the cache; when the cache cannot be written; without the
    /// feature `hub`.
    #[cfg(feature = "hub")]
    pub fn fetch(
        &self,
        file: &HubFile,
        expected_sha256: Option<&str>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<PathBuf> {
        download::fetch(&self.config, file, expected_sha256, progress)
    }

    /// Returns the folder with the parquet files of a split of a data set, after fetching it if it is not in the cache:
    /// `hf://datasets/owner/name`, of which the hub makes parquet files itself (branch `refs/convert/parquet`), or a configuration
    /// and split of it, `hf://datasets/owner/name/default/train`; `train` is meant where none is named.
    ///
    /// Files in the cache are used without asking the network. What the hub has a SHA-256 of is checked.
    ///
    /// # Errors
    /// When the reference is another, the data set is not in the cache and the hub must not be asked, cannot be reached or does
    /// not give it, there is no such split, or a file is not what the hub says; without the feature `hub`.
    #[cfg(feature = "hub")]
    pub fn fetch_dataset(&self, reference: &str) -> Result<PathBuf> {
        datasets::fetch(&self.config, reference)
    }

    /// Returns an error: this build has no feature `hub`.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "hub"))]
    pub fn fetch_dataset(&self, reference: &str) -> Result<PathBuf> {
        let what = "this program was built without the feature `hub` and cannot fetch data sets: give the path of one";
        Err(crate::Error::Hub { reference: reference.to_owned(), what: what.into() })
    }

    /// Returns an error: this build has no feature `hub`.
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
        let what = "this program was built without the feature `hub` and cannot fetch models: give the path of a file";
        Err(crate::Error::Hub { reference: file.to_string(), what: what.into() })
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
            assert!(text.contains("feature `hub`"), "{text}");
        }
        Ok(())
    }
}
