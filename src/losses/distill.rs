//! Template-level knowledge distillation: the student's embedding of a masked face is pulled towards the teacher's
//! embedding of the clean one (Huber et al., FG 2021, eq. 4), or towards class centres that are the teacher's.

use serde::{Deserialize, Serialize};

use crate::ops::distance::DistillKind;

/// Class centres of the margin loss of a student with a teacher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CentreKind {
    /// Trained with the student, as in MaskInv.
    #[default]
    Learned,
    /// The teacher's mean embedding of each person's images, which stay fixed: the student cannot leave what the
    /// teacher knows.
    TeacherMean,
    /// Moving averages of the teacher's embeddings of each person, whose speed follows how near the student is to its
    /// teacher (AdaDistill, Boutros et al., ECCV 2024; [`pull_centres`](crate::ops::centres::pull_centres)).
    Adaptive,
}

/// Distillation settings; the default is no distillation, as in the teacher's own training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistillConfig {
    /// Distance between the embeddings.
    pub kind: DistillKind,
    /// Weight of the distance in the objective: 100 for MaskInv-LG, 3000 for MaskInv-HG, 0 for no distance.
    pub lambda: f64,
    /// Weight of the margin loss: 1 in the paper; with 0 the class centres are not used.
    pub margin_weight: f64,
    /// Class centres of the margin loss. If they are the teacher's and its embeddings have another length, the
    /// student's are projected to that length for the margin loss too.
    pub centres: CentreKind,
    /// How much more the distance counts for covered faces: a row's weight is in proportion to 1 plus this number times
    /// the share of the crop that the mask covers, and 1 on average. Not for [`DistillKind::Relational`].
    pub covered_weight: f64,
    /// Weight of the rank loss (EKD, Huang et al., CVPR 2022;
    /// [`rank_loss_with_gradient`](crate::ops::rank::rank_loss_with_gradient)), which is computed on the CPU: a GPU
    /// waits for it in every step.
    pub rank_weight: f64,
    /// Weight of the distance between a face without a mask and the same face with one, of paired views.
    pub agreement: f64,
    /// Whether the target is the sum of the teacher's embeddings of the face and of its mirror image, which is what
    /// evaluations compare.
    pub mirror: bool,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            kind: DistillKind::Mse,
            lambda: 0.0,
            margin_weight: 1.0,
            centres: CentreKind::Learned,
            covered_weight: 0.0,
            rank_weight: 0.0,
            agreement: 0.0,
            mirror: false,
        }
    }
}

impl DistillConfig {
    /// Whether there is a margin loss, and with it class centres.
    pub(crate) fn has_margin(&self) -> bool {
        self.margin_weight > 0.0
    }

    /// Whether class centres are trained.
    pub(crate) fn trains_head(&self) -> bool {
        self.has_margin() && self.centres == CentreKind::Learned
    }

    /// Whether class centres are those of the teacher.
    pub(crate) fn has_teacher_centres(&self) -> bool {
        self.has_margin() && self.centres != CentreKind::Learned
    }

    /// Whether the teacher's embeddings are used in each step.
    pub(crate) fn embeds_teacher(&self) -> bool {
        self.lambda > 0.0 || self.rank_weight > 0.0 || (self.has_margin() && self.centres == CentreKind::Adaptive)
    }

    /// Whether the student learns from a teacher.
    pub(crate) fn needs_teacher(&self) -> bool {
        self.embeds_teacher() || self.has_teacher_centres()
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the first setting that is out of range.
    pub fn validate(&self) -> crate::Result<()> {
        let wrong = |what: String| Err(crate::Error::Config(format!("distill.{what}")));
        let weights = [
            ("lambda", self.lambda),
            ("margin_weight", self.margin_weight),
            ("covered_weight", self.covered_weight),
            ("agreement", self.agreement),
            ("rank_weight", self.rank_weight),
        ];
        if let Some((name, weight)) = weights.into_iter().find(|(_, weight)| !(weight.is_finite() && *weight >= 0.0)) {
            return wrong(format!("{name}: expected 0 or more, found {weight}"));
        }
        if self.covered_weight > 0.0 && self.kind == DistillKind::Relational {
            return wrong("covered_weight: relations have no weights of rows; expected 0 with kind relational".into());
        }
        if [self.lambda, self.margin_weight, self.rank_weight] == [0.0; 3] {
            let what = "distill: lambda, margin_weight and rank_weight are all 0: nothing to learn";
            return Err(crate::Error::Config(what.into()));
        }
        Ok(())
    }
}
