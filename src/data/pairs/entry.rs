//! Pairs as lists name them.

/// An image as a list names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ImageId {
    /// An image of a person by its number: 7 of `Jane_Doe` is `Jane_Doe/Jane_Doe_0007.jpg`.
    Numbered {
        /// The identity's name.
        identity: String,
        /// The image's number, from 1 or, in some lists, from 0.
        number: u32,
    },
    /// The path of an image file, or the end of it.
    File(String),
}

impl std::fmt::Display for ImageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Numbered { identity, number } => write!(f, "image {number} of {identity}"),
            Self::File(path) => f.write_str(path),
        }
    }
}

/// A pair as its list names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairEntry {
    /// The first image.
    pub a: ImageId,
    /// The second image.
    pub b: ImageId,
    /// Whether both show the same person.
    pub is_same: bool,
    /// The fold, from 0.
    pub fold: usize,
    /// The line in the list, from 1.
    pub line: usize,
}
