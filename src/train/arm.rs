//! The arms of the paper's ablation (Huber et al., FG 2021, section IV).

use serde::{Deserialize, Serialize};

/// A way of training the backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// Margin loss on clean faces: ElasticFace-Arc.
    Teacher,
    /// Margin loss on faces of which some are masked: ElasticFace-Arc-Aug.
    Aug,
    /// As `Aug`, with weak distillation from the teacher: MaskInv-LG.
    Lg,
    /// As `Aug`, with strong distillation from the teacher: MaskInv-HG.
    Hg,
}

impl Arm {
    /// All arms, in the order they are trained.
    pub const ALL: [Self; 4] = [Self::Teacher, Self::Aug, Self::Lg, Self::Hg];

    /// Returns the name in configs and folders.
    pub fn name(self) -> &'static str {
        match self {
            Self::Teacher => "teacher",
            Self::Aug => "aug",
            Self::Lg => "lg",
            Self::Hg => "hg",
        }
    }

    /// Returns the paper's name.
    pub fn title(self) -> &'static str {
        match self {
            Self::Teacher => "teacher (ElasticFace-Arc)",
            Self::Aug => "augmentation only",
            Self::Lg => "MaskInv-LG",
            Self::Hg => "MaskInv-HG",
        }
    }

    /// Whether a teacher's embeddings are learned from.
    pub fn distills(self) -> bool {
        matches!(self, Self::Lg | Self::Hg)
    }
}
