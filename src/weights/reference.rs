//! References to models: a path, `hf://owner/repo[@revision]/file`, or a short name.

use std::fmt;
use std::path::{Path, PathBuf};

use super::Bundled;
use super::hub_file::{HubFile, SCHEME};
use super::manifest::{self, DetectorEntry, Entry};
use crate::error::{Error, Result};

/// Prefix of references to data sets of the Hugging Face hub.
pub const DATASET_SCHEME: &str = "hf://datasets/";

/// The location of a model's file.
#[derive(Clone, Debug, PartialEq)]
pub enum ModelRef {
    /// A local file.
    Path(PathBuf),
    /// A file on the Hugging Face hub.
    Hub(HubFile),
    /// A published model of the [`manifest`].
    Named(&'static Entry),
    /// A published face detector of the [`manifest`].
    Detector(&'static DetectorEntry),
    /// A model whose weights are compiled into the program.
    Bundled(&'static Bundled),
}

impl ModelRef {
    /// Parses `text`, which is tried as an existing path first, then as `hf://...`, then as a short name.
    ///
    /// # Errors
    /// When an `hf://` reference is malformed, or `text` is none of the three; the message then lists the short names.
    pub fn parse(text: &str) -> Result<Self> {
        let path = Path::new(text);
        if path.exists() {
            return Ok(Self::Path(path.to_owned()));
        }
        if let Some(rest) = text.strip_prefix(SCHEME) {
            return HubFile::parse(rest).map(Self::Hub);
        }
        if let Some(entry) = manifest::find(text) {
            return Ok(Self::Named(entry));
        }
        if let Some(entry) = manifest::find_detector(text) {
            return Ok(Self::Detector(entry));
        }
        if let Some(bundled) = manifest::find_bundled(text) {
            return Ok(Self::Bundled(bundled));
        }
        if text.contains(['/', '\\', '.']) {
            // It must be a path rather than a short name, so return the system's error.
            return std::fs::metadata(path).map(|_| Self::Path(path.to_owned())).map_err(Error::io(path));
        }
        let bundled = manifest::bundled().iter().map(|b| b.name.as_str());
        let detectors = manifest::detectors().iter().map(|e| e.name.as_str());
        let models = manifest::entries().iter().map(|e| e.name.as_str());
        let names: Vec<&str> = models.chain(bundled).chain(detectors).collect();
        let what = format!("no such file and no published model of that name; known names: {}", names.join(", "));
        Err(Error::Hub { reference: text.to_owned(), what })
    }
}

impl ModelRef {
    /// Returns the model's manifest entry, found by its short name or by its file on the hub.
    pub fn entry(&self) -> Option<&'static Entry> {
        match self {
            Self::Path(_) | Self::Bundled(_) | Self::Detector(_) => None,
            Self::Named(entry) => Some(entry),
            Self::Hub(file) => manifest::entries().iter().find(|e| e.hub_file().is_ok_and(|f| f == *file)),
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Hub(file) => write!(f, "{file}"),
            Self::Named(entry) => f.write_str(&entry.name),
            Self::Detector(entry) => f.write_str(&entry.name),
            Self::Bundled(bundled) => f.write_str(&bundled.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_references_are_printed_as_they_were_written() -> Result<()> {
        for text in ["hf://a/b/model.safetensors", "hf://a-1/b_2.c@v1.0/sub folder/m.onnx", "hf://A/b@0ff1751/m"] {
            assert!(matches!(ModelRef::parse(text)?, ModelRef::Hub(_)), "{text}");
            assert_eq!(ModelRef::parse(text)?.to_string(), text);
        }
        let ModelRef::Hub(file) = ModelRef::parse("hf://owner/repo@v2/recognition/model.onnx")? else {
            panic!("no hub file")
        };
        let parts = [file.owner(), file.repo(), file.revision(), file.file()];
        assert_eq!(parts, ["owner", "repo", "v2", "recognition/model.onnx"]);
        assert_eq!(ModelRef::parse("hf://o/r@main/f")?.to_string(), "hf://o/r/f");
        Ok(())
    }

    #[test]
    fn malformed_hub_references_are_refused() {
        for rest in [
            "",
            "/",
            "a",
            "a/b",
            "a/b/",
            "/b/f",
            "a//f",
            "a/b@/f",
            "a/b@v/",
            "../b/f",
            "a/../f",
            "a/b/..",
            "a/b/../f",
            "a/b/x/../f",
            "a/b//f",
            "a/b/./f",
            "a/b/f/",
            "a/b@../f",
            "a/b/c\\..\\f",
            "a/b/c:d",
            "a/b/\n",
            "-a/b/f",
            "a/b--c/f",
            "a/b./f",
            "a b/c/f",
            "a/b@x@y/f",
            "ä/b/f",
        ] {
            let text = format!("hf://{rest}");
            assert!(matches!(ModelRef::parse(&text), Err(Error::Hub { .. })), "{text:?} was taken");
        }
        assert!(HubFile::new("a", &"b".repeat(97), "main", "f").is_err());
    }

    #[test]
    fn an_existing_path_wins_and_an_unknown_name_lists_the_known() -> Result<()> {
        let file = tempfile::NamedTempFile::new().map_err(Error::io(Path::new("temporary file")))?;
        let text = file.path().to_string_lossy().into_owned();
        assert_eq!(ModelRef::parse(&text)?, ModelRef::Path(file.path().to_owned()));
        assert_eq!(ModelRef::parse(&text)?.to_string(), text);
        let named = ModelRef::parse("w600k-mbf")?;
        assert!(matches!(&named, ModelRef::Named(e) if e.arch == "mbf"));
        assert_eq!(named.to_string(), "w600k-mbf");
        let refused = |text: &str| ModelRef::parse(text).map_err(|e| e.to_string()).expect_err("it does not exist");
        assert!(refused("no/such/model.onnx").starts_with("no/such/model.onnx: No such file"));
        let text = refused("w601k-mbf");
        for part in ["w601k-mbf: no such file", "w600k-mbf", "auraface-v1"] {
            assert!(text.contains(part), "{text}");
        }
        Ok(())
    }
}
