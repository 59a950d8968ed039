//! The error type of everything outside tensor code.

use std::path::{Path, PathBuf};

/// A result whose error says what went wrong, and where.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong; one variant per thing a caller can act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The bytes of an image are not what its format promises, or its size is wrong.
    #[error("{}: {what}", path.display())]
    Image {
        /// The image file.
        path: PathBuf,
        /// What was expected and found.
        what: String,
    },
    /// The file was read but its bytes are not what its format promises.
    #[error("{}: at byte {offset}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What was expected and found.
        what: String,
    },
    /// A line of a text file does not follow its format or names something that is not there.
    #[error("{}:{line}: {what}", path.display())]
    Line {
        /// The text file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What was expected and found.
        what: String,
    },
    /// A data set cannot serve what is asked of it.
    #[error("{}: {what}", path.display())]
    Data {
        /// The folder of the data set.
        path: PathBuf,
        /// What was expected and found.
        what: String,
    },
    /// A checkpoint does not belong to the model it is loaded into.
    #[error("{}: {what}", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// What was expected and found.
        what: String,
    },
    /// A model reference names nothing, or its file cannot be had from the hub.
    #[error("{reference}: {what}")]
    Hub {
        /// The reference as the user wrote it.
        reference: String,
        /// What went wrong, and what helps.
        what: String,
    },
    /// A setting is unknown, out of range or contradicts another.
    #[error("config: {0}")]
    Config(String),
    /// Too few or degenerate scores for the figure that was asked for.
    #[error("evaluation: {0}")]
    Evaluation(String),
    /// Training cannot go on.
    #[error("training: {0}")]
    Training(String),
    /// Training was asked to stop, and can go on from what it saved.
    #[error("stopped after step {step} of {arm}, as asked")]
    Stopped {
        /// The arm that was in training.
        arm: String,
        /// Steps that it has taken.
        step: usize,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// Returns a function that wraps an I/O error with the path it happened at, for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
