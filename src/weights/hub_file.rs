//! Files on the Hugging Face hub.

use std::fmt;

use crate::error::{Error, Result};

/// Prefix of references to the Hugging Face hub.
pub(super) const SCHEME: &str = "hf://";

/// Branch used when no revision is given.
const DEFAULT_REVISION: &str = "main";

/// A file in a model repository of the Hugging Face hub, with valid parts (see [`Self::new`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubFile {
    owner: String,
    repo: String,
    revision: String,
    file: String,
}

impl HubFile {
    /// Returns a reference to `file` in `owner/repo` at `revision`, a branch, tag or commit.
    ///
    /// # Errors
    /// When a part is not allowed by the hub. Names have up to 96 letters, digits, `-`, `_` and `.`, neither begin nor
    /// end with `-` or `.`, and contain no `--` or `..`; no component of the file path is empty, `.` or `..`.
    pub fn new(owner: &str, repo: &str, revision: &str, file: &str) -> Result<Self> {
        let this = Self { owner: owner.into(), repo: repo.into(), revision: revision.into(), file: file.into() };
        let wrong = |what: String| Err(Error::Hub { reference: this.to_string(), what });
        for (part, name) in [("owner", owner), ("repository", repo), ("revision", revision)] {
            if !is_name(name) {
                return wrong(format!("{part} {name:?}: expected up to 96 letters, digits, '-', '_' and '.'"));
            }
        }
        let is_part =
            |p: &str| !matches!(p, "" | "." | "..") && !p.contains(|c: char| c.is_control() || "\\:".contains(c));
        if !file.split('/').all(is_part) {
            return wrong(format!("file {file:?}: expected a path in the repository, such as model.safetensors"));
        }
        Ok(this)
    }

    /// Returns the user or organisation.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// Returns the repository's name without its owner.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// Returns the branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Returns the path in the repository, with slashes.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Parses a reference without its `hf://` prefix.
    pub(super) fn parse(rest: &str) -> Result<Self> {
        let wrong = || Error::Hub {
            reference: format!("{SCHEME}{rest}"),
            what: "expected hf://owner/repo/file or hf://owner/repo@revision/file".into(),
        };
        let (owner, rest) = rest.split_once('/').ok_or_else(wrong)?;
        let (repo, file) = rest.split_once('/').ok_or_else(wrong)?;
        let (repo, revision) = repo.split_once('@').unwrap_or((repo, DEFAULT_REVISION));
        Self::new(owner, repo, revision, file)
    }
}

impl fmt::Display for HubFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.owner, self.repo)?;
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision)?;
        }
        write!(f, "/{}", self.file)
    }
}

/// Whether a name follows the hub's rules. They also keep the cache's folder names unambiguous, which join names with
/// `--`.
pub(super) fn is_name(name: &str) -> bool {
    let is_edge = |c: char| c == '-' || c == '.';
    (1..=96).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        && !name.starts_with(is_edge)
        && !name.ends_with(is_edge)
        && !name.contains("--")
        && !name.contains("..")
}
