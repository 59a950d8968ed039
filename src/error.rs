//! The error type of everything outside tensor code.

use std::path::{Path, PathBuf};

/// A result with the crate's [`Error`], which names the cause and the place.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The crate's error, with one variant per cause that a caller can act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// An image violates its format or has the wrong size.
    #[error("{}: {what}", path.display())]
    Image {
        /// The image file.
        path: PathBuf,
        /// The expected and the actual content.
        what: String,
    },
    /// A file could be read but violates its format.
    #[error("{}: at byte {offset}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Byte offset of the problem in the file.
        offset: u64,
        /// The expected and the actual content.
        what: String,
    },
    /// A line of a text file violates its format or names something that does not exist.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The text file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The expected and the actual content.
        what: String,
    },
    /// A data set does not satisfy a requirement.
    #[error("{}: {what}", path.display())]
    Data {
        /// The folder of the data set.
        path: PathBuf,
        /// The expected and the actual content.
        what: String,
    },
    /// A checkpoint does not fit the model it is loaded into.
    #[error("{}: {what}", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// The expected and the actual content.
        what: String,
    },
    /// A model reference is unknown, or its file cannot be fetched from the hub.
    #[error("{reference}: {what}")]
    Hub {
        /// The reference as the user wrote it.
        reference: String,
        /// The cause, and the remedy if there is one.
        what: String,
    },
    /// A setting is unknown, out of range or contradicts another.
    #[error("config: {0}")]
    Config(String),
    /// The scores are too few or too degenerate for the requested figure.
    #[error("evaluation: {0}")]
    Evaluation(String),
    /// A photo cannot be searched for faces.
    #[error("detection: {0}")]
    Detection(String),
    /// A photo has no face, or several where one is asked for.
    #[error("{}: {what}", path.display())]
    Face {
        /// The photo.
        path: PathBuf,
        /// The expected and the actual number of faces.
        what: String,
    },
    /// A gallery cannot be read or written, or does not have what is asked for.
    #[error("{}: {what}", path.display())]
    Gallery {
        /// The gallery.
        path: PathBuf,
        /// The cause, and the remedy if there is one.
        what: String,
    },
    /// Training cannot continue.
    #[error("training: {0}")]
    Training(String),
    /// The ranks that share the work cannot go on together.
    #[error("ranks: {0}")]
    Ranks(String),
    /// Training stopped on request and can resume from its saved state.
    #[error("stopped after step {step} of {arm}, as requested")]
    Stopped {
        /// The arm that was being trained.
        arm: String,
        /// Number of steps it has taken.
        step: usize,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// Whether the user interrupted the work, rather than that it failed.
    pub fn is_interruption(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::Interrupted,
            Self::Stopped { .. } => true,
            _ => false,
        }
    }

    /// Whether one image is at fault, so that work on others can go on without it: it cannot be read, or has no face or
    /// several.
    pub fn is_of_image(&self) -> bool {
        matches!(self, Self::Image { .. } | Self::Face { .. } | Self::Io { .. })
    }

    /// The ranks have waited too long for one of them.
    pub(crate) fn timed_out(waited: std::time::Duration) -> Self {
        Self::Ranks(format!(
            "waited {} s (ranks.timeout_s) for the others: one of them has stalled or died",
            waited.as_secs()
        ))
    }

    /// Returns a function that wraps an I/O error with the path it happened at, for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// Describes a feature that this build lacks and the command that adds it to the features it has.
#[cfg_attr(
    all(feature = "hub", feature = "cudnn", feature = "any-onnx", feature = "gallery", feature = "mpi"),
    expect(dead_code, reason = "no feature is missing")
)]
pub(crate) fn missing_feature(feature: &str) -> String {
    let built = [
        ("hub", cfg!(feature = "hub")),
        ("parquet", cfg!(feature = "parquet") && !cfg!(feature = "hub")),
        ("any-onnx", cfg!(feature = "any-onnx")),
        ("gallery", cfg!(feature = "gallery")),
        ("mpi", cfg!(feature = "mpi")),
        ("cudnn", cfg!(feature = "cudnn")),
        ("cuda", cfg!(feature = "cuda") && !cfg!(feature = "cudnn")),
    ];
    let present = built.into_iter().filter(|(_, is_built)| *is_built).map(|(name, _)| name);
    let features: Vec<&str> = present.chain([feature]).collect();
    format!(
        "this build lacks the feature {feature}; install it with: cargo install --path . --features {}",
        features.join(",")
    )
}
