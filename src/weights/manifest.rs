//! Published models by short name: `weights/manifest.toml`, part of the program.

use std::sync::OnceLock;

use serde::Deserialize;

use super::reference::HubFile;
use crate::error::{Error, Result};
use crate::preprocessing::Preprocessing;

/// A published model: where its file is, what goes in, and what is known of it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The short name.
    pub name: String,
    /// `owner/name` on the Hugging Face hub.
    pub repo: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// The path in the repository.
    pub file: String,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub sha256: Option<String>,
    /// Who saw that SHA-256, and where.
    pub sha256_source: Option<String>,
    /// Length of the file.
    pub bytes: Option<u64>,
    /// Whether we read a file with this SHA-256 and its embeddings were right.
    pub verified: bool,
    /// The architecture's name, as [`crate::weights`]' callers build it (`r100`, `mbf`).
    pub arch: String,
    /// Length of the embedding.
    pub embedding_size: usize,
    /// Side of the input in pixels.
    pub input_size: usize,
    /// What it expects of its input.
    pub preprocessing: Preprocessing,
    /// How the tensors in the file are named.
    pub layout: String,
    /// Terms of use of the weights.
    pub licence: String,
    /// Where the model is described.
    pub source: String,
    /// What its authors measured.
    pub reported: Option<Reported>,
}

/// What the authors of a model measured.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reported {
    /// Accuracy on the pairs of LFW, 0 to 1.
    pub lfw: f64,
    /// Where that is written.
    pub source: String,
}

impl Entry {
    /// Returns the file on the hub.
    ///
    /// # Errors
    /// When `repo`, `revision` or `file` is not what the hub allows; not for an entry of [`entries`].
    pub fn hub_file(&self) -> Result<HubFile> {
        let (owner, repo) = self.repo.split_once('/').unwrap_or(("", &self.repo));
        HubFile::new(owner, repo, &self.revision, &self.file)
    }

    fn validate(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::Config(format!("manifest: {}: {what}", self.name)));
        self.hub_file()?;
        let is_short = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if self.name.is_empty() || !self.name.chars().all(is_short) {
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
            return wrong("expected an embedding of at least 1 and, for aligned faces, an input of 112 pixels");
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
}

fn parse(text: &str) -> Result<Vec<Entry>> {
    let manifest: Manifest = toml::from_str(text).map_err(|e| Error::Config(format!("manifest: {e}")))?;
    for (i, entry) in manifest.model.iter().enumerate() {
        entry.validate()?;
        if manifest.model[..i].iter().any(|e| e.name == entry.name) {
            return Err(Error::Config(format!("manifest: {}: the name stands twice", entry.name)));
        }
    }
    Ok(manifest.model)
}

/// Returns the published models, in the order of the file.
pub fn entries() -> &'static [Entry] {
    static ENTRIES: OnceLock<Vec<Entry>> = OnceLock::new();
    ENTRIES.get_or_init(|| {
        parse(include_str!("../../weights/manifest.toml")).expect("weights/manifest.toml is valid: a test reads it")
    })
}

/// Returns the published model of that short name.
pub fn find(name: &str) -> Option<&'static Entry> {
    entries().iter().find(|e| e.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let entries = parse(include_str!("../../weights/manifest.toml"))?;
        assert!(entries.len() >= 10);
        for e in &entries {
            assert!(["r18", "r50", "r100", "mbf"].contains(&e.arch.as_str()), "{}: arch {}", e.name, e.arch);
            assert!(e.source.starts_with("https://"), "{}: source {}", e.name, e.source);
        }
        let mbf = find("w600k-mbf").expect("it is in the manifest");
        assert_eq!((mbf.verified, mbf.bytes), (true, Some(13_616_099)));
        assert_eq!(mbf.preprocessing.channels, Channels::Rgb);
        assert!(find("w600k").is_none());
        Ok(())
    }

    #[test]
    fn wrong_entries_are_refused() -> Result<()> {
        let entries = parse(ENTRY)?;
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
