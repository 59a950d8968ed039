//! Published models by short name, from `weights/manifest.toml`, which is compiled in.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use serde::Deserialize;

use super::Bundled;
use super::hub_file::HubFile;
use crate::error::{Error, Result};
use crate::preprocessing::Preprocessing;

/// A published model: the location of its file, its preprocessing, and other known facts.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The short name.
    pub name: String,
    /// `owner/name` on the Hugging Face hub.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Path in the repository.
    pub file: String,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub sha256: Option<String>,
    /// Source of that SHA-256.
    pub sha256_source: Option<String>,
    /// Length of the file in bytes.
    pub bytes: Option<u64>,
    /// Whether this project has read a file with this SHA-256 and checked its embeddings.
    pub verified: bool,
    /// Architecture name, such as `r100` or `mbf`.
    pub arch: String,
    /// Length of the embedding.
    pub embedding_size: usize,
    /// Side length of the square input in pixels.
    pub input_size: usize,
    /// Preprocessing of the input.
    pub preprocessing: Preprocessing,
    /// Naming scheme of the tensors in the file.
    pub layout: String,
    /// Terms of use of the weights.
    pub licence: String,
    /// URL of the model's description.
    pub source: String,
    /// Accuracy reported by its authors.
    pub reported: Option<Reported>,
}

/// Accuracy reported by the authors of a model.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reported {
    /// Accuracy on the pairs of LFW, 0 to 1.
    pub lfw: f64,
    /// Source of the figure.
    pub source: String,
}

/// A published face detector: the location of its file and its terms.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetectorEntry {
    /// The short name.
    pub name: String,
    /// `owner/name` on the Hugging Face hub.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Path in the repository.
    pub file: String,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// Source of that SHA-256.
    pub sha256_source: String,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Terms of use of the weights.
    pub licence: String,
    /// URL of the detector's description.
    pub source: String,
}

impl DetectorEntry {
    /// Returns the file on the hub.
    ///
    /// # Errors
    /// As [`Entry::hub_file`].
    pub fn hub_file(&self) -> Result<HubFile> {
        on_hub(&self.repo, &self.revision, &self.file)
    }

    fn validate(&self) -> Result<()> {
        self.hub_file()?;
        if !is_short_name(&self.name) || !is_sha256(&self.sha256) {
            let what = "expected a short name and a SHA-256 of 64 lower-case hexadecimal digits";
            return Err(Error::Config(format!("manifest: {}: {what}", self.name)));
        }
        Ok(())
    }
}

fn on_hub(repo: &str, revision: &str, file: &str) -> Result<HubFile> {
    let (owner, repo) = repo.split_once('/').unwrap_or(("", repo));
    HubFile::new(owner, repo, revision, file)
}

fn is_short_name(name: &str) -> bool {
    let is_short = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !name.is_empty() && name.chars().all(is_short)
}

impl Entry {
    /// Returns the file on the hub.
    ///
    /// # Errors
    /// When `repo`, `revision` or `file` is not allowed by the hub; never for an entry of [`entries`].
    pub fn hub_file(&self) -> Result<HubFile> {
        on_hub(&self.repo, &self.revision, &self.file)
    }

    fn validate(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::Config(format!("manifest: {}: {what}", self.name)));
        self.hub_file()?;
        if !is_short_name(&self.name) {
            return wrong("name: expected lower-case letters, digits and '-'");
        }
        if self.sha256.as_ref().is_some_and(|s| !is_sha256(s)) {
            return wrong("sha256: expected 64 lower-case hexadecimal digits");
        }
        if self.sha256.is_some() != self.sha256_source.is_some() {
            return wrong("sha256 and sha256_source: expected both or neither");
        }
        if self.verified && self.sha256.is_none() {
            return wrong("verified: a file without sha256 cannot be verified");
        }
        self.preprocessing.validate().or_else(|e| wrong(&format!("preprocessing: {e}")))?;
        if self.embedding_size == 0 || self.input_size != 112 {
            return wrong("embedding_size, input_size: expected at least 1, and 112 pixels for aligned faces");
        }
        if self.reported.as_ref().is_some_and(|r| !(0.5..=1.0).contains(&r.lfw)) {
            return wrong("reported.lfw: expected 0.5 to 1");
        }
        Ok(())
    }
}

/// Whether `text` is a SHA-256 in lower-case hexadecimal digits.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    model: Vec<Entry>,
    #[serde(default)]
    detector: Vec<DetectorEntry>,
    #[serde(default)]
    bundled: Vec<Bundled>,
}

