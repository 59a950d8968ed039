//! The arms of the paper's ablation (Huber et al., FG 2021, section IV), distillation without labels, AdaDistill, and
//! averages of other arms.

use serde::{Deserialize, Serialize};

/// One arm of the ablation: a way of training the backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// Margin loss on clean faces: ElasticFace-Arc.
    Teacher,
    /// Margin loss on faces, some of them masked: ElasticFace-Arc-Aug.
    Aug,
    /// `Aug` with weak distillation from the teacher: MaskInv-LG.
    Lg,
    /// `Aug` with strong distillation from the teacher: MaskInv-HG.
    Hg,
    /// Distillation on faces, some of them masked, without a margin loss: no label is used. Not an arm of the paper.
    Distill,
    /// Margin loss on faces, some of them masked, with class centres that are moving averages of the teacher's
    /// embeddings: AdaDistill (Boutros et al., ECCV 2024). Not an arm of the paper.
    Ada,
    /// The average of the weights of the arms in `train.soup`, trained before it from the same weights: a model soup
    /// (Wortsman et al., ICML 2022). Not an arm of the paper.
    Soup,
}

impl Arm {
    /// All arms, in training order.
    pub const ALL: [Self; 7] = [Self::Teacher, Self::Aug, Self::Lg, Self::Hg, Self::Distill, Self::Ada, Self::Soup];
    /// The arms of the paper's ablation.
    pub const PAPER: [Self; 4] = [Self::Teacher, Self::Aug, Self::Lg, Self::Hg];

    /// Returns the arm's name in settings and folder names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Teacher => "teacher",
            Self::Aug => "aug",
            Self::Lg => "lg",
            Self::Hg => "hg",
            Self::Distill => "distill",
            Self::Ada => "ada",
            Self::Soup => "soup",
        }
    }

    /// Returns the arm's name in tables and messages.
    pub fn title(self) -> &'static str {
        match self {
            Self::Teacher => "teacher",
            Self::Aug => "augmentation only",
            Self::Lg => "MaskInv-LG",
            Self::Hg => "MaskInv-HG",
            Self::Distill => "distillation only",
            Self::Ada => "AdaDistill",
            Self::Soup => "model soup",
        }
    }

    /// Whether the arm is trained by steps of its own, not averaged from others.
    pub fn is_trained(self) -> bool {
        self != Self::Soup
    }

    /// Whether the arm distils from a teacher, or may average arms that do.
    pub fn distills(self) -> bool {
        matches!(self, Self::Lg | Self::Hg | Self::Distill | Self::Ada | Self::Soup)
    }
}