fn parse(text: &str) -> Result<Manifest> {
    let manifest: Manifest = toml::from_str(text).map_err(|e| Error::Config(format!("manifest: {e}")))?;
    manifest.model.iter().try_for_each(Entry::validate)?;
    manifest.detector.iter().try_for_each(DetectorEntry::validate)?;
    if let Some(bundled) = manifest.bundled.iter().find(|bundled| !is_sha256(&bundled.sha256)) {
        let what = format!("manifest: {}: sha256: expected 64 lower-case hexadecimal digits", bundled.name);
        return Err(Error::Config(what));
    }
    let mut names = BTreeSet::new();
    let models = manifest.model.iter().map(|entry| &entry.name);
    let models = models.chain(manifest.detector.iter().map(|entry| &entry.name));
    match models.chain(manifest.bundled.iter().map(|bundled| &bundled.name)).find(|name| !names.insert(*name)) {
        Some(name) => Err(Error::Config(format!("manifest: {name}: duplicate name"))),
        None => Ok(manifest),
    }
}

fn manifest() -> &'static Manifest {
    static MANIFEST: OnceLock<Manifest> = OnceLock::new();
    MANIFEST.get_or_init(|| {
        parse(include_str!("../../weights/manifest.toml")).expect("weights/manifest.toml is valid: a test reads it")
    })
}

/// Returns the published models in the order of the manifest.
pub fn entries() -> &'static [Entry] {
    &manifest().model
}

/// Returns the published face detectors in the order of the manifest.
pub fn detectors() -> &'static [DetectorEntry] {
    &manifest().detector
}

/// Returns the published face detector with this short name.
pub fn find_detector(name: &str) -> Option<&'static DetectorEntry> {
    detectors().iter().find(|entry| entry.name == name)
}

/// Returns the bundled models in the order of the manifest.
pub fn bundled() -> &'static [Bundled] {
    &manifest().bundled
}

/// Returns the bundled model with this short name.
pub fn find_bundled(name: &str) -> Option<&'static Bundled> {
    bundled().iter().find(|bundled| bundled.name == name)
}

/// Returns the published model with this short name.
pub fn find(name: &str) -> Option<&'static Entry> {
    entries().iter().find(|e| e.name == name)
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;
    use crate::files::hex;
    use crate::preprocessing::Channels;

    const ENTRY: &str = r#"
        [[model]]
        name = "a-1"
        repo = "owner/repo"
        revision = "main"
        file = "model.safetensors"
        verified = false
        arch = "r100"
        embedding_size = 512
        input_size = 112
        preprocessing = { channels = "bgr", mean = 127.5, std = 127.5, alignment = "arcface-112" }
        layout = "insightface"
        licence = "MIT"
        source = "https://example.org"
    "#;

    #[test]
    fn the_committed_manifest_is_valid() -> Result<()> {
        let manifest = parse(include_str!("../../weights/manifest.toml"))?;
        assert!(manifest.model.len() >= 10);
        for e in &manifest.model {
            assert!(["r18", "r50", "r100", "mbf"].contains(&e.arch.as_str()), "{}: arch {}", e.name, e.arch);
            assert!(e.source.starts_with("https://"), "{}: source {}", e.name, e.source);
        }
        let mbf = find("w600k-mbf").expect("it is in the manifest");
        assert_eq!((mbf.verified, mbf.bytes), (true, Some(13_616_099)));
        assert_eq!(mbf.preprocessing.channels, Channels::Rgb);
        assert!(find("w600k").is_none());
        for bundled in &manifest.bundled {
            let found = hex(&Sha256::digest(bundled.bytes()));
            assert_eq!(found, bundled.sha256, "{}", bundled.file);
        }
        Ok(())
    }

    #[test]
    fn wrong_entries_are_refused() -> Result<()> {
        let entries = parse(ENTRY)?.model;
        assert_eq!(entries[0].preprocessing.channels, Channels::Bgr);
        assert_eq!(entries[0].hub_file()?.to_string(), "hf://owner/repo/model.safetensors");
        let sha = "0123456789abcdef".repeat(4);
        parse(&format!("{ENTRY}\nsha256 = \"{sha}\"\nsha256_source = \"us\""))?;
        assert!(parse(&format!("{ENTRY}{ENTRY}")).is_err(), "a name twice");
        for (from, to) in [
            ("a-1", "A 1"),
            ("owner/repo", "owner"),
            ("owner/repo", "owner/../repo"),
            ("\"model.safetensors\"", "\"../model.safetensors\""),
            ("verified = false", "verified = true"),
            ("licence", "license"),
            ("\"bgr\"", "\"grb\""),
            ("std = 127.5", "std = 0"),
            ("std = 127.5", "std = nan"),
            ("input_size = 112", "input_size = 128"),
            ("arch = \"r100\"", "arch = \"r100\"\nsha256 = \"12\"\nsha256_source = \"us\""),
            ("arch = \"r100\"", "arch = \"r100\"\nsha256_source = \"us\""),
            ("arch = \"r100\"", "arch = \"r100\"\nreported = { lfw = 99.8, source = \"x\" }"),
        ] {
            assert!(ENTRY.contains(from), "{from}");
            assert!(parse(&ENTRY.replace(from, to)).is_err(), "{from} -> {to} was taken");
        }
        Ok(())
    }
}
